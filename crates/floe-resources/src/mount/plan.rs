//! The steps that make the mounts of a tree.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;

use floe_image::messages::{MntEntry, RegFileEntry};
use floe_inject::{Arg, Program};
use floe_kernel::mount::set_flags;
use floe_kernel::namespace::{Home, Namespace, NsKind};
use floe_kernel::security::SecurityModule;
use floe_plan::Handle;
use rustix::fs::{Mode, OFlags};

use super::context;
use super::execute::{Places, Plan, Workshop};
use super::formats;
use super::groups::plan_groups;
use super::model::{attributes, below};
use super::new_fs::{content_image, has_files};
use super::owner::{self, Owner};
use super::remote::mount_in_task;
use super::seen;
use super::shown;
use super::sight::Wholes;
use super::tree::{MountTree, Origin, Request, Source, is_late, plan_tree};
use crate::cgroup::{self, groups_made};
use crate::namespace::{filled, ids, made, make_beside, of_root, own_of_root};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, TaskImages, TreeImages, World};

/// Made when every mount of the tree is in its place.
const COMPLETE: Handle = Handle::Object("mounts complete", 0);

/// The mounts in the making, until the last of them is attached.
#[derive(Default)]
struct Making(Option<Workshop>);

/// Adds the steps that make and fill all mount namespaces of the tree; see [`crate::namespace`]. Handles of those
/// beside the root's.
pub fn plan(planner: &mut Planner<'_>) -> Result<Vec<Handle>, PlanError> {
    let images = planner.images;
    let own = of_root(images);
    let root = own_of_root(images, NsKind::Mnt);
    let all = namespaces(images);
    if all.is_empty() {
        return Ok(Vec::new());
    }
    let others: Vec<u32> = all.iter().copied().filter(|id| Some(*id) != root).collect();
    let plan = Rc::new(Plan {
        tree: tree(images, root, planner)?,
        groups: Vec::new(),
        images: images.dir.clone(),
    });
    let groups = plan_groups(&plan.tree)?;
    let plan = Rc::new(Plan {
        groups,
        ..Rc::unwrap_or_clone(plan)
    });
    check_content(images, &plan.tree)?;
    let begun = shown::needs(images, &plan.tree)?;
    let shown: Vec<u32> = own
        .iter()
        .filter(|(kind, _)| matches!(kind, NsKind::Net | NsKind::Ipc))
        .map(|(_, id)| *id)
        .collect();
    let users: Vec<u32> = images.users.ids().collect();
    let seen: BTreeSet<u32> = plan.tree.sources.iter().filter_map(needed_by).collect();
    let needed = all.iter().chain(&shown).chain(&users).chain(&seen);
    let mut needs: Vec<Handle> = needed.map(|id| made(*id)).collect();
    // Parts of their hierarchies may be mounted.
    needs.extend(groups_made(planner)?);
    let makes: Vec<Handle> = all.iter().map(|id| filled(*id)).collect();
    let late = plan.tree.mounts.iter().any(|mount| mount.late);
    let name = format!("make {} mounts", plan.tree.mounts.len());
    let wanted = Rc::new(WantedPlaces {
        mount: all,
        shown,
        others: seen,
    });
    let places = Rc::clone(&wanted);
    planner.step_at_home(name, (&needs, &makes), move |world| {
        let places = find(world, &places)?;
        let mut workshop = Workshop::open(plan, world.namespaces().home()?)?;
        workshop.make_early(&places)?;
        workshop.take_masters().keep(world)?;
        world.state::<Wholes>().0 = workshop.wholes(world)?;
        if !late {
            return workshop.join_groups();
        }
        world.state::<Making>().0 = Some(workshop);
        Ok(())
    });
    plan_others(planner, &others);
    if late {
        plan_late(planner, begun, wanted)?;
    }
    Ok(others.into_iter().map(filled).collect())
}

/// Adds the step that mounts what only a task of the tree can mount, when the namespaces `begun` are there.
fn plan_late(
    planner: &mut Planner<'_>,
    begun: Vec<Handle>,
    places: Rc<WantedPlaces>,
) -> Result<(), PlanError> {
    let pid = planner.images.root().pid();
    let mut needs = begun;
    // The root task enters its cgroup namespace with its groups.
    if cgroup::own_begun(planner).is_some() {
        needs.push(cgroup::entered(pid));
    }
    planner.task_step(pid, "mount proc", (&needs, &[COMPLETE]), move |world| {
        let places = find(world, &places)?;
        let Some(mut workshop) = world.state::<Making>().0.take() else {
            return Ok(());
        };
        let mut mounted = BTreeMap::new();
        for (index, fs) in workshop.late_sources() {
            let mounter = shown::mounter(world.images, &fs.entry);
            let mount = mount_in_task(world, mounter, &fs)?;
            mounted.insert(index, mount);
        }
        workshop.make_late(&places, mounted)?;
        workshop.join_groups()
    });
    Ok(())
}

/// The numbers of [`Places`].
struct WantedPlaces {
    mount: Vec<u32>,
    shown: Vec<u32>,
    others: BTreeSet<u32>,
}

/// The namespace beside the root's that a new file system shows.
fn needed_by(source: &Source) -> Option<u32> {
    match &source.origin {
        Origin::New(fs) => seen::needed(&fs.entry),
        Origin::Host(_) => None,
    }
}

fn find(world: &mut World<'_>, wanted: &WantedPlaces) -> Result<Places, ExecuteError> {
    let namespaces = world.namespaces();
    let mut with_id = |id: &u32| Ok::<_, ExecuteError>((*id, namespaces.get(*id)?));
    let mount = wanted.mount.iter().map(&mut with_id);
    let mount = mount.collect::<Result<_, _>>()?;
    let others = wanted.others.iter().map(&mut with_id);
    let others = others.collect::<Result<_, _>>()?;
    let shown = wanted
        .shown
        .iter()
        .map(|id| namespaces.get(*id))
        .collect::<Result<_, _>>()?;
    let users = Owner::all(world)?;
    Ok(Places {
        mount,
        shown,
        others,
        users,
    })
}

/// The mount namespaces that tasks of the tree are in, but for the caller's.
fn namespaces(images: &TreeImages) -> Vec<u32> {
    let of_tasks = images.tasks.iter();
    let found: BTreeSet<u32> = of_tasks
        .filter_map(|task| namespace_of(images, task))
        .collect();
    found.into_iter().collect()
}

fn tree(
    images: &TreeImages,
    root: Option<u32>,
    planner: &Planner<'_>,
) -> Result<MountTree, PlanError> {
    let mut mounts = BTreeMap::new();
    let here = SecurityModule::active();
    for id in namespaces(images) {
        let mut entries = images.mounts.get(&id).cloned().unwrap_or_default();
        let instead = planner.options.lsm_mount_context.as_deref();
        for entry in &mut entries {
            entry.options = context::adapted(&entry.options, here, instead);
            owner::complete(entry, id, images);
        }
        mounts.insert(id, entries);
    }
    let has = |wanted| of_root(images).iter().any(|(kind, _)| *kind == wanted);
    plan_tree(&Request {
        namespaces: &mounts,
        root_namespace: root,
        own_pids: has(NsKind::Pid),
        own_cgroups: has(NsKind::Cgroup),
        own_users: has(NsKind::User),
        options: &planner.options.mounts,
        external: &planner.options.external,
    })
}

/// The content of every file system in memory must be there.
fn check_content(images: &TreeImages, tree: &MountTree) -> Result<(), PlanError> {
    for source in &tree.sources {
        let Origin::New(fs) = &source.origin else {
            continue;
        };
        if fs.name == formats::NAME {
            formats::decode(&images.dir, fs.entry.root_dev)?;
        }
        if has_files(fs) {
            let (kind, id) = content_image(&images.dir, fs.entry.root_dev, fs.entry.mnt_id);
            if !images.dir.has(kind, id) {
                return Err(PlanError::damaged(
                    format!("tmpfs-dev-{id}.tar.gz.img"),
                    format!("the files of {} are missing", fs.entry.mountpoint),
                ));
            }
        }
    }
    Ok(())
}

/// The mount namespace of a task; `None` for the caller's, and in images that are older than namespaces.
fn namespace_of(images: &TreeImages, task: &TaskImages) -> Option<u32> {
    let callers = of_caller(images)?;
    let own = ids::get(task.ids.as_ref()?, NsKind::Mnt);
    own.filter(|own| *own != callers)
}

fn of_caller(images: &TreeImages) -> Option<u32> {
    let host = images.inventory.root_ids.as_ref();
    host.and_then(|host| ids::get(host, NsKind::Mnt))
}

/// That a task is in its mount namespace; `None` for one that stays among the caller's mounts.
pub fn entered(images: &TreeImages, pid: u32) -> Option<Handle> {
    let task = images.task(pid)?;
    namespace_of(images, task).filter(|_| task.fs.is_some())?;
    Some(Handle::Object("in a mount namespace", u64::from(pid)))
}

/// Adds the steps that make the namespaces beside the root's, and lead tasks into them.
fn plan_others(planner: &mut Planner<'_>, others: &[u32]) {
    let images = planner.images;
    for id in others.iter().copied() {
        let name = format!("make mount namespace {id}");
        let needs: Vec<Handle> = images.users.owner_of(id).map(made).into_iter().collect();
        planner.step_at_home(name, (&needs, &[made(id)]), move |world| {
            make_beside(world, NsKind::Mnt, id)
        });
    }
    for task in &images.tasks {
        let pid = task.pid();
        // A zombie has left it.
        let (Some(id), Some(entered)) = (namespace_of(images, task), entered(images, pid)) else {
            continue;
        };
        let is_born_there = !others.contains(&id);
        let needs = [Handle::Tree, filled(id)];
        let name = "enter the mount namespace";
        planner.task_step(
            pid,
            name,
            (&needs, &[entered]),
            move |world| match is_born_there {
                true => Ok(()),
                false => enter(world, pid, id),
            },
        );
    }
}

fn enter(world: &mut World<'_>, pid: u32, id: u32) -> Result<(), ExecuteError> {
    let namespace = world.namespaces().get(id)?;
    let number = world.hand_over(pid, namespace.as_fd().as_raw_fd())?;
    let mut program = Program::new();
    let args = [Arg::from(number), Arg::from(libc::CLONE_NEWNS)];
    program.call(
        format!("setns to mount namespace {id}"),
        libc::SYS_setns,
        &args,
    );
    program.call("close", libc::SYS_close, &[Arg::from(number)]);
    world.run(pid, &program).map(drop)
}

/// The namespace and the entry of a mount.
pub(super) fn find_mount(images: &TreeImages, number: i32) -> Option<(u32, &MntEntry)> {
    let number = u32::try_from(number).ok()?;
    let mut all = images.mounts.iter();
    all.find_map(|(id, entries)| {
        let found = entries.iter().find(|entry| entry.mnt_id == number);
        found.map(|entry| (*id, entry))
    })
}

/// The namespace, beside the root's, that has the mount `number`.
fn other_namespace(images: &TreeImages, number: Option<i32>) -> Option<u32> {
    let (id, _) = find_mount(images, number?)?;
    let is_elsewhere = |id| id != own_of_root(images, NsKind::Mnt) && id != of_caller(images);
    is_elsewhere(Some(id)).then_some(id)
}

/// The way to where a file of mount `number` is found by its name, when that is not the root's namespace.
#[expect(clippy::type_complexity, reason = "the parts of a visit")]
pub fn way_to(
    world: &mut World<'_>,
    number: Option<i32>,
) -> Result<Option<(Rc<Home>, Rc<Namespace>)>, ExecuteError> {
    let Some(id) = other_namespace(world.images, number) else {
        return Ok(None);
    };
    let namespaces = world.namespaces();
    Ok(Some((namespaces.home()?, namespaces.get(id)?)))
}

/// Does something with a file of mount `number` by its name: in the namespace that has this mount.
pub fn in_place_of<T>(
    world: &mut World<'_>,
    number: Option<i32>,
    work: impl FnOnce(&mut World<'_>) -> Result<T, ExecuteError>,
) -> Result<T, ExecuteError> {
    let Some(id) = other_namespace(world.images, number) else {
        return work(world);
    };
    let done = world.in_namespace(id, |world| work(world));
    world.go_inside()?;
    done
}

/// What must be mounted before a file can be opened by its name.
pub fn needs_of_file(images: &TreeImages, file: &RegFileEntry) -> Vec<Handle> {
    let own = |kind| own_of_root(images, kind).is_some();
    let found = file.mnt_id.and_then(|number| find_mount(images, number));
    let mut at = found.map(|(_, entry)| entry);
    let mut steps = 0;
    while let Some(entry) = at {
        if entry.ext_key.is_none() && is_late(entry, own) {
            return vec![COMPLETE];
        }
        steps += 1;
        let parent = (entry.parent_mnt_id != entry.mnt_id && steps < 1000)
            .then_some(entry.parent_mnt_id.cast_signed());
        at = parent
            .and_then(|number| find_mount(images, number))
            .map(|(_, entry)| entry);
    }
    Vec::new()
}

/// A name in mount `from`, as it is in mount `to` of the same file system; `None` where both are the same or
/// the name is out of its sight.
pub fn seen_from(
    images: &TreeImages,
    name: &str,
    (from, to): (Option<i32>, Option<i32>),
) -> Option<String> {
    let (_, from) = find_mount(images, from?)?;
    let (_, to) = find_mount(images, to?)?;
    if from.mnt_id == to.mnt_id || from.root_dev != to.root_dev {
        return None;
    }
    let inside = join(&from.root, below(name, &from.mountpoint)?);
    Some(join(&to.mountpoint, below(&inside, &to.root)?))
}

pub(super) fn join(directory: &str, name: &str) -> String {
    let directory = directory.trim_end_matches('/');
    match name {
        "" if directory.is_empty() => "/".to_string(),
        "" => directory.to_string(),
        name => format!("{directory}/{name}"),
    }
}

/// A mount that files are made in for a moment, although it is read-only.
#[derive(Debug)]
pub struct Writable {
    mount: OwnedFd,
    flags: u32,
}

impl Writable {
    /// Lets the mount `number` be written to; `None` where it can be. The coordinator must be in its
    /// namespace.
    pub fn of(images: &TreeImages, number: Option<i32>) -> Result<Option<Self>, ExecuteError> {
        number
            .and_then(|number| find_mount(images, number))
            .filter(|(_, entry)| entry.flags & libc::MS_RDONLY as u32 != 0)
            .map(|(_, entry)| {
                let what = || entry.mountpoint.clone();
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                let mount = rustix::fs::open(entry.mountpoint.as_str(), flags, Mode::empty())
                    .during("Opening", what)?;
                let (set, clear) = attributes(entry.flags & !(libc::MS_RDONLY as u32));
                set_flags(mount.as_fd(), set, clear).during("Making writable", what)?;
                let flags = entry.flags;
                Ok(Writable { mount, flags })
            })
            .transpose()
    }
}

impl Drop for Writable {
    fn drop(&mut self) {
        let (set, clear) = attributes(self.flags);
        if let Err(error) = set_flags(self.mount.as_fd(), set, clear) {
            tracing::warn!(%error, "a mount of the tree is not read-only any more");
        }
    }
}
