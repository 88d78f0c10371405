//! A process that does nothing: it has a pid, so that `/proc/<pid>` can be opened or a pidfd made.
//!
//! Contract relied on: a child of `clone3` without `CLONE_VM` runs on a copy of the caller's memory;
//! it only calls `prctl` and `pause`, which is safe after a fork of a program with several threads.

use std::io;

use crate::ids::HostPid;
use crate::namespace::{self, Namespace, NsKind};

/// The process; dropped, it is killed and reaped.
#[derive(Debug)]
pub struct Placeholder {
    pid: HostPid,
}

#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

impl Placeholder {
    /// Starts it, with this pid where one is given; `EEXIST` when the pid is taken.
    pub fn start(pid: Option<HostPid>) -> io::Result<Self> {
        let number = pid.map(|pid| pid.0.cast_unsigned());
        Self::clone(0, number.as_slice())
    }

    /// Starts it in new namespaces of these kinds: all others belong to the user namespace, where that
    /// is among them.
    pub fn start_in_new(kinds: &[NsKind]) -> io::Result<Self> {
        Self::clone(kinds.iter().fold(0, |all, kind| all | kind.flag()), &[])
    }

    /// Starts it in the pid namespace `pids`, which may be ours, with these numbers: the first one there, the
    /// others in those around it. `EEXIST` when one is taken.
    pub fn start_among(pids: &Namespace, numbers: &[u32]) -> io::Result<Self> {
        let home = Namespace::own(NsKind::Pid)?;
        // Only children of this thread are born there, and only until it comes back.
        namespace::enter(pids)?;
        let started = Self::clone(0, numbers);
        namespace::enter(&home)?;
        started
    }

    /// Starts it in new namespaces of these kinds that belong to the user namespace `user`.
    pub fn start_inside(user: &Namespace, kinds: &[NsKind]) -> io::Result<Self> {
        let flags = kinds.iter().fold(0, |all, kind| all | kind.flag());
        let (ready, done) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let args = CloneArgs::default();
        // SAFETY: `args` is live and describes a plain fork; the child makes system calls with integers
        // and one byte of its own stack, and never returns.
        let pid = unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw const args,
                std::mem::size_of::<CloneArgs>(),
            )
        };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        if pid == 0 {
            let entered = namespace::enter(user).and_then(|()| namespace::unshare(flags));
            let errno = entered.map_or_else(|error| error.raw_os_error().unwrap_or(1), |()| 0);
            // Whoever does not hear of it finds the process dead.
            let _ = rustix::io::write(&done, &[errno as u8]);
            idle();
        }
        let maker = Placeholder {
            pid: HostPid(pid as i32),
        };
        drop(done);
        let mut errno = [0u8];
        match rustix::io::read(&ready, &mut errno)? {
            1 if errno[0] == 0 => Ok(maker),
            1 => Err(io::Error::from_raw_os_error(i32::from(errno[0]))),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn clone(flags: u32, numbers: &[u32]) -> io::Result<Self> {
        let mut args = CloneArgs {
            flags: u64::from(flags),
            ..CloneArgs::default()
        };
        if !numbers.is_empty() {
            args.set_tid = numbers.as_ptr() as u64;
            args.set_tid_size = numbers.len() as u64;
        }
        // Without an exit signal nobody hears of its death but who waits with __WALL.
        // SAFETY: `args` and `numbers`, which it points to, are live; it describes a fork, into namespaces or not,
        // and the child uses nothing of the copy of our memory but this code.
        let result = unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw const args,
                std::mem::size_of::<CloneArgs>(),
            )
        };
        match result {
            0 => idle(),
            pid if pid > 0 => Ok(Placeholder {
                pid: HostPid(pid as i32),
            }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Its pid.
    pub fn pid(&self) -> HostPid {
        self.pid
    }
}

/// The child's life: it ends with its parent at the latest.
fn idle() -> ! {
    // SAFETY: integers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    loop {
        // SAFETY: waits for a signal, touches no memory.
        unsafe { libc::pause() };
    }
}

impl Drop for Placeholder {
    fn drop(&mut self) {
        // SAFETY: the child is ours and not reaped yet, so the pid is nobody else's.
        unsafe {
            libc::kill(self.pid.0, libc::SIGKILL);
            libc::waitpid(self.pid.0, std::ptr::null_mut(), libc::__WALL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_lives_until_it_is_dropped() {
        let child = Placeholder::start(None).expect("a process");
        let path = format!("/proc/{}", child.pid());
        assert!(std::path::Path::new(&path).exists());
        drop(child);
        assert!(!std::path::Path::new(&path).exists());
    }
}
