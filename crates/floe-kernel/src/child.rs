//! Going on in two processes.
//!
//! Contract relied on: `fork(2)` from a process with one thread leaves the child a working copy.

use std::io;
use std::os::fd::AsRawFd;

use rustix::process::Pid;

/// The two sides of [`fork`].
#[derive(Clone, Copy, Debug)]
pub enum Fork {
    /// The new process.
    Child,
    /// The old one, with the new one's pid.
    Parent(Pid),
}

/// Forks this process; `EDEADLK` if it has more than one thread, whose locks the child could never take.
pub fn fork() -> io::Result<Fork> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EDEADLK));
    }
    // SAFETY: this process has one thread, so the child finds every lock free.
    match unsafe { libc::fork() } {
        0 => Ok(Fork::Child),
        pid => Pid::from_raw(pid)
            .filter(|_| pid > 0)
            .map(Fork::Parent)
            .ok_or_else(io::Error::last_os_error),
    }
}

/// Closes every descriptor but standard input, output and error, whoever owns it: for a process that opens
/// and closes none from here on.
pub fn close_all() {
    // SAFETY: integers only; the caller promises that no owner of a descriptor is used or dropped later.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
}

/// Makes standard input, output and error of this process lead nowhere.
pub fn drop_streams() -> io::Result<()> {
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    for stream in 0..=2 {
        // SAFETY: integers; nobody in this process owns a standard stream's number.
        if unsafe { libc::dup2(null.as_raw_fd(), stream) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
