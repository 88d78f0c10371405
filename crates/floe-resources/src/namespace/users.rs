//! User namespaces: who owns what, and with which rights (`user_namespaces(7)`).
//!
//! Saved:    the maps of uids and gids and the owner, outer ids as the dumping process sees them; the namespace
//!           around it; whether `setgroups` is denied; which namespaces of other kinds belong to it. Owners
//!           in other images are those that tasks in the root's user namespace see.
//! Rebuilt:  each is made by a process in the one around it, and its maps are written from there. Needs: nothing.
//!           Tasks are born in it where their pid namespace belongs to it ([`Users::birth_of`]), and enter it
//!           with their other state else ([`super::user_births`]): only outside have they the right to choose numbers.
//! Not kept: the group of its maker, which the kernel does not tell.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use floe_image::ImageKind;
use floe_image::messages::{PidnsEntry, UsernsEntry};
use floe_kernel::ids::HostPid;
use floe_kernel::namespace::{Namespace, NsKind, own_proc_path};
use floe_kernel::placeholder::{Placeholder, errand};
use floe_kernel::proc::{ProcDir, Status, parse_status};
use floe_plan::Handle;
use rustix::fs::{Mode, OFlags};

use super::{OwnerMap, TreeNamespace, host_number, ids, own_of_root};
use crate::collect::{CollectError, Collector};
use crate::restore::{Attempt, ExecuteError, PlanError, TaskImages, TreeImages, World};

/// The kernel allows no more within each other (`create_user_ns`).
const MAX_DEPTH: usize = 33;

/// The user namespace that owns another namespace, or that is around a user namespace; `None` for ours, and for
/// what is out of our sight.
pub(crate) fn around(namespace: &Namespace) -> Option<Namespace> {
    let around = match namespace.kind() {
        NsKind::User => namespace.parent(),
        _ => namespace.owner(),
    };
    let own = Namespace::own(NsKind::User).ok()?.identity();
    around.ok().filter(|around| around.identity() != own)
}

/// Writes the image of a namespace.
pub(super) fn collect(
    namespace: &TreeNamespace,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let failed = |source| CollectError::Task {
        pid: namespace.member,
        action: "Looking into the user namespace",
        source,
    };
    let identity = namespace.namespace.identity();
    let is_in_it = Namespace::of_task(namespace.member, NsKind::User);
    // What nobody of the tree is in shows its maps to who goes there.
    let visitor = match is_in_it.map_err(failed)?.identity() == identity {
        true => None,
        false => Some(Placeholder::start_inside(&namespace.namespace, &[]).map_err(failed)?),
    };
    let inside = visitor.as_ref().map_or(namespace.member, Placeholder::pid);
    let inside = ProcDir::open(inside)?;
    let maps = OwnerMap::of_task(&inside)?;
    let namespaces = collector.namespaces();
    let number = |around: Namespace| namespaces.number(NsKind::User, around.identity());
    let belongs = |other: &&std::rc::Rc<TreeNamespace>| {
        other.kind() != NsKind::User
            && around(&other.namespace).is_some_and(|owner| owner.identity() == identity)
    };
    let entry = UsernsEntry {
        floe_setgroups_denied: (inside.read("setgroups")?.trim_ascii() == b"deny").then_some(true),
        floe_parent: around(&namespace.namespace).and_then(number),
        floe_owner: Some(namespace.namespace.owner_uid().map_err(failed)?),
        floe_owned: namespaces
            .all()
            .iter()
            .filter(belongs)
            .map(|it| it.id)
            .collect(),
        ..maps.entry().cloned().unwrap_or_default()
    };
    Ok(collector
        .writer()
        .write_one(ImageKind::Userns, u64::from(namespace.id), &entry)?)
}

/// What keeps a task from coming into its user namespace again, and the remedy; see [`super::user_births`].
pub(super) fn obstacle(
    task: &ProcDir,
    collector: &Collector<'_>,
) -> Result<Option<(&'static str, &'static str)>, CollectError> {
    let namespaces = collector.namespaces();
    if !namespaces
        .all()
        .iter()
        .any(|known| known.kind() == NsKind::User)
    {
        return Ok(None);
    }
    let Some((first, birth)) = birth(task, collector)? else {
        return Ok(None);
    };
    let mut at = Namespace::of_task(task.pid(), NsKind::User).ok();
    while let Some(outer) = at.as_ref().filter(|at| at.identity() != birth.identity()) {
        at = around(outer);
    }
    if at.is_none() {
        return Ok(Some((
            "a user namespace out of that of its pid namespace",
            "end this task first: no task that is born there gets out",
        )));
    }
    let first = ProcDir::open(first)?;
    let denies = first.read("setgroups")?.trim_ascii() == b"deny";
    if denies && status(&first)?.groups != status(task)?.groups {
        return Ok(Some((
            "other groups than the first task of its pid namespace, and a user namespace that denies setgroups",
            "end this task first: nobody can give it these groups there",
        )));
    }
    Ok(None)
}

/// Which task brings this one into a user namespace by its birth, and into which.
fn birth(
    task: &ProcDir,
    collector: &Collector<'_>,
) -> Result<Option<(HostPid, Namespace)>, CollectError> {
    let (pids, namespaces) = (collector.pids(), collector.namespaces());
    let mut at = Some(task.pid());
    while let Some(pid) = at {
        let process = ProcDir::open(pid)?;
        let parent = status(&process)?.ppid;
        at = parent.filter(|parent| collector.is_in_tree(*parent));
        let begins_tree = at.is_none() && pids.is_foreign() && pids.number(pid) == 1;
        if begins_tree || pids.nested(pid).last() == Some(&1) {
            let begun = namespaces.identity(&process, NsKind::Pid)?;
            let begun = begun.and_then(|begun| namespaces.find(NsKind::Pid, begun));
            if let Some(owner) = begun.and_then(|begun| around(&begun.namespace)) {
                return Ok(Some((pid, owner)));
            }
        }
    }
    Ok(None)
}

fn status(process: &ProcDir) -> Result<Status, CollectError> {
    let text = process.read_record("status")?;
    Ok(parse_status(&text).map_err(|error| process.bad(error))?)
}

/// A user namespace of the tree.
#[derive(Clone, Debug)]
pub struct UserNamespace {
    /// The one around it; `None` for the coordinator's.
    pub parent: Option<u32>,
    /// Who its users and groups are for the coordinator.
    pub map: OwnerMap,
    /// Whether nobody inside may change groups.
    pub denies_groups: bool,
    /// Who made it, as the coordinator sees it.
    pub(super) owner: Option<u32>,
}

/// The user namespaces of a tree.
#[derive(Clone, Debug, Default)]
pub struct Users {
    all: BTreeMap<u32, UserNamespace>,
    /// The root task's, where it is not the coordinator's.
    of_root: Option<u32>,
    /// The user namespaces of others that do not belong to the coordinator's.
    owners: BTreeMap<u32, u32>,
    /// Those of the tasks.
    of_tasks: BTreeMap<u32, u32>,
    /// Those that tasks are born in.
    births: BTreeMap<u32, u32>,
    /// One that the caller gives.
    joined: Option<u32>,
}

impl Users {
    /// Reads all of them, and where tasks are born.
    pub fn read(images: &TreeImages) -> Result<Self, PlanError> {
        let host = images.inventory.root_ids.as_ref();
        let host = host.and_then(|host| ids::get(host, NsKind::User));
        let mut users = Users::default();
        for task in &images.tasks {
            let number = task
                .ids
                .as_ref()
                .and_then(|own| ids::get(own, NsKind::User));
            if let Some(number) = number.filter(|number| host.is_some_and(|host| host != *number)) {
                users.of_tasks.insert(task.pid(), number);
            }
        }
        users.of_root = users.of_task(images.root().pid());
        let mut waiting: Vec<u32> = users.of_tasks.values().copied().collect();
        while let Some(id) = waiting.pop() {
            if users.all.contains_key(&id) {
                continue;
            }
            let entry: UsernsEntry = images.dir.read_one(ImageKind::Userns, u64::from(id))?;
            waiting.extend(entry.floe_parent);
            let owned = entry.floe_owned.iter();
            users.owners.extend(owned.map(|owned| (*owned, id)));
            let user = UserNamespace {
                parent: entry.floe_parent,
                denies_groups: entry.floe_setgroups_denied == Some(true),
                owner: entry.floe_owner,
                map: OwnerMap::from_image(Some(entry)),
            };
            users.all.insert(id, user);
        }
        let too_deep = |id: &&u32| users.line(Some(**id)).len() >= MAX_DEPTH;
        if let Some(id) = users.all.keys().find(too_deep) {
            let image = ImageKind::Userns.file_name(u64::from(*id));
            return Err(PlanError::damaged(image, "it lies within itself"));
        }
        users.find_births(images)?;
        Ok(users)
    }

    /// Puts a user namespace that is there already in place of the root's; see [`super::joined_users`].
    pub(super) fn join(
        &mut self,
        images: &TreeImages,
        mut joined: UserNamespace,
    ) -> Result<(), PlanError> {
        let id = self.number_of_root(images);
        // Whether other namespaces say whom they belong to.
        joined.owner = self.all.get(&id).map_or(Some(0), |before| before.owner);
        if self.of_root.is_none() {
            let all = images.tasks.iter().map(TaskImages::pid);
            let outside: Vec<u32> = all.filter(|pid| self.of_task(*pid).is_none()).collect();
            self.of_tasks.extend(outside.iter().map(|pid| (*pid, id)));
        }
        self.move_inner(id, &joined.map)?;
        self.all.insert(id, joined);
        (self.of_root, self.joined) = (Some(id), Some(id));
        self.find_births(images)
    }

    /// Takes the tree out of the root's user namespace, into the coordinator's.
    pub(super) fn leave_root(&mut self, images: &TreeImages) -> Result<(), PlanError> {
        let Some(id) = self.of_root else {
            return Ok(());
        };
        self.move_inner(id, &OwnerMap::default())?;
        self.of_root = None;
        self.all.remove(&id);
        self.of_tasks.retain(|_, user| *user != id);
        self.owners.retain(|_, user| *user != id);
        for inner in self.all.values_mut() {
            inner.parent = inner.parent.filter(|parent| *parent != id);
        }
        self.find_births(images)
    }

    /// Gives all within the root's the owners that they have within `to`, which is now in its place.
    fn move_inner(&mut self, root: u32, to: &OwnerMap) -> Result<(), PlanError> {
        let from = self.of_root();
        let within = |id: &u32| *id != root && self.reaches(self.of_root, Some(*id));
        let within: Vec<u32> = self.ids().filter(within).collect();
        for (id, inner) in self.all.iter_mut().filter(|(id, _)| within.contains(id)) {
            let owner = inner.owner.and_then(|uid| from.has_uid(uid));
            inner.owner = owner.map(|uid| to.uid_outside(uid));
            inner.parent = inner.parent.or(Some(root));
            let moved = inner.map.moved(&from, to);
            inner.map = moved.ok_or_else(|| PlanError::Unsupported {
                object: format!("User namespace {id} within the one that is joined"),
                remedy: "that has no names for its users and groups; join one with wider maps",
            })?;
        }
        Ok(())
    }

    /// The number in the images of the root's user namespace.
    pub(super) fn number_of_root(&self, images: &TreeImages) -> u32 {
        let named = images.root().ids.as_ref();
        let named = named.and_then(|own| ids::get(own, NsKind::User));
        self.of_root
            .or(named)
            .unwrap_or_else(|| host_number(NsKind::User))
    }

    /// The one that the caller gives.
    pub(super) fn joined(&self) -> Option<u32> {
        self.joined
    }

    /// Whoever begins a pid namespace is born in the user namespace that it belongs to, and so are all below.
    fn find_births(&mut self, images: &TreeImages) -> Result<(), PlanError> {
        let mut births: BTreeMap<u32, u32> = BTreeMap::new();
        for (index, task) in images.tasks.iter().enumerate() {
            let pid = task.pid();
            let begins = match index {
                0 => begun_by_root(images)?,
                _ => {
                    let own = images.nested.namespace_of(pid);
                    own.filter(|own| images.nested.first_of(*own) == Some(pid))
                }
            };
            let owner = begins.and_then(|begun| self.owner_of(begun));
            let inherited = births.get(&task.entry.ppid).copied().filter(|_| index > 0);
            if let Some(birth) = owner.or(inherited) {
                births.insert(pid, birth);
            }
        }
        self.births = births;
        Ok(())
    }

    /// Who users and groups of the root's are for the coordinator.
    pub fn of_root(&self) -> OwnerMap {
        self.map(self.of_root)
    }

    /// The one that a task is born in; `None` for the coordinator's.
    pub fn birth_of(&self, pid: u32) -> Option<u32> {
        self.births.get(&pid).copied()
    }

    /// Their numbers.
    pub fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.all.keys().copied()
    }

    /// Whether all are in the coordinator's.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The one that a task is in; `None` for the coordinator's.
    pub fn of_task(&self, pid: u32) -> Option<u32> {
        self.of_tasks.get(&pid).copied()
    }

    /// One of them.
    pub fn get(&self, id: u32) -> Option<&UserNamespace> {
        self.all.get(&id)
    }

    /// Who users and groups are for the coordinator.
    pub fn map(&self, id: Option<u32>) -> OwnerMap {
        let user = id.and_then(|id| self.all.get(&id));
        user.map_or_else(OwnerMap::default, |user| user.map.clone())
    }

    /// As whom files are made in its file systems, as the coordinator sees them; `None` where it has no users.
    pub fn files_of(&self, id: u32) -> Option<(u32, u32)> {
        let map = &self.all.get(&id)?.map;
        let (uid, gid) = map.first();
        let (uid, gid) = (map.uid_outside(uid), map.gid_outside(gid));
        (map.has_uid(uid).is_some() && map.has_gid(gid).is_some()).then_some((uid, gid))
    }

    /// The one that another namespace of the tree belongs to; `None` for the coordinator's.
    pub fn owner_of(&self, namespace: u32) -> Option<u32> {
        let named = self.owners.get(&namespace).copied();
        named.or_else(|| {
            // Images of others say nothing: all is the root's.
            let root = self.of_root?;
            self.all.get(&root)?.owner.is_none().then_some(root)
        })
    }

    /// Those around this one, itself first.
    fn line(&self, id: Option<u32>) -> Vec<u32> {
        let parent = |id: &u32| self.all.get(id)?.parent;
        std::iter::successors(id, parent).take(MAX_DEPTH).collect()
    }

    /// Whether who has all rights in `from` has them in `id`: it is the same, or around it.
    pub fn reaches(&self, from: Option<u32>, id: Option<u32>) -> bool {
        from.is_none_or(|from| self.line(id).contains(&from))
    }

    /// All of them, those around others first.
    fn outermost_first(&self) -> Vec<u32> {
        let mut all: Vec<u32> = self.all.keys().copied().collect();
        all.sort_by_key(|id| self.line(Some(*id)).len());
        all
    }
}

/// The pid namespace that the root is the first task of, if it is made anew.
fn begun_by_root(images: &TreeImages) -> Result<Option<u32>, PlanError> {
    let Some(own) = own_of_root(images, NsKind::Pid) else {
        return Ok(None);
    };
    let entry: Option<PidnsEntry> = images.dir.read_optional(ImageKind::Pidns, u64::from(own))?;
    let is_given = entry.is_some_and(|entry| entry.ext_key.is_some());
    Ok((!is_given).then_some(own))
}

/// Makes all of them but the one that is joined.
pub(super) fn make_all(world: &mut World<'_>) -> Result<(), ExecuteError> {
    let users = &world.images.users;
    let mut made = users.outermost_first();
    made.retain(|id| users.joined != Some(*id));
    for id in made {
        let Some(user) = users.get(id) else { continue };
        make_one(world, id, user)?;
    }
    Ok(())
}

/// The handles of all of them.
pub(super) fn all_made(images: &TreeImages) -> Vec<Handle> {
    images.users.all.keys().map(|id| super::made(*id)).collect()
}

fn make_one(world: &mut World<'_>, id: u32, user: &UserNamespace) -> Result<(), ExecuteError> {
    let what = || format!("user namespace {id}");
    let around = world.images.users.map(user.parent);
    let parent = match user.parent {
        Some(parent) => Some(world.namespaces().get(parent)?),
        None => None,
    };
    let parent = parent.as_deref();
    let (uid, gid) = owner(user, &around);
    let maker = Placeholder::start_in_new_users(parent, (uid, gid)).during("Making", what)?;
    let pid = maker.pid();
    if user.denies_groups {
        write(None, pid, "setgroups", "deny")?;
    }
    if let Some((uids, gids)) = user.map.texts(&around) {
        write(parent, pid, "uid_map", &uids)?;
        write(parent, pid, "gid_map", &gids)?;
    }
    let made = Namespace::of_task(pid, NsKind::User).during("Opening the new", what)?;
    world.namespaces().keep(id, made);
    Ok(())
}

/// As whom it is made, as they are known in the one around it.
fn owner(user: &UserNamespace, around: &OwnerMap) -> (u32, u32) {
    let (first_uid, first_gid) = match around.entry() {
        Some(_) => around.first(),
        None => (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        ),
    };
    let uid = user.owner.and_then(|uid| around.has_uid(uid));
    (uid.unwrap_or(first_uid), first_gid)
}

/// Writes a map: the kernel wants it from somebody in the namespace around. An empty one is as it is.
fn write(
    around: Option<&Namespace>,
    pid: HostPid,
    name: &str,
    text: &str,
) -> Result<(), ExecuteError> {
    if text.is_empty() {
        return Ok(());
    }
    let path = own_proc_path(&format!("{pid}/{name}"));
    let file = std::ffi::CString::new(path.clone()).expect("a path of digits and letters");
    let write = || {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(file.as_c_str(), flags, Mode::empty())?;
        rustix::io::write(file.as_fd(), text.as_bytes())?;
        Ok(0)
    };
    let written = match around {
        None => write(),
        Some(around) => errand(around, write),
    };
    written
        .map(drop)
        .during("Writing the map of owners to", || path)
}
