//! Groups of fanotify marks.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::check;

/// A group that tells of events, does not block and opens files for reading.
pub fn fanotify() -> io::Result<OwnedFd> {
    let flags = libc::FAN_CLASS_NOTIF | libc::FAN_NONBLOCK | libc::FAN_CLOEXEC;
    // SAFETY: integers only.
    let fd = check(unsafe { libc::syscall(libc::SYS_fanotify_init, flags, libc::O_RDONLY) })?;
    // SAFETY: the kernel has just made the descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A group that tells of events with the name of the file.
pub fn fanotify_of_names() -> io::Result<OwnedFd> {
    let flags = libc::FAN_CLASS_NOTIF | libc::FAN_NONBLOCK | libc::FAN_REPORT_DFID_NAME;
    // SAFETY: integers only.
    let fd = check(unsafe { libc::syscall(libc::SYS_fanotify_init, flags, 0) })?;
    // SAFETY: the kernel has just made the descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// What can be read of the next events, as text.
pub fn words(group: &OwnedFd) -> io::Result<String> {
    let mut bytes = [0; 4096];
    let length = rustix::io::read(group, &mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
}

/// Marks a path; `flags` beside `FAN_MARK_ADD`.
pub fn mark(group: &OwnedFd, flags: u32, mask: u64, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = libc::FAN_MARK_ADD | flags;
    let (group, here) = (group.as_raw_fd(), libc::AT_FDCWD);
    // SAFETY: `path` is a live C string, the rest are integers.
    check(unsafe {
        libc::syscall(
            libc::SYS_fanotify_mark,
            group,
            flags,
            mask,
            here,
            path.as_ptr(),
        )
    })
    .map(drop)
}

/// Takes all events that wait and returns how many there were.
pub fn events(group: &OwnedFd) -> io::Result<usize> {
    const LENGTH: usize = size_of::<libc::fanotify_event_metadata>();
    let mut bytes = [0; 4096];
    let mut count = 0;
    loop {
        let length = match rustix::io::read(group, &mut bytes) {
            Ok(length) => length,
            Err(rustix::io::Errno::AGAIN) => return Ok(count),
            Err(errno) => return Err(errno.into()),
        };
        for event in bytes[..length].chunks_exact(LENGTH) {
            let fd = event[16..20].try_into().map_or(-1, i32::from_ne_bytes);
            if fd >= 0 {
                // SAFETY: the kernel has opened the descriptor for this event, and nobody else has it.
                drop(unsafe { OwnedFd::from_raw_fd(fd) });
            }
            count += 1;
        }
    }
}
