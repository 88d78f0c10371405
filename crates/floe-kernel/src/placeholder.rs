//! A process that does nothing: it has a pid, so that `/proc/<pid>` can be opened or a pidfd made; and one that
//! does a single thing where the coordinator cannot go and come back from.
//!
//! Contract relied on: a child of `clone3` without `CLONE_VM` runs on a copy of the caller's memory;
//! it makes system calls only, which is safe after a fork of a program with several threads. The C library's
//! own wrappers of `setresuid(2)` and the like would look for these threads.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};

use crate::ids::HostPid;
use crate::namespace::{self, Namespace, NsKind};

/// The process; dropped, it is killed and reaped.
#[derive(Debug)]
pub struct Placeholder {
    pid: HostPid,
}

/// One that waits before it does what it was started for.
#[derive(Debug)]
pub struct Waiting {
    started: Placeholder,
    ready: OwnedFd,
    go: OwnedFd,
}

impl Waiting {
    /// Its pid.
    pub fn pid(&self) -> HostPid {
        self.started.pid
    }

    /// Tells it to go, and waits until it is done.
    pub fn go(self) -> io::Result<Placeholder> {
        rustix::io::write(&self.go, &[1])?;
        let mut errno = [0u8];
        match rustix::io::read(&self.ready, &mut errno)? {
            1 if errno[0] == 0 => Ok(self.started),
            1 => Err(io::Error::from_raw_os_error(i32::from(errno[0]))),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
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
        Self::start_after(|| namespace::enter(user).and_then(|()| namespace::unshare(flags)))
    }

    /// Starts it in a new user namespace without maps. That lies in `parent`, or in ours, and `owner` owns it:
    /// a user and a group as they are known there.
    pub fn start_in_new_users(
        parent: Option<&Namespace>,
        (uid, gid): (u32, u32),
    ) -> io::Result<Self> {
        Self::start_after(|| {
            parent.map_or(Ok(()), namespace::enter)?;
            become_user(uid, gid)?;
            namespace::unshare(NsKind::User.flag())?;
            // So that its files in `/proc` are that user's: the kernel gives those of who changed to root.
            // SAFETY: integers only.
            unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) };
            Ok(())
        })
    }

    /// Starts it, once it has done `first`, which makes system calls only.
    fn start_after(first: impl FnOnce() -> io::Result<()>) -> io::Result<Self> {
        Self::start_before(first)?.go()
    }

    /// Starts it to wait; it does `first`, which makes system calls only, when it is told to go.
    pub fn start_before(first: impl FnOnce() -> io::Result<()>) -> io::Result<Waiting> {
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        let ((ready, done), (word, go)) = (pipe()?, pipe()?);
        let pid = clone3(&CloneArgs::default())?;
        if pid == 0 {
            let told = rustix::io::read(&word, &mut [0u8]);
            let result = told.map_err(io::Error::from).and_then(|_| first());
            // Whoever does not hear of it finds the process dead.
            let _ = rustix::io::write(&done, &[errno_of(result)]);
            idle();
        }
        Ok(Waiting {
            started: Placeholder { pid: HostPid(pid) },
            ready,
            go,
        })
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
        match clone3(&args)? {
            0 => idle(),
            pid => Ok(Placeholder { pid: HostPid(pid) }),
        }
    }

    /// Its pid.
    pub fn pid(&self) -> HostPid {
        self.pid
    }
}

/// Does something in a user namespace by a process that ends with it. `work` makes system calls only; descriptors
/// are shared with that process, so one that `work` opens and returns is ours.
pub fn errand(
    user: &Namespace,
    work: impl FnOnce() -> io::Result<libc::c_int>,
) -> io::Result<libc::c_int> {
    run(libc::CLONE_FILES, || {
        namespace::enter(user).and_then(|()| work())
    })
}

/// Has the next process or thread of a pid namespace, or of ours, get this number, if nobody is quicker.
/// `EPERM` without rights over the namespace.
pub fn set_next_number(pids: Option<&Namespace>, number: u32) -> io::Result<()> {
    let text = number.saturating_sub(1).to_string();
    let path = namespace::own_proc_path("sys/kernel/ns_last_pid");
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    let write = || rustix::io::write(&file, text.as_bytes()).map(|_| 0);
    let Some(pids) = pids else {
        return Ok(write().map(drop)?);
    };
    // The kernel sets it for the namespace that the writer is in.
    let home = Namespace::own(NsKind::Pid)?;
    namespace::enter(pids)?;
    let written = run(0, || Ok(write()?));
    namespace::enter(&home)?;
    written.map(drop)
}

/// As [`errand`], by a process in a pid namespace.
pub fn errand_among(
    pids: &Namespace,
    work: impl FnOnce() -> io::Result<libc::c_int>,
) -> io::Result<libc::c_int> {
    let home = Namespace::own(NsKind::Pid)?;
    namespace::enter(pids)?;
    let done = run(libc::CLONE_FILES, work);
    namespace::enter(&home)?;
    done
}

/// Does something in a process of its own.
fn run(
    flags: libc::c_int,
    work: impl FnOnce() -> io::Result<libc::c_int>,
) -> io::Result<libc::c_int> {
    let (answer, done) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let pid = clone3(&CloneArgs {
        flags: flags as u64,
        ..CloneArgs::default()
    })?;
    if pid == 0 {
        let result = work();
        let number = result.as_ref().map_or(0, |number| *number).to_le_bytes();
        let [a, b, c, d] = number;
        let _ = rustix::io::write(&done, &[errno_of(result), a, b, c, d]);
        // SAFETY: ends this process, and runs nothing of the copy of its parent.
        unsafe { libc::_exit(0) };
    }
    // SAFETY: the child is ours, and nobody else waits for it.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) };
    drop(done);
    let mut told = [0u8; 5];
    match rustix::io::read(&answer, &mut told)? {
        5 if told[0] == 0 => Ok(i32::from_le_bytes([told[1], told[2], told[3], told[4]])),
        5 => Err(io::Error::from_raw_os_error(i32::from(told[0]))),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// All numbers of errors fit into a byte.
fn errno_of<T>(result: io::Result<T>) -> u8 {
    result.map_or_else(
        |error| error.raw_os_error().unwrap_or(libc::EIO) as u8,
        |_| 0,
    )
}

/// Changes all ids of this process, which has one thread.
pub(crate) fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    for (call, id) in [(libc::SYS_setresgid, gid), (libc::SYS_setresuid, uid)] {
        // SAFETY: integers only.
        if unsafe { libc::syscall(call, id, id, id) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A child; zero in the child itself. Without an exit signal nobody hears of its death but who waits with
/// `__WALL`.
fn clone3(args: &CloneArgs) -> io::Result<i32> {
    // SAFETY: `args` is live and describes a fork, into namespaces or not; the child uses nothing of the copy of
    // our memory but code of this module, and never returns from it.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            std::ptr::from_ref(args),
            std::mem::size_of::<CloneArgs>(),
        )
    };
    match i32::try_from(pid) {
        Ok(pid) if pid >= 0 => Ok(pid),
        _ => Err(io::Error::last_os_error()),
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
