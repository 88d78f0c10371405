//! Pidfds: a task that cannot turn into another one, copies of its descriptors, signals to threads.
//!
//! Contract relied on: the raw call takes integers only.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

use crate::ids::{HostPid, TaskFd};

/// A handle on a process.
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// Opens a handle on a process; `ESRCH` when there is none.
    pub fn open(pid: HostPid) -> io::Result<Self> {
        let pid = Pid::from_raw(pid.0).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        Ok(Pidfd(rustix::process::pidfd_open(
            pid,
            PidfdFlags::empty(),
        )?))
    }

    /// Our own descriptor of the open file description behind the task's `fd`. The description is
    /// shared: moving its offset moves the task's.
    pub fn duplicate_fd(&self, fd: TaskFd) -> io::Result<OwnedFd> {
        Ok(rustix::process::pidfd_getfd(
            &self.0,
            fd.0,
            PidfdGetfdFlags::empty(),
        )?)
    }

    /// Sends a signal to the process.
    pub fn kill(&self, signal: i32) -> io::Result<()> {
        let signal = rustix::process::Signal::from_named_raw(signal)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        Ok(rustix::process::pidfd_send_signal(&self.0, signal)?)
    }
}

impl AsFd for Pidfd {
    /// Readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sends a signal to one thread, as if from outside.
pub fn tgkill(pid: HostPid, signal: i32) -> io::Result<()> {
    // SAFETY: integers only.
    let result = unsafe { libc::syscall(libc::SYS_tkill, pid.0, signal) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
