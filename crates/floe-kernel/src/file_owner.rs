//! Who gets the signals of a file (`F_SETOWN_EX`, `F_SETSIG`).
//!
//! Contract relied on: each `fcntl` writes only the structure that its command names.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The owner of an open file description.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileOwner {
    /// `F_OWNER_TID` 0, `F_OWNER_PID` 1, `F_OWNER_PGRP` 2.
    pub kind: u32,
    /// In our pid namespace; 0 for none.
    pub pid: u32,
    /// Ids of the task that set it.
    pub uid: u32,
    pub euid: u32,
    /// The signal sent instead of SIGIO; 0 for the default.
    pub signal: u32,
}

#[repr(C)]
#[derive(Default)]
struct OwnerEx {
    kind: i32,
    pid: i32,
}

const F_GETOWN_EX: i32 = 16;
const F_GETOWNER_UIDS: i32 = 17;
const F_GETSIG: i32 = 11;

fn fcntl(fd: BorrowedFd<'_>, command: i32, argument: usize) -> io::Result<i32> {
    // SAFETY: `argument` is zero or points to a live structure of the command's own type.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Reads the owner. `EBADF` for descriptors opened with `O_PATH`, which have none.
pub fn file_owner(fd: BorrowedFd<'_>) -> io::Result<FileOwner> {
    let mut owner = OwnerEx::default();
    fcntl(fd, F_GETOWN_EX, &raw mut owner as usize)?;
    let mut uids = [0u32; 2];
    // They are those of the task that set the owner: without one they mean nothing.
    if owner.pid != 0 {
        fcntl(fd, F_GETOWNER_UIDS, &raw mut uids as usize)?;
    }
    let signal = fcntl(fd, F_GETSIG, 0)?;
    Ok(FileOwner {
        kind: owner.kind.cast_unsigned(),
        pid: owner.pid.cast_unsigned(),
        uid: uids[0],
        euid: uids[1],
        signal: signal.cast_unsigned(),
    })
}

const F_SETOWN_EX: i32 = 15;
const F_SETSIG: i32 = 10;

/// Sets the owner. The kernel notes the caller's ids as those of the setter, so the calling thread
/// takes the saved ones for that moment.
pub fn set_file_owner(fd: BorrowedFd<'_>, owner: &FileOwner) -> io::Result<()> {
    fcntl(fd, F_SETSIG, owner.signal as usize)?;
    if owner.pid == 0 {
        return Ok(());
    }
    let wanted = OwnerEx {
        kind: owner.kind.cast_signed(),
        pid: owner.pid.cast_signed(),
    };
    let (uid, euid) = (
        rustix::process::getuid().as_raw(),
        rustix::process::geteuid().as_raw(),
    );
    if (owner.uid, owner.euid) == (uid, euid) {
        return fcntl(fd, F_SETOWN_EX, &raw const wanted as usize).map(drop);
    }
    set_thread_uids(owner.uid, owner.euid)?;
    let result = fcntl(fd, F_SETOWN_EX, &raw const wanted as usize);
    set_thread_uids(uid, euid)?;
    result.map(drop)
}

/// Real and effective uid of this thread alone; the saved one stays, so that they can be taken back.
fn set_thread_uids(uid: u32, euid: u32) -> io::Result<()> {
    // SAFETY: integers only.
    let result = unsafe { libc::syscall(libc::SYS_setresuid, uid, euid, -1i32) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
