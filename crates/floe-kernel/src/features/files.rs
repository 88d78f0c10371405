//! Probes of files, mounts, namespaces and control groups.
//!
//! Kernel contract: unknown flags are EINVAL before any handle is looked at (EBADF), so bad
//! handles make mount calls harmless.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::ProbeContext;
use super::process::errno;
use crate::security::APPARMOR_POLICY;

/// For what is a matter of the engine and not of the kernel.
pub(super) fn always(_: &ProbeContext) -> bool {
    true
}

fn fdinfo(fd: BorrowedFd<'_>) -> String {
    fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap_or_default()
}

fn memfd() -> Option<OwnedFd> {
    rustix::fs::memfd_create("floe-probe", rustix::fs::MemfdFlags::CLOEXEC).ok()
}

pub(super) fn fdinfo_mnt_id(_: &ProbeContext) -> bool {
    use std::os::fd::AsFd;
    memfd().is_some_and(|fd| fdinfo(fd.as_fd()).contains("mnt_id:"))
}

pub(super) fn fdinfo_locks(_: &ProbeContext) -> bool {
    use std::os::fd::AsFd;
    let Some(fd) = memfd() else { return false };
    rustix::fs::flock(&fd, rustix::fs::FlockOperation::LockExclusive).is_ok()
        && fdinfo(fd.as_fd()).contains("lock:")
}

/// `clockid:` in fdinfo, and TFD_IOC_SET_TICKS, which refuses zero ticks with EINVAL but an
/// unknown request with ENOTTY.
pub(super) fn timerfd_fdinfo(_: &ProbeContext) -> bool {
    use std::os::fd::AsFd;
    const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
    // SAFETY: no pointers; a good result is a new descriptor.
    let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC) };
    if fd < 0 {
        return false;
    }
    // SAFETY: checked to be a new descriptor that nobody else owns.
    let timer = unsafe { OwnedFd::from_raw_fd(fd) };
    let ticks = 0u64;
    // SAFETY: the kernel reads one u64 from `ticks`.
    let set = unsafe { libc::ioctl(timer.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) };
    let known = set == 0 || errno() == libc::EINVAL;
    known && fdinfo(timer.as_fd()).contains("clockid:")
}

pub(super) fn openat2(_: &ProbeContext) -> bool {
    use rustix::fs::{Mode, OFlags, ResolveFlags};
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat2(
        rustix::fs::CWD,
        "/",
        flags,
        Mode::empty(),
        ResolveFlags::NO_MAGICLINKS,
    )
    .is_ok()
}

/// Bad handles with a known flag are EBADF.
pub(super) fn move_mount_set_group(_: &ProbeContext) -> bool {
    const EMPTY_PATHS_AND_SET_GROUP: libc::c_long = 0x4 | 0x40 | 0x100;
    let empty = c"".as_ptr();
    // SAFETY: both names are literals; the handles are no descriptors, so nothing is moved.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            -1,
            empty,
            -1,
            empty,
            EMPTY_PATHS_AND_SET_GROUP,
        )
    };
    result < 0 && errno() == libc::EBADF
}

/// Asks for an attribute on a bad handle.
pub(super) fn mount_setattr(_: &ProbeContext) -> bool {
    const MOUNT_ATTR_RDONLY: u64 = 1;
    let attributes = [MOUNT_ATTR_RDONLY, 0, 0, 0];
    let (flags, size) = (
        libc::AT_EMPTY_PATH as libc::c_long,
        mem::size_of_val(&attributes),
    );
    let (empty, pointer) = (c"".as_ptr(), attributes.as_ptr());
    // SAFETY: `attributes` is laid out as struct mount_attr (four u64); the handle is none.
    let result = unsafe { libc::syscall(libc::SYS_mount_setattr, -1, empty, flags, pointer, size) };
    result < 0 && errno() == libc::EBADF
}

/// Where cgroup2 is mounted, by /proc/self/mountinfo.
fn cgroup2_mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        right
            .starts_with("cgroup2 ")
            .then(|| left.split(' ').nth(4).map(PathBuf::from))
            .flatten()
    })
}

/// `cgroup.freeze` exists in every group but the root, so a group of our own is made for a
/// moment where there is no other.
pub(super) fn cgroup2_freezer(_: &ProbeContext) -> bool {
    let Some(mount) = cgroup2_mount() else {
        return false;
    };
    let has_file = |group: &Path| group.join("cgroup.freeze").exists();
    let Ok(groups) = fs::read_dir(&mount) else {
        return false;
    };
    if groups.flatten().any(|entry| has_file(&entry.path())) {
        return true;
    }
    let own = mount.join(format!("floe-probe-{}", std::process::id()));
    if fs::create_dir(&own).is_err() {
        return false;
    }
    let found = has_file(&own);
    found & fs::remove_dir(&own).is_ok()
}

pub(super) fn user_namespace(_: &ProbeContext) -> bool {
    Path::new("/proc/self/ns/user").exists() && Path::new("/proc/self/uid_map").exists()
}

pub(super) fn cgroup_namespace(_: &ProbeContext) -> bool {
    Path::new("/proc/self/ns/cgroup").exists()
}

pub(super) fn loginuid(_: &ProbeContext) -> bool {
    File::options()
        .read(true)
        .write(true)
        .open("/proc/self/loginuid")
        .is_ok()
}

pub(super) fn apparmor_stacking(_: &ProbeContext) -> bool {
    let stacks = fs::read_to_string("/sys/kernel/security/apparmor/features/domain/stack");
    let shows_policy = Path::new(APPARMOR_POLICY).join("namespaces").exists();
    stacks.is_ok_and(|text| text.trim() == "yes") && shows_policy
}

pub(super) fn autofs(_: &ProbeContext) -> bool {
    fs::read_to_string("/proc/filesystems").is_ok_and(|text| {
        text.lines()
            .any(|line| line.split_whitespace().last() == Some("autofs"))
    })
}

/// Maps a file on an overlay in a child with a mount namespace of its own, and compares the
/// device and inode of /proc/PID/maps with those of stat(2).
pub(super) fn overlayfs_maps(_: &ProbeContext) -> bool {
    // SAFETY: the child works on a copy of our memory and leaves by _exit; glibc makes malloc
    // usable after fork.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let code = i32::from(!overlay_maps_agree().unwrap_or(false));
        // SAFETY: leaves without running destructors or exit handlers of the parent's.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: `status` is live; the child is ours.
    pid > 0 && unsafe { libc::waitpid(pid, &raw mut status, 0) } == pid && status == 0
}

fn mount(
    source: &CStr,
    target: &CStr,
    kind: &CStr,
    flags: libc::c_ulong,
    data: &CStr,
) -> io::Result<()> {
    // SAFETY: all five are zero-terminated strings that outlive the call.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            data.as_ptr().cast(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Runs in the child of [`overlayfs_maps`] only: its mounts end with it.
fn overlay_maps_agree() -> io::Result<bool> {
    // SAFETY: no pointers; only this child gets the namespace.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } < 0 {
        return Err(io::Error::last_os_error());
    }
    mount(c"none", c"/", c"none", libc::MS_REC | libc::MS_PRIVATE, c"")?;
    mount(c"floe-probe", c"/tmp", c"tmpfs", 0, c"")?;
    for directory in ["/tmp/l", "/tmp/u", "/tmp/w", "/tmp/m"] {
        fs::create_dir(directory)?;
    }
    let layers = c"lowerdir=/tmp/l,upperdir=/tmp/u,workdir=/tmp/w";
    mount(c"floe-probe", c"/tmp/m", c"overlay", 0, layers)?;
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open("/tmp/m/probe")?;
    let (read, shared) = (libc::PROT_READ, libc::MAP_SHARED);
    // SAFETY: a new mapping at an address of the kernel's choice, never dereferenced.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            read,
            shared,
            file.as_raw_fd(),
            0,
        )
    };
    let maps = fs::read_to_string("/proc/self/maps")?;
    let prefix = format!("{:x}-", address as usize);
    let Some(line) = maps.lines().find(|line| line.starts_with(&prefix)) else {
        return Ok(false);
    };
    let words: Vec<&str> = line.split_whitespace().collect();
    let stat = file.metadata()?;
    let device = format!(
        "{:02x}:{:02x}",
        libc::major(stat.dev()),
        libc::minor(stat.dev())
    );
    Ok(words.get(3) == Some(&device.as_str())
        && words.get(4) == Some(&stat.ino().to_string().as_str()))
}
