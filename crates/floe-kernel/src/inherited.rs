//! Descriptors that our caller opened for us and told us about by number.
//!
//! Kernel contract: fcntl(F_GETFD) tells whether a number is open. Nothing tells whether it is
//! used by somebody else in this process, so the caller must take each number once, at the start.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Takes over the descriptor `fd` of our caller and marks it close-on-exec; `EBADF` if it is not
/// open, `EINVAL` for standard input, output and error, which stay the process's own.
pub fn take(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= libc::STDERR_FILENO {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: no pointers; fails with EBADF where nothing is open.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: open as just seen, above the standard ones, and given to us by the user: by the
    // contract of this function nobody else in the process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Our own copy of the descriptor `fd` of our caller, whichever it is; `EBADF` if it is not open.
pub fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; a good result is a new descriptor.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Closes every descriptor above standard error that our caller left open.
///
/// For the start of a process that shall hold none but its own: nothing in it may own one yet.
pub fn close_all() {
    // SAFETY: no pointers; by the contract of this function nobody in the process owns what is closed.
    unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) };
}
