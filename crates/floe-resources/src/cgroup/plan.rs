//! From `cgroup.img` to steps: pure.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use floe_image::ImageKind;
use floe_image::messages::{CgControllerEntry, CgMemberEntry, CgSetEntry, CgroupEntry, CoreEntry};
use floe_kernel::ids::HostPid;
use floe_kernel::namespace::NsKind;
use floe_options::policy::{CgroupOptions, CgroupRoot, ManageCgroups};
use floe_plan::Handle;

use super::execute::{Groups, Place};
use super::namespace;
use crate::namespace::own_of_root;
use crate::restore::{PlanError, Planner, TreeImages};

/// Hierarchies by name, and the group in each.
pub(super) type Membership = BTreeMap<String, String>;

/// That a task is in the groups of the images, for its children to inherit.
pub fn entered(pid: u32) -> Handle {
    Handle::Object("in control groups", u64::from(pid))
}

/// All groups of the images exist.
const MADE: Handle = Handle::Object("control groups", 0);

/// The groups to be made; `None` where they are not to be touched.
pub(super) fn saved(planner: &Planner<'_>) -> Result<Option<CgroupEntry>, PlanError> {
    let options = planner.options;
    if options.cgroups.manage == ManageCgroups::Ignore || options.unprivileged {
        return Ok(None);
    }
    let mut entries: Vec<CgroupEntry> = planner.images.dir.read_all(ImageKind::Cgroup, 0)?;
    let Some(mut entry) = entries.pop() else {
        return Ok(None);
    };
    let begins = entry
        .floe_namespaces
        .iter()
        .filter(|it| !it.roots.is_empty());
    // Their groups are changed with those of tasks.
    let begins = begins.map(|namespace| CgSetEntry {
        id: OF_NAMESPACE | namespace.id,
        ctls: namespace.roots.clone(),
    });
    entry.sets.extend(begins.collect::<Vec<_>>());
    change_roots(&mut entry, &options.cgroups);
    Ok(Some(entry).filter(|entry| !entry.sets.is_empty()))
}

/// Numbers of sets in which namespaces begin; no image has such ones.
const OF_NAMESPACE: u32 = 1 << 31;

/// The groups in which a namespace begins; `None` for the coordinator's own.
pub(super) fn namespace_begin(
    planner: &Planner<'_>,
    id: u32,
) -> Result<Option<Membership>, PlanError> {
    let Some(entry) = saved(planner)? else {
        return Ok(None);
    };
    let root = planner.images.root();
    if own_begun(planner) == Some(id)
        && !entry
            .floe_namespaces
            .iter()
            .any(|namespace| namespace.id == id)
    {
        return Ok(set_of(&root.core).map(|set| namespace_root(&entry, set)));
    }
    Ok(sets(&entry).remove(&(OF_NAMESPACE | id)))
}

/// What exists when the groups of the images do, if they are to be made.
pub fn groups_made(planner: &Planner<'_>) -> Result<Option<Handle>, PlanError> {
    Ok(saved(planner)?.map(|_| MADE))
}

/// Adds the steps that make groups, put tasks into them, and write their properties.
///
/// Returns the tasks that enter other groups than their parent's: their children are to be born after
/// [`entered`]. To be called before files are planned, which may lie in the groups.
pub fn plan_groups(planner: &mut Planner<'_>) -> Result<BTreeSet<u32>, PlanError> {
    let (images, options) = (planner.images, planner.options);
    let mode = options.cgroups.manage;
    let root = images.root().pid();
    let own = own_begun(planner);
    if let Some(id) = own {
        namespace::plan(id, planner)?;
    }
    let begun: Vec<Handle> = own.map(crate::namespace::made).into_iter().collect();
    let Some(mut entry) = saved(planner)? else {
        return Ok(plan_root(planner, own).into_iter().collect());
    };
    let sets = Rc::new(sets(&entry));
    let home = images.inventory.root_cg_set;
    let yard = options.cgroups.yard.clone();
    let made = MADE;
    let controllers = std::mem::take(&mut entry.controllers);
    planner.step_at_home("make control groups", (&[], &[made]), move |world| {
        Groups::make(world, controllers, mode, yard.as_deref())
    });
    let mut moved = BTreeSet::new();
    let mut done = vec![Handle::Tree];
    for task in &images.tasks {
        let (pid, parent) = (task.pid(), task.entry.ppid);
        let Some(set) = set_of(&task.core) else {
            continue; // A zombie.
        };
        let from = if pid == images.root().pid() {
            home
        } else {
            inherited(images, parent).or(home)
        };
        let begins = own.filter(|_| pid == root);
        if from == Some(set) && begins.is_some() {
            moved.extend(plan_root(planner, own));
        }
        if from != Some(set) {
            let (from, to) = (
                membership(&sets, from, home)?,
                membership(&sets, Some(set), home)?,
            );
            moved.insert(pid);
            let place = Place { from, to };
            let needs = match begins {
                Some(_) => [&[made], &begun[..]].concat(),
                None => vec![made],
            };
            planner.task_step(
                pid,
                "enter control groups",
                (&needs, &[entered(pid)]),
                move |world| {
                    let host = world.puppet(pid)?.pid();
                    Groups::enter(world, host, &place)?;
                    begins.map_or(Ok(()), |id| namespace::enter(world, pid, id))
                },
            );
        }
        done.extend(plan_threads(planner, pid, (&sets, home))?);
    }
    planner.step_at_home(
        "write properties of control groups",
        (&done, &[Handle::Object("control group properties", 0)]),
        Groups::write_properties,
    );
    Ok(moved)
}

/// Adds the step by which a root that stays in its groups enters its own namespace, for its children to inherit.
fn plan_root(planner: &mut Planner<'_>, own: Option<u32>) -> Option<u32> {
    let (id, pid) = (own?, planner.images.root().pid());
    let needs = [crate::namespace::made(id)];
    planner.task_step(
        pid,
        "enter the cgroup namespace",
        (&needs, &[entered(pid)]),
        move |world| namespace::enter(world, pid, id),
    );
    Some(pid)
}

/// The cgroup namespace of the root, where it has one that is to be made.
pub fn own_begun(planner: &Planner<'_>) -> Option<u32> {
    let options = planner.options;
    let touched = options.cgroups.manage != ManageCgroups::Ignore && !options.unprivileged;
    own_of_root(planner.images, NsKind::Cgroup).filter(|_| touched)
}

/// The groups in which the namespace of a set begins.
fn namespace_root(entry: &CgroupEntry, set: u32) -> Membership {
    let members = entry.sets.iter().find(|entry| entry.id == set);
    let root = |member: &CgMemberEntry| {
        let length = member.cgns_prefix.unwrap_or(0) as usize;
        let path = member.path.get(..length).filter(|path| !path.is_empty());
        (member.name.clone(), path.unwrap_or("/").to_string())
    };
    members.map_or(Membership::new(), |set| set.ctls.iter().map(root).collect())
}

/// The step for threads that are elsewhere than their leader.
fn plan_threads(
    planner: &mut Planner<'_>,
    pid: u32,
    (sets, home): (&BTreeMap<u32, Membership>, Option<u32>),
) -> Result<Option<Handle>, PlanError> {
    let Some(task) = planner.images.task(pid) else {
        return Ok(None);
    };
    let from = set_of(&task.core);
    let mut moves = Vec::new();
    for (tid, core) in &task.threads {
        let to = set_of(core).filter(|set| Some(*set) != from);
        if let Some(to) = to {
            let (from, to) = (
                membership(sets, from, home)?,
                membership(sets, Some(to), home)?,
            );
            moves.push((*tid, Place { from, to }));
        }
    }
    if moves.is_empty() {
        return Ok(None);
    }
    let makes = Handle::Object("threads in control groups", u64::from(pid));
    let needs = [Handle::Threads(pid), Handle::Object("control groups", 0)];
    let name = "threads enter control groups";
    planner.task_step(pid, name, (&needs, &[makes]), move |world| {
        for (tid, place) in &moves {
            let host = world
                .puppet(pid)?
                .threads
                .get(tid)
                .map(|thread| thread.pid());
            Groups::enter_thread(world, host.unwrap_or(HostPid(tid.cast_signed())), place)?;
        }
        Ok(())
    });
    Ok(Some(makes))
}

/// The set of a thread; old images have it with the task.
fn set_of(core: &CoreEntry) -> Option<u32> {
    let own = core.thread_core.as_ref().and_then(|core| core.cg_set);
    own.or_else(|| core.tc.as_ref().and_then(|core| core.cg_set))
}

/// The set of the nearest ancestor that has one.
fn inherited(images: &TreeImages, pid: u32) -> Option<u32> {
    let task = images.task(pid)?;
    set_of(&task.core).or_else(|| inherited(images, task.entry.ppid))
}

fn sets(entry: &CgroupEntry) -> BTreeMap<u32, Membership> {
    let member = |member: &CgMemberEntry| (member.name.clone(), member.path.clone());
    let set =
        |set: &floe_image::messages::CgSetEntry| (set.id, set.ctls.iter().map(member).collect());
    entry.sets.iter().map(set).collect()
}

/// The groups of a set; `None` stands for the coordinator's own, which no image has.
fn membership(
    sets: &BTreeMap<u32, Membership>,
    set: Option<u32>,
    home: Option<u32>,
) -> Result<Option<Membership>, PlanError> {
    match set {
        Some(id) if sets.contains_key(&id) => Ok(sets.get(&id).cloned()),
        _ if set == home => Ok(None),
        _ => Err(PlanError::damaged(
            "cgroup.img",
            format!("it lacks set {}, which a task is in", set.unwrap_or(0)),
        )),
    }
}

/// Puts `--cgroup-root` in the place of the groups that the tree was in.
fn change_roots(entry: &mut CgroupEntry, options: &CgroupOptions) {
    let CgroupEntry {
        sets, controllers, ..
    } = entry;
    for controller in controllers {
        let Some(new) = root_of(&options.roots, controller) else {
            continue;
        };
        let members = sets.iter_mut().flat_map(|set| &mut set.ctls);
        let names = &controller.cnames;
        let of_this = |member: &&mut CgMemberEntry| {
            member
                .name
                .split(',')
                .any(|name| names.iter().any(|own| own == name))
        };
        let mut members: Vec<&mut CgMemberEntry> = members.filter(of_this).collect();
        for dir in &mut controller.dirs {
            let old = dir.dir_name.trim_matches('/').to_string();
            for member in &mut members {
                if let Some(prefix) = member.cgns_prefix.filter(|length| *length > 0) {
                    let rest = member.path.get(prefix as usize..).unwrap_or("");
                    (member.path, member.cgns_prefix) = (join(new, rest), Some(new.len() as u32));
                    let below = old.get((prefix as usize).saturating_sub(1)..).unwrap_or("");
                    dir.dir_name = join(new, below);
                    continue;
                }
                let path = member.path.trim_start_matches('/');
                let Some(rest) = path.strip_prefix(&old) else {
                    continue;
                };
                if old.is_empty() || rest.is_empty() || rest.starts_with('/') {
                    member.path = join(new, rest);
                    dir.dir_name = new.to_string();
                }
            }
        }
    }
}

fn join(root: &str, rest: &str) -> String {
    let rest = rest.trim_start_matches('/');
    match rest {
        "" => root.to_string(),
        _ => format!("{}/{rest}", root.trim_end_matches('/')),
    }
}

fn root_of<'a>(roots: &'a [CgroupRoot], controller: &CgControllerEntry) -> Option<&'a str> {
    let own = |root: &&CgroupRoot| {
        let name = root.controller.as_ref();
        name.is_some_and(|name| controller.cnames.contains(name))
    };
    let global = |root: &&CgroupRoot| root.controller.is_none();
    let mut newest = roots.iter().rev();
    let found = newest.clone().find(own).or_else(|| newest.find(global));
    found.map(|root| root.path.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use floe_image::messages::CgroupDirEntry;

    fn entry(path: &str, dir: &str) -> CgroupEntry {
        CgroupEntry {
            sets: vec![CgSetEntry {
                id: 2,
                ctls: vec![CgMemberEntry {
                    name: "cpu,cpuacct".into(),
                    path: path.into(),
                    cgns_prefix: None,
                }],
            }],
            controllers: vec![CgControllerEntry {
                cnames: vec!["cpu".into(), "cpuacct".into()],
                dirs: vec![CgroupDirEntry {
                    dir_name: dir.into(),
                    ..CgroupDirEntry::default()
                }],
                is_threaded: None,
            }],
            ..CgroupEntry::default()
        }
    }

    #[test]
    fn a_new_root_takes_the_place_of_the_old_one() {
        let root = |controller: Option<&str>, path: &str| CgroupRoot {
            controller: controller.map(str::to_string),
            path: path.to_string(),
        };
        let cases = [
            (vec![root(None, "/new")], "/old/a", "old", "/new/a", "/new"),
            (vec![root(None, "/new")], "/", "", "/new", "/new"),
            (vec![root(None, "/new")], "/older", "old", "/older", "old"),
            (
                vec![root(Some("cpuacct"), "/p"), root(None, "/n")],
                "/o",
                "o",
                "/p",
                "/p",
            ),
            (vec![root(Some("memory"), "/p")], "/o", "o", "/o", "o"),
        ];
        for (roots, path, dir, new_path, new_dir) in cases {
            let mut image = entry(path, dir);
            let options = CgroupOptions {
                roots,
                ..CgroupOptions::default()
            };
            change_roots(&mut image, &options);
            assert_eq!(image.sets[0].ctls[0].path, new_path);
            assert_eq!(image.controllers[0].dirs[0].dir_name, new_dir);
        }
    }
}
