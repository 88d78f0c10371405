//! Seeing all of a mount's file system, whatever is mounted on it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use floe_image::messages::MntEntry;
use floe_kernel::mount::{Propagation, Reach, copy_mount, set_propagation};
use floe_kernel::namespace::{Namespace, NsKind, Visit, unshare};
use floe_kernel::placeholder::Placeholder;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::collect::mountinfo_of_this_thread;
use super::model::kernel_device;
use super::tree::attach_order;
use crate::collect::{CollectError, Collector};
use crate::namespace::TreeNamespace;

/// A copy of a mount on which nothing else is mounted.
pub fn pristine(
    entry: &MntEntry,
    all: &[MntEntry],
    namespace: &TreeNamespace,
    collector: &Collector<'_>,
) -> Result<OwnedFd, CollectError> {
    let system = |source: std::io::Error| CollectError::System {
        action: format!("Copying the mount {}", entry.mountpoint),
        source,
    };
    let visit = collector.namespaces().visit(&[namespace])?;
    let unbindable = entry.flags & libc::MS_UNBINDABLE as u32 != 0;
    // Where its point is hidden as well, the name leads nowhere.
    if let Ok(seen) = open_mount(&entry.mountpoint)
        && !unbindable
        && mount_id(seen.as_fd()) == Ok(u64::from(entry.mnt_id))
    {
        match copy_mount(seen.as_fd(), b"") {
            // Something is mounted on it that may not be taken away.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            copied => return copied.map_err(system),
        }
    }
    if belongs_to_other_users(namespace) {
        drop(visit);
        if let Some(copy) = copy_of_ours(entry, collector)? {
            return Ok(copy);
        }
        let visit = collector.namespaces().visit(&[namespace])?;
        return uncover(entry, all, (namespace, visit)).map_err(system);
    }
    uncover(entry, all, (namespace, visit)).map_err(system)
}

fn belongs_to_other_users(namespace: &TreeNamespace) -> bool {
    let own = Namespace::own(NsKind::User).map(|own| own.identity());
    let owner = namespace.namespace.owner().map(|owner| owner.identity());
    own.ok() != owner.ok()
}

/// The copy of a mount of ours of the same file system. What came with a user namespace cannot be taken apart
/// there, but here it can.
fn copy_of_ours(
    entry: &MntEntry,
    collector: &Collector<'_>,
) -> Result<Option<OwnedFd>, CollectError> {
    for ours in mountinfo_of_this_thread(collector)? {
        let is_same = kernel_device(ours.dev_major, ours.dev_minor) == entry.root_dev
            && ours.root == entry.root.as_bytes();
        let Ok(point) = String::from_utf8(ours.point) else {
            continue;
        };
        if is_same
            && let Ok(seen) = open_mount(&point)
            && mount_id(seen.as_fd()) == Ok(ours.id as u64)
            && let Ok(copy) = copy_mount(seen.as_fd(), b"")
        {
            return Ok(Some(copy));
        }
    }
    Ok(None)
}

/// As [`pristine`], for a mount that others hide or that cannot be copied by itself: a copy of the
/// namespace is made, and the others are taken away there.
fn uncover(
    entry: &MntEntry,
    all: &[MntEntry],
    (namespace, mut visit): (&TreeNamespace, Visit),
) -> std::io::Result<OwnedFd> {
    // In a copy that belonged to another user namespace, no mount could be taken away from another.
    let keeper = match namespace.namespace.owner() {
        Ok(owner) if belongs_to_other_users(namespace) => {
            let copy = Placeholder::start_inside(&owner, &[NsKind::Mnt])?;
            visit.enter(&Namespace::of_task(copy.pid(), NsKind::Mnt)?)?;
            Some(copy)
        }
        _ => {
            unshare(NsKind::Mnt.flag())?;
            None
        }
    };
    let root = open_mount("/")?;
    set_propagation(root.as_fd(), Reach::Tree, Propagation::Private)?;
    let order = attach_order(0, all).unwrap_or_default();
    for other in order.iter().rev() {
        if other.mnt_id == entry.mnt_id {
            let seen = open_mount(&entry.mountpoint)?;
            return copy_mount(seen.as_fd(), b"");
        }
        if other.mountpoint != "/" {
            let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
            match rustix::mount::unmount(other.mountpoint.as_str(), flags) {
                // It came with the user namespace; the copy below fails if it hides something.
                Err(Errno::INVAL) if keeper.is_some() => {}
                other => other?,
            }
        }
    }
    Err(Errno::NOENT.into())
}

/// Opens the mount that a path leads to.
pub fn open_mount(path: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty())
}

/// The number of the mount that a file was opened on.
pub fn mount_id(file: BorrowedFd<'_>) -> Result<u64, Errno> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    Ok(stat.stx_mnt_id)
}
