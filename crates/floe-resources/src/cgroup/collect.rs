//! What a dump saves: sets of groups, and the directories that they are in.

use std::collections::{BTreeSet, HashMap};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use floe_image::messages::{
    CgControllerEntry, CgMemberEntry, CgSetEntry, CgroupDirEntry, CgroupEntry, CgroupPerms,
    CgroupPropEntry, FloeCgNamespace,
};
use floe_kernel::proc::{CgroupMembership, ProcDir, parse_cgroup};
use floe_options::policy::{CgroupOptions, ManageCgroups};

use super::freezer::frozen_group;
use super::hierarchy::Hierarchy;
use super::namespace::{self, View};
use super::properties::Selection;
use crate::collect::{CollectError, Obstacle};

/// Sets of groups, numbered from 1; the first is the coordinator's own.
#[derive(Debug, Default)]
pub struct CgroupSets {
    sets: Vec<Vec<CgroupMembership>>,
    known: HashMap<Vec<u8>, u32>,
}

impl CgroupSets {
    /// The number of the set that a thread (or process) is in.
    pub fn of(&mut self, proc: &ProcDir, name: &str) -> Result<u32, CollectError> {
        self.of_text(proc, proc.read_record(name)?)
    }

    /// As [`CgroupSets::of`], of what was read of `proc` already.
    pub fn of_text(&mut self, proc: &ProcDir, text: Vec<u8>) -> Result<u32, CollectError> {
        if let Some(number) = self.known.get(&text) {
            return Ok(*number);
        }
        let mut set = parse_cgroup(&text).map_err(|error| proc.bad(error))?;
        // One that is frozen would not answer, and the whole tree wait for it.
        if let Some(group) = frozen_group(&set) {
            return Err(CollectError::Unsupported(Obstacle {
                pid: proc.pid(),
                object: format!("a task that the control group {group} freezes"),
                remedy: "thaw that (`cgroup.freeze`, `freezer.state`), or name it by --freeze-cgroup if all of the \
                         tree is in it"
                    .to_string(),
            }));
        }
        // The kernel prints hierarchies newest first; the images have them by name.
        set.sort();
        self.sets.push(set);
        let number = self.sets.len() as u32;
        self.known.insert(text, number);
        Ok(number)
    }

    /// The content of `cgroup.img`, or `None` when all tasks are in the coordinator's own groups, which
    /// restore takes from its caller, and no cgroup namespace of the tree begins elsewhere.
    pub fn into_entry(
        self,
        options: &CgroupOptions,
        views: &[View],
    ) -> Result<Option<CgroupEntry>, CollectError> {
        let Some((own, others)) = self.sets.split_first() else {
            return Ok(None);
        };
        let mut prefixes = HashMap::new();
        let mut begins: Vec<(u32, Vec<CgroupMembership>)> = Vec::new();
        for view in views {
            let roots = namespace::prefixes(&view.member)?;
            begins.push((view.id, namespace::roots(&roots, own)));
            if view.of_root {
                prefixes = roots;
            }
        }
        if others.is_empty() && begins.is_empty() {
            return Ok(None);
        }
        let wanted = |member: &&CgroupMembership| {
            let mut names = member.controllers.split(',');
            let listed = |name: &str| options.dump_controllers.iter().any(|wanted| wanted == name);
            options.dump_controllers.is_empty() || names.any(listed)
        };
        let selection = Selection::new(options)?;
        let mut controllers = Vec::new();
        for member in own.iter().filter(wanted) {
            let name = &member.controllers;
            let of_tasks = others
                .iter()
                .flatten()
                .filter(|other| other.controllers == *name);
            let mut groups: Vec<&str> = of_tasks
                .map(|other| root(other, options, &prefixes))
                .collect();
            let roots = begins.iter().flat_map(|(_, roots)| roots);
            let of_it = roots.filter(|root| root.controllers == *name && root.path != "/");
            groups.extend(of_it.map(|root| root.path.as_str()));
            let at_top = groups.contains(&"/");
            groups.retain(|group| *group != "/");
            let mut roots = topmost(groups.into_iter());
            roots.extend(at_top.then_some(""));
            controllers.push(controller(name, roots, &selection, options)?);
        }
        let entry = |member| member_entry(member, &prefixes);
        let sets = others.iter().zip(2..).map(|(members, id)| CgSetEntry {
            id,
            ctls: members.iter().filter(wanted).map(entry).collect(),
        });
        let sets = sets.collect();
        let floe_namespaces = begins.iter().map(|(id, roots)| FloeCgNamespace {
            id: *id,
            roots: roots
                .iter()
                .filter(wanted)
                .map(|root| member_entry(root, &HashMap::new()))
                .collect(),
        });
        Ok(Some(CgroupEntry {
            sets,
            controllers,
            floe_namespaces: floe_namespaces.collect(),
        }))
    }
}

fn member_entry(member: &CgroupMembership, prefixes: &HashMap<String, String>) -> CgMemberEntry {
    CgMemberEntry {
        name: member.controllers.clone(),
        path: member.path.clone(),
        cgns_prefix: prefix(member, prefixes).map(|prefix| prefix.len() as u32),
    }
}

/// Where the cgroup namespace of the tree begins, above or at the group.
fn prefix<'a>(member: &CgroupMembership, all: &'a HashMap<String, String>) -> Option<&'a str> {
    let prefix = all.get(&member.controllers)?;
    let below = member.path.strip_prefix(prefix.as_str())?;
    let covers = !prefix.is_empty() && (below.is_empty() || below.starts_with('/'));
    covers.then_some(prefix)
}

/// From where directories are saved: what `--cgroup-root` says, or all that the tree's own cgroup namespace
/// shows (a service manager keeps groups that nobody is in, and watches them), or else the task's own group.
fn root<'a>(
    member: &'a CgroupMembership,
    options: &'a CgroupOptions,
    prefixes: &'a HashMap<String, String>,
) -> &'a str {
    let of = |wanted: Option<&str>| {
        let mut roots = options.roots.iter().rev();
        roots.find(|root| root.controller.as_deref() == wanted)
    };
    let found = of(Some(&member.controllers)).or_else(|| of(None));
    match found {
        Some(root) => &root.path,
        None => prefix(member, prefixes).unwrap_or(&member.path),
    }
}

/// Of several groups, those that lie below no other one.
fn topmost<'a>(groups: impl Iterator<Item = &'a str>) -> BTreeSet<&'a str> {
    let all: BTreeSet<&str> = groups.map(|group| group.trim_matches('/')).collect();
    let above = |upper: &str, group: &str| {
        let below = group.strip_prefix(upper);
        upper.is_empty() || below.is_some_and(|rest| rest.starts_with('/'))
    };
    let covered = |group: &str| {
        all.iter()
            .any(|upper| *upper != group && above(upper, group))
    };
    all.iter()
        .copied()
        .filter(|group| !covered(group))
        .collect()
}

fn controller(
    name: &str,
    roots: BTreeSet<&str>,
    selection: &Selection,
    options: &CgroupOptions,
) -> Result<CgControllerEntry, CollectError> {
    let mut entry = CgControllerEntry {
        cnames: name.split(',').map(str::to_string).collect(),
        dirs: Vec::new(),
        is_threaded: None,
    };
    if options.manage == ManageCgroups::Ignore || roots.is_empty() {
        return Ok(entry);
    }
    let failed = |what: &str, source| CollectError::System {
        action: format!("{what} of the control group hierarchy `{name}`"),
        source,
    };
    let hierarchy = Hierarchy::open(name, options.yard.as_deref())
        .map_err(|error| failed("Opening the root", error))?;
    let files = selection.of(name);
    for root in roots {
        // Below the root of a hierarchy are the groups of everybody, and it may be exclusive where no
        // other group can: only itself is saved, for a restore into another one.
        if root.is_empty() {
            let plain = |name: &&str| !EXCLUSIVE.contains(name);
            let files: Vec<&str> = files.iter().copied().filter(plain).collect();
            let dir = group(&hierarchy.path(root), String::new(), &files);
            let dir = dir.map_err(|error| failed("Reading the root", error))?;
            entry.dirs.push(dir);
            continue;
        }
        let dir = directory(&hierarchy.path(root), root.to_string(), &files);
        entry
            .dirs
            .push(dir.map_err(|error| failed("Reading the groups", error))?);
    }
    let threaded = |property: &CgroupPropEntry| {
        property.name == "tasks" || (property.name == "cgroup.type" && property.value == "threaded")
    };
    let any = |dir: &CgroupDirEntry| any_property(dir, &threaded);
    entry.is_threaded = entry.dirs.iter().any(any).then_some(true);
    Ok(entry)
}

fn any_property(dir: &CgroupDirEntry, is: &impl Fn(&CgroupPropEntry) -> bool) -> bool {
    dir.properties.iter().any(is) || dir.children.iter().any(|child| any_property(child, is))
}

/// Properties by which a group keeps others out.
const EXCLUSIVE: [&str; 3] = [
    "cpuset.cpu_exclusive",
    "cpuset.mem_exclusive",
    "cpu.rt_runtime_us",
];

/// A group with all groups below it.
fn directory(path: &Path, dir_name: String, files: &[&str]) -> io::Result<CgroupDirEntry> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name());
        }
    }
    names.sort();
    let child = |name: std::ffi::OsString| {
        let text = name.to_string_lossy().into_owned();
        directory(&path.join(&name), text, files)
    };
    Ok(CgroupDirEntry {
        children: names.into_iter().map(child).collect::<io::Result<_>>()?,
        ..group(path, dir_name, files)?
    })
}

/// A group without those below it.
fn group(path: &Path, dir_name: String, files: &[&str]) -> io::Result<CgroupDirEntry> {
    let permissions = perms(&std::fs::metadata(path)?);
    let mut properties = Vec::new();
    for name in files {
        match property(path, name) {
            // Not every kernel has every file, and the root group lacks most.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => properties.push(other?),
        }
    }
    Ok(CgroupDirEntry {
        dir_name,
        children: Vec::new(),
        properties,
        dir_perms: Some(permissions),
    })
}

fn property(group: &Path, name: &str) -> io::Result<CgroupPropEntry> {
    let path = group.join(name);
    let permissions = perms(&std::fs::metadata(&path)?);
    let value = match name {
        // Who is in a group is told by the sets.
        "cgroup.procs" | "tasks" => String::new(),
        _ => std::fs::read_to_string(&path)?,
    };
    let value = value.trim();
    let value = match (name, value) {
        ("memory.oom_control", text) => text
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill_disable "))
            .unwrap_or("0"),
        // No limit, which the kernel prints as a number that it does not take.
        (_, text) if text.parse() == Ok(i64::MAX) => "-1",
        (_, text) => text,
    };
    Ok(CgroupPropEntry {
        name: name.to_string(),
        value: value.to_string(),
        perms: Some(permissions),
    })
}

fn perms(file: &Metadata) -> CgroupPerms {
    CgroupPerms {
        mode: file.permissions().mode(),
        uid: file.uid(),
        gid: file.gid(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_below_others_are_covered_by_them() {
        let top = |groups: &[&'static str]| {
            topmost(groups.iter().copied())
                .into_iter()
                .collect::<Vec<_>>()
        };
        assert_eq!(top(&["/a/b", "/a", "/ab"]), ["a", "ab"]);
        assert_eq!(top(&["/a", "/"]), [""]);
        assert_eq!(top(&[]), [""; 0]);
    }
}
