//! Mounts as rustix has them not: `mount_setattr(2)`, sharing groups, detached copies.
//!
//! Contract relied on: `mount_setattr(2)` reads `size` bytes of its `struct mount_attr` and writes
//! nothing; with `AT_EMPTY_PATH` and an empty path it acts on the mount whose root the descriptor is.
//! A file system belongs to the user namespace of who calls `fsopen(2)`; who does the rest does not matter.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags,
};

use crate::namespace::{Namespace, NsKind, unshare};
use crate::placeholder::{become_user, errand, errand_among};

/// How mounts and unmounts below a mount reach others (mount_namespaces(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    Private,
    Slave,
    Shared,
    Unbindable,
}

impl Propagation {
    fn flag(self) -> u64 {
        match self {
            Propagation::Private => libc::MS_PRIVATE,
            Propagation::Slave => libc::MS_SLAVE,
            Propagation::Shared => libc::MS_SHARED,
            Propagation::Unbindable => libc::MS_UNBINDABLE,
        }
    }
}

/// Whether a change is made to one mount, or to all below it as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    One,
    Tree,
}

/// `struct mount_attr` (mount_setattr(2)).
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

fn set_attributes(mount: BorrowedFd<'_>, reach: Reach, attr: &MountAttr) -> io::Result<()> {
    let recursive = match reach {
        Reach::One => 0,
        Reach::Tree => libc::AT_RECURSIVE,
    };
    // SAFETY: the path is a string with its end, `attr` lives through the call and has the size that
    // is given; the kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets how mounts propagate. The mount must be in the caller's mount namespace, or in none.
pub fn set_propagation(mount: BorrowedFd<'_>, reach: Reach, how: Propagation) -> io::Result<()> {
    let attr = MountAttr {
        propagation: how.flag(),
        ..MountAttr::default()
    };
    set_attributes(mount, reach, &attr)
}

/// Sets and clears flags of one mount; the way of keeping access times is always set anew.
pub fn set_flags(
    mount: BorrowedFd<'_>,
    set: MountAttrFlags,
    clear: MountAttrFlags,
) -> io::Result<()> {
    let attr = MountAttr {
        set: u64::from(set.bits()),
        clear: u64::from((clear | MountAttrFlags::MOUNT_ATTR__ATIME).bits()),
        ..MountAttr::default()
    };
    set_attributes(mount, Reach::One, &attr)
}

/// A copy of the mount that `path` is on, without what is mounted below it; its root is `path`.
/// It belongs to no namespace until it is attached, and goes with its last descriptor.
pub fn copy_mount(at: BorrowedFd<'_>, path: &[u8]) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if path.is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    Ok(rustix::mount::open_tree(
        at,
        path,
        flags | OpenTreeFlags::AT_NO_AUTOMOUNT,
    )?)
}

/// As [`copy_mount`], by a name seen from the calling thread.
pub fn copy_mount_at(path: &std::path::Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(rustix::mount::open_tree(CWD, path, flags)?)
}

/// Attaches a mount to the directory or file `target`, on top of what is mounted there.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    move_mount(mount, target, MoveMountFlags::empty())
}

/// Puts the private mount `to` into the sharing group of `from`, a mount of the same file system
/// whose root is that of `to` or above it (Linux 5.15).
pub fn join_group(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    move_mount(from, to, MoveMountFlags::MOVE_MOUNT_SET_GROUP)
}

fn move_mount(from: BorrowedFd<'_>, to: BorrowedFd<'_>, flags: MoveMountFlags) -> io::Result<()> {
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(from, "", to, "", flags | empty)?)
}

/// One option of a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FsOption {
    Flag(String),
    Text(String, String),
}

/// Mounts a file system anew; the mount belongs to no namespace until it is attached.
///
/// # Errors
/// Those of fsopen(2), fsconfig(2) and fsmount(2), and the option that was refused where it was one.
pub fn new_mount(fs_type: &str, options: &[FsOption]) -> Result<OwnedFd, NewMountError> {
    let context = rustix::mount::fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|errno| NewMountError::Call("fsopen", errno.into()))?;
    mount_of_context(context.as_fd(), options)
}

/// As [`new_mount`], of what `fsopen` has begun; it may have been called by another task, whose namespaces
/// the file system then shows.
pub fn mount_of_context(
    context: BorrowedFd<'_>,
    options: &[FsOption],
) -> Result<OwnedFd, NewMountError> {
    set_options(context, options)?;
    rustix::mount::fsconfig_create(context)
        .map_err(|errno| NewMountError::Call("fsconfig", errno.into()))?;
    mount_of_created(context)
}

/// As [`mount_of_context`], of what [`begin_inside`] has begun, made there too: some have files of their own, which
/// are then of who has all rights there. Others act for ever as who made them: `made_by`, a user and a group as they
/// are known there.
pub fn mount_inside(
    (user, made_by): (&Namespace, Option<(u32, u32)>),
    context: BorrowedFd<'_>,
    options: &[FsOption],
) -> Result<OwnedFd, NewMountError> {
    set_options(context, options)?;
    errand(user, || {
        if let Some((uid, gid)) = made_by {
            become_user(uid, gid)?;
        }
        Ok(rustix::mount::fsconfig_create(context).map(|()| 0)?)
    })
    .map_err(|error| NewMountError::Call("fsconfig", error))?;
    mount_of_created(context)
}

fn set_options(context: BorrowedFd<'_>, options: &[FsOption]) -> Result<(), NewMountError> {
    for option in options {
        let set = match option {
            FsOption::Flag(key) => rustix::mount::fsconfig_set_flag(context, key.as_str()),
            FsOption::Text(key, value) => {
                rustix::mount::fsconfig_set_string(context, key.as_str(), value.as_str())
            }
        };
        set.map_err(|errno| NewMountError::Option(option.clone(), errno.into()))?;
    }
    Ok(())
}

/// Begins a file system that shows a pid namespace, for [`mount_of_context`].
pub fn begin_among(pids: &Namespace, fs_type: &CStr) -> io::Result<OwnedFd> {
    let context = errand_among(pids, || {
        let context = rustix::mount::fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC)?;
        Ok(context.into_raw_fd())
    })?;
    // SAFETY: the process has opened it for us in our own table, and has ended.
    Ok(unsafe { OwnedFd::from_raw_fd(context) })
}

/// Begins a file system that belongs to a user namespace, for [`mount_of_context`]; with `create` it is made there
/// as well, without options, for [`mount_of_created`].
pub fn begin_inside(user: &Namespace, fs_type: &CStr, create: bool) -> io::Result<OwnedFd> {
    let context = errand(user, || {
        // Only in a mount namespace of that user namespace there is the right to.
        unshare(NsKind::Mnt.flag())?;
        let context = rustix::mount::fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC)?;
        if create {
            rustix::mount::fsconfig_create(context.as_fd())?;
        }
        Ok(context.into_raw_fd())
    })?;
    // SAFETY: the process has opened it for us in our own table, and has ended.
    Ok(unsafe { OwnedFd::from_raw_fd(context) })
}

/// Whether who has all rights in a user namespace has them over a file system without files on disk, by a directory
/// of it: the kernel asks that first of who wants to freeze it, and then refuses as it cannot be frozen.
pub fn is_in_hands_of(user: &Namespace, directory: BorrowedFd<'_>) -> io::Result<bool> {
    /// `FIFREEZE` (ioctl_fsfreeze).
    const FREEZE: libc::Ioctl = 0xc004_5877;
    /// `FITHAW`.
    const THAW: libc::Ioctl = 0xc004_5878;
    let asked = errand(user, || {
        // SAFETY: neither request reads or writes memory.
        if unsafe { libc::ioctl(directory.as_raw_fd(), FREEZE, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        unsafe { libc::ioctl(directory.as_raw_fd(), THAW, 0) };
        Ok(0)
    });
    match asked {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(false),
        Err(error) => Err(error),
    }
}

/// As [`mount_of_context`], of a file system that is made already.
pub fn mount_of_created(context: BorrowedFd<'_>) -> Result<OwnedFd, NewMountError> {
    rustix::mount::fsmount(
        context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .map_err(|errno| NewMountError::Call("fsmount", errno.into()))
}

/// Why [`new_mount`] failed.
#[derive(Debug)]
pub enum NewMountError {
    /// This call.
    Call(&'static str, io::Error),
    /// This option was refused.
    Option(FsOption, io::Error),
}

/// Changes options of a mounted file system, the first of them being a flag such as `ro`.
pub fn reconfigure(mount: BorrowedFd<'_>, flag: &str) -> io::Result<()> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let context = rustix::mount::fspick(mount, "", flags)?;
    rustix::mount::fsconfig_set_flag(context.as_fd(), flag)?;
    Ok(rustix::mount::fsconfig_reconfigure(context.as_fd())?)
}
