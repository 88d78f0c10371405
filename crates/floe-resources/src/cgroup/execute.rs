//! Changing the machine's groups: directories, properties, members.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::Path;
use std::rc::Rc;

use floe_image::messages::{CgControllerEntry, CgroupDirEntry, CgroupPerms, CgroupPropEntry};
use floe_kernel::ids::HostPid;
use floe_kernel::janitor::NameKind;
use floe_kernel::proc::parse_cgroup;
use floe_options::policy::ManageCgroups;

use super::fault::{self, GroupFault};
use super::hierarchy::Hierarchy;
use super::plan::Membership;
use super::properties::is_for_empty_group;
use crate::restore::{Attempt, ExecuteError, PlanError, World};

/// From which groups a task or thread goes to which; `None` stands for the coordinator's own.
pub(super) struct Place {
    pub from: Option<Membership>,
    pub to: Option<Membership>,
}

/// One group whose properties are to be written when everybody is in.
struct Pending {
    hierarchy: Rc<Hierarchy>,
    group: String,
    properties: Vec<CgroupPropEntry>,
}

/// The groups of a restore in progress.
#[derive(Default)]
pub(super) struct Groups {
    /// By every name that a member may have in the images.
    hierarchies: BTreeMap<String, Rc<Hierarchy>>,
    pending: Vec<Pending>,
}

impl Groups {
    /// Opens the hierarchies and makes the directories that are missing.
    pub fn make(
        world: &mut World<'_>,
        controllers: Vec<CgControllerEntry>,
        mode: ManageCgroups,
        yard: Option<&Path>,
    ) -> Result<(), ExecuteError> {
        for CgControllerEntry { cnames, dirs, .. } in controllers {
            let name = cnames.join(",");
            let hierarchy = Hierarchy::open(&name, yard)
                .during("Opening the control group hierarchy", || {
                    format!("`{name}`")
                })?;
            let hierarchy = Rc::new(hierarchy);
            for alias in cnames.into_iter().chain([name]) {
                let known = &mut world.state::<Groups>().hierarchies;
                known.insert(alias, hierarchy.clone());
            }
            for dir in dirs {
                make_dir(world, &hierarchy, ("", dir), mode)?;
            }
        }
        Ok(())
    }

    /// Moves a process with all its threads.
    pub fn enter(world: &mut World<'_>, pid: HostPid, place: &Place) -> Result<(), ExecuteError> {
        for (name, group) in changes(place)? {
            world
                .state::<Groups>()
                .join(&name, &group, ("cgroup.procs", pid))?;
        }
        Ok(())
    }

    /// Moves one thread.
    pub fn enter_thread(
        world: &mut World<'_>,
        tid: HostPid,
        place: &Place,
    ) -> Result<(), ExecuteError> {
        for (name, group) in changes(place)? {
            let file = if name.is_empty() {
                "cgroup.threads"
            } else {
                "tasks"
            };
            world.state::<Groups>().join(&name, &group, (file, tid))?;
        }
        Ok(())
    }

    fn join(
        &self,
        name: &str,
        group: &str,
        (file, id): (&str, HostPid),
    ) -> Result<(), ExecuteError> {
        let Some(hierarchy) = self.hierarchies.get(name) else {
            let what = format!("no controller entry for `{name}`, in which a set is");
            return Err(ExecuteError::from_plan(PlanError::damaged(
                "cgroup.img",
                what,
            )));
        };
        let path = hierarchy.path(group).join(file);
        std::fs::write(path, id.to_string()).during("Moving a task into", || {
            format!("control group {group} of hierarchy `{name}`")
        })
    }

    /// Writes what was left for when everybody is in.
    pub fn write_properties(world: &mut World<'_>) -> Result<(), ExecuteError> {
        for pending in std::mem::take(&mut world.state::<Groups>().pending) {
            let path = pending.hierarchy.path(&pending.group);
            let late = |property: &&CgroupPropEntry| !is_for_empty_group(&property.name);
            for property in pending.properties.iter().filter(late) {
                let written = write_late(&path, property);
                allow_refusal(
                    written,
                    world.options.cgroups.manage,
                    (&pending.group, property),
                )?;
            }
        }
        Ok(())
    }
}

/// A kernel that refuses one property is no reason to fail, unless all of them were asked for.
fn allow_refusal(
    written: io::Result<()>,
    mode: ManageCgroups,
    (group, property): (&str, &CgroupPropEntry),
) -> Result<(), ExecuteError> {
    let what = || format!("`{}` of control group {group}", property.name);
    match written {
        Err(error) if !matches!(mode, ManageCgroups::Full | ManageCgroups::Strict) => {
            tracing::warn!(%error, "{} is not as it was", what());
            Ok(())
        }
        other => other.during("Writing", what),
    }
}

/// Where a task must be moved, by hierarchy.
fn changes(place: &Place) -> Result<Vec<(String, String)>, ExecuteError> {
    let own = own_groups()?;
    let from = place.from.as_ref().unwrap_or(&own);
    let to = place.to.as_ref().unwrap_or(&own);
    let changed = to
        .iter()
        .filter(|(name, group)| from.get(*name) != Some(group));
    Ok(changed
        .map(|(name, group)| (name.clone(), group.clone()))
        .collect())
}

fn own_groups() -> Result<Membership, ExecuteError> {
    let name = "/proc/self/cgroup";
    let text = std::fs::read(name).during("Reading", || name.to_string())?;
    let groups = parse_cgroup(&text)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        .during("Reading", || name.to_string())?;
    let pairs = groups
        .into_iter()
        .map(|group| (group.controllers, group.path));
    Ok(pairs.collect())
}

/// Makes a group and those below it, and notes the properties that are to be written later.
fn make_dir(
    world: &mut World<'_>,
    hierarchy: &Rc<Hierarchy>,
    (parent, dir): (&str, CgroupDirEntry),
    mode: ManageCgroups,
) -> Result<(), ExecuteError> {
    let group = fault::path_of(parent, &dir);
    let path = hierarchy.path(&group);
    let shown = || format!("control group {group}");
    let CgroupDirEntry {
        children,
        properties,
        dir_perms,
        ..
    } = dir;
    // The root is nobody's to change.
    if !group.is_empty() {
        let new = !path.exists();
        if let Some(fault) = GroupFault::of(&group, !new, mode) {
            return Err(ExecuteError::Group(fault));
        }
        if new {
            create(world, hierarchy, &group)?;
            set_dir_perms(&path, &dir_perms).during("Setting permissions of", shown)?;
            let early = |property: &&CgroupPropEntry| is_for_empty_group(&property.name);
            for property in properties.iter().filter(early) {
                allow_refusal(write_early(&path, property), mode, (&group, property))?;
            }
        } else if mode != ManageCgroups::None {
            set_dir_perms(&path, &dir_perms).during("Setting permissions of", shown)?;
        }
        let all = matches!(mode, ManageCgroups::Full | ManageCgroups::Props);
        if new || all {
            let (hierarchy, group) = (hierarchy.clone(), group.clone());
            world.state::<Groups>().pending.push(Pending {
                hierarchy,
                group,
                properties,
            });
        }
    }
    for child in children {
        make_dir(world, hierarchy, (&group, child), mode)?;
    }
    Ok(())
}

/// Makes a group, with those above it; takes them back should the restore fail.
fn create(
    world: &mut World<'_>,
    hierarchy: &Rc<Hierarchy>,
    group: &str,
) -> Result<(), ExecuteError> {
    let mut upper = String::new();
    for part in group.split('/').filter(|part| !part.is_empty()) {
        upper = format!("{upper}/{part}");
        match std::fs::create_dir(hierarchy.path(&upper)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            other => other.during("Making", || format!("control group {upper}"))?,
        }
        world.made_name(NameKind::Directory, hierarchy.path(&upper));
        inherit_processors(&hierarchy.path(&upper))
            .during("Giving processors to", || format!("control group {upper}"))?;
    }
    Ok(())
}

/// A new group of the cpuset controller of version 1 has no processor, and nobody can enter it or give one
/// to groups below it. It begins with those of the group above, as one of version 2 does.
fn inherit_processors(group: &Path) -> io::Result<()> {
    let Some(upper) = group.parent() else {
        return Ok(());
    };
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let own = group.join(name);
        let is_empty = match std::fs::read_to_string(&own) {
            Ok(text) => text.trim().is_empty(),
            Err(_) => false,
        };
        if is_empty && !group.join("cgroup.controllers").exists() {
            std::fs::write(&own, std::fs::read(upper.join(name))?)?;
        }
    }
    Ok(())
}

fn set_dir_perms(path: &Path, perms: &Option<CgroupPerms>) -> io::Result<()> {
    match perms {
        Some(perms) => set_perms(&File::open(path)?, perms),
        None => Ok(()),
    }
}

fn set_perms(file: &File, perms: &CgroupPerms) -> io::Result<()> {
    fchown(file, Some(perms.uid), Some(perms.gid))?;
    file.set_permissions(std::fs::Permissions::from_mode(perms.mode & 0o7777))
}

/// Writes what only an empty group takes.
fn write_early(group: &Path, property: &CgroupPropEntry) -> io::Result<()> {
    let value = property.value.as_str();
    match property.name.as_str() {
        "devices.list" => {
            // The list itself is read only: deny all, then allow line by line.
            std::fs::write(group.join("devices.deny"), "a")?;
            let mut lines = value.lines();
            lines.try_for_each(|line| std::fs::write(group.join("devices.allow"), line))
        }
        // A new group has these anyway, and a root group refuses them.
        "memory.swappiness" if value == "60" => Ok(()),
        "memory.oom_control" if value == "0" => Ok(()),
        "cgroup.type" if value != "threaded" => Ok(()),
        "memory.kmem.limit_in_bytes" => match write_value(group, property) {
            // Deprecated: Linux 6.0 and later take no value.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            other => other,
        },
        _ => write_value(group, property),
    }
}

/// Writes what can be written once the group has members.
fn write_late(group: &Path, property: &CgroupPropEntry) -> io::Result<()> {
    match property.name.as_str() {
        "freezer.state" | "cgroup.freeze" if !matches!(property.value.as_str(), "0" | "THAWED") => {
            tracing::warn!(group = %group.display(), "the group was frozen, and is not now");
            Ok(())
        }
        "cgroup.subtree_control" => write_subtree_control(group, property),
        "net_prio.ifpriomap" => {
            write_perms(group, property)?;
            // Interfaces of the other machine may be missing here.
            for line in property.value.lines().filter(|line| !line.ends_with(" 0")) {
                if let Err(error) = std::fs::write(group.join(&property.name), line) {
                    tracing::warn!(%error, line, "a network priority is not kept");
                }
            }
            Ok(())
        }
        _ => write_value(group, property),
    }
}

fn write_perms(group: &Path, property: &CgroupPropEntry) -> io::Result<()> {
    match &property.perms {
        Some(perms) => set_perms(&open_to_write(group, property)?, perms),
        None => Ok(()),
    }
}

fn open_to_write(group: &Path, property: &CgroupPropEntry) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .open(group.join(&property.name))
}

fn write_value(group: &Path, property: &CgroupPropEntry) -> io::Result<()> {
    let mut file = open_to_write(group, property)?;
    if let Some(perms) = &property.perms {
        set_perms(&file, perms)?;
    }
    let members = matches!(property.name.as_str(), "cgroup.procs" | "tasks");
    if members || property.value.is_empty() {
        return Ok(());
    }
    file.write_all(property.value.as_bytes())
}

/// Enables the saved controllers and disables all others.
fn write_subtree_control(group: &Path, property: &CgroupPropEntry) -> io::Result<()> {
    write_perms(group, property)?;
    let path = group.join(&property.name);
    let mut now = String::new();
    File::open(&path)?.read_to_string(&mut now)?;
    let wanted: Vec<&str> = property.value.split_whitespace().collect();
    let off = now.split_whitespace().filter(|name| !wanted.contains(name));
    let on = wanted
        .iter()
        .filter(|name| !now.split_whitespace().any(|other| other == **name));
    let words: Vec<String> = off
        .map(|name| format!("-{name}"))
        .chain(on.map(|name| format!("+{name}")))
        .collect();
    match words.is_empty() {
        true => Ok(()),
        false => std::fs::write(path, words.join(" ")),
    }
}
