//! The user namespace that a file system in memory or an overlay belongs to: whose root may mount it again with other options, and
//! who can have files there (`user_namespaces(7)`).
//!
//! Saved:    its number, a field of ours, of every file system in a mount namespace of another user namespace.
//! Rebuilt:  a process in that user namespace begins it, and files are made as its root. Needs: the user namespace.
//!           An overlay acts on its layers as who made it, for which that root stands.
//! Not kept: nothing; others show namespaces that tell it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use floe_image::messages::MntEntry;
use floe_kernel::acting::Acting;
use floe_kernel::mount::{FsOption, NewMountError, begin_inside, is_in_hands_of, mount_inside};
use floe_kernel::namespace::{Namespace, NsKind};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::model::shows_most;
use super::tree::NewFs;
use super::uncover::pristine;
use crate::collect::{CollectError, Collector};
use crate::namespace::{TreeNamespace, users};
use crate::restore::{Attempt, ExecuteError, TreeImages, World};

/// Stands for the user namespace of the dumping process.
const OURS: u32 = 0;

/// How these file systems are called.
const TMPFS: &str = "tmpfs";
const DEVPTS: &str = "devpts";
const OVERLAY: &str = "overlay";

fn has_owner(name: &str) -> bool {
    [TMPFS, DEVPTS, OVERLAY].contains(&name)
}

/// Completes the entries of a namespace.
pub fn note(
    entries: &mut [MntEntry],
    namespace: &TreeNamespace,
    collector: &Collector<'_>,
) -> Result<(), CollectError> {
    let Some(nearest) = users::around(&namespace.namespace) else {
        return Ok(());
    };
    let mut known: BTreeMap<u32, u32> = BTreeMap::new();
    for entry in entries.iter() {
        let is_kind = super::fs_name(entry).is_some_and(|name| has_owner(&name));
        let is_whole = entry.root == "/" || shows_most(entry, entries.iter());
        let is_new = is_kind && is_whole && entry.ext_key.is_none();
        if is_new && !known.contains_key(&entry.root_dev) {
            let owner = ask(entry, entries, (namespace, &nearest), collector)?;
            known.insert(entry.root_dev, owner);
        }
    }
    for entry in entries {
        entry.floe_user_ns = known.get(&entry.root_dev).copied();
    }
    Ok(())
}

/// The innermost user namespace that has rights over a file system, from that of its mounts outwards.
fn ask(
    entry: &MntEntry,
    all: &[MntEntry],
    (namespace, nearest): (&TreeNamespace, &Namespace),
    collector: &Collector<'_>,
) -> Result<u32, CollectError> {
    let system = |source| CollectError::System {
        action: format!("Asking whose the file system at {} is", entry.mountpoint),
        source,
    };
    let copy = pristine(entry, all, namespace, collector)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match rustix::fs::openat(&copy, ".", flags, Mode::empty()) {
        // A file is mounted, a part of what is not seen whole.
        Err(Errno::NOTDIR) => return Ok(OURS),
        opened => opened.map_err(|errno| system(errno.into()))?,
    };
    let mut at = Some(nearest.try_clone().map_err(system)?);
    while let Some(user) = at {
        if is_in_hands_of(&user, directory.as_fd()).map_err(system)? {
            let number = collector.namespaces().number(NsKind::User, user.identity());
            return Ok(number.unwrap_or(OURS));
        }
        at = users::around(&user);
    }
    Ok(OURS)
}

/// A user namespace of the tree, and as whom files are made in it.
#[derive(Clone, Debug)]
pub struct Owner {
    namespace: Rc<Namespace>,
    /// Its root, or its first user and group.
    first: (u32, u32),
    files_of: Option<(u32, u32)>,
}

impl Owner {
    /// All of the tree.
    pub fn all(world: &mut World<'_>) -> Result<BTreeMap<u32, Owner>, ExecuteError> {
        let images = world.images;
        let ids = images.users.ids();
        let owner = |id| {
            let owner = Owner {
                namespace: world.namespaces().get(id)?,
                first: images.users.map(Some(id)).first(),
                files_of: images.users.files_of(id),
            };
            Ok((id, owner))
        };
        ids.map(owner).collect()
    }

    /// Mounts a file system anew.
    pub fn mount(
        &self,
        fs: &NewFs,
        options: &[FsOption],
    ) -> Result<Result<OwnedFd, NewMountError>, ExecuteError> {
        let (name, made_by) = match fs.name.as_str() {
            DEVPTS => (c"devpts", None),
            OVERLAY => (c"overlay", Some(self.first)),
            _ => (c"tmpfs", None),
        };
        let begun = begin_inside(&self.namespace, name, false);
        let begun = begun.during("Beginning", || {
            format!("{} for {}", fs.name, fs.entry.mountpoint)
        })?;
        Ok(mount_inside(
            (&self.namespace, made_by),
            begun.as_fd(),
            options,
        ))
    }

    /// Has the coordinator make files as its root.
    pub fn files(&self) -> Result<Option<Acting>, ExecuteError> {
        let taken = self.files_of.map(|(uid, gid)| Acting::as_owner(uid, gid));
        let taken = taken.transpose();
        taken.during("Making files as", || format!("{:?}", self.files_of))
    }
}

/// Completes an entry of a namespace's images. Those of others do not tell: whoever owns the mount namespace has
/// mounted it; an overlay may be the engine's all the same.
pub fn complete(entry: &mut MntEntry, namespace: u32, images: &TreeImages) {
    let is_kind = super::fs_name(entry).is_some_and(|name| has_owner(&name) && name != OVERLAY);
    if is_kind && entry.floe_user_ns.is_none() {
        entry.floe_user_ns = Some(images.users.owner_of(namespace).unwrap_or(OURS));
    }
}
