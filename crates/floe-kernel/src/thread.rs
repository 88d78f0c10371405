//! What system calls tell about another thread without stopping it.
//!
//! Contract relied on: each call writes only to the structure whose size it is given.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use crate::ids::{HostPid, TaskAddr};

/// Scheduling of a thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scheduling {
    /// `SCHED_*`, with `SCHED_RESET_ON_FORK` (bit 30) as `sched_getscheduler` reports it.
    pub policy: u32,
    /// Real-time priority, 0 for other policies.
    pub priority: u32,
    /// -20 to 19; kept by the kernel under real-time policies too.
    pub nice: i32,
    /// Of SCHED_DEADLINE, in nanoseconds.
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    util_min: u32,
    util_max: u32,
}

const SCHED_FLAG_RESET_ON_FORK: u64 = 1;
const SCHED_RESET_ON_FORK: u32 = 0x4000_0000;

/// Reads policy, priority and nice value.
pub fn scheduling(tid: HostPid) -> io::Result<Scheduling> {
    let mut attr = SchedAttr::default();
    // SAFETY: `attr` is live, plain integers, and of the size that is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            tid.0,
            &raw mut attr,
            size_of::<SchedAttr>(),
            0,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let reset = if attr.flags & SCHED_FLAG_RESET_ON_FORK != 0 {
        SCHED_RESET_ON_FORK
    } else {
        0
    };
    let real_time = [libc::SCHED_FIFO, libc::SCHED_RR, libc::SCHED_DEADLINE]
        .contains(&attr.policy.cast_signed());
    Ok(Scheduling {
        policy: attr.policy | reset,
        priority: attr.priority,
        nice: if real_time { nice(tid)? } else { attr.nice },
        runtime: attr.runtime,
        deadline: attr.deadline,
        period: attr.period,
    })
}

/// `sched_getattr` leaves the nice value out under real-time policies, `getpriority` does not.
fn nice(tid: HostPid) -> io::Result<i32> {
    // SAFETY: integers only. The raw call answers 20 - nice, so that errors are negative.
    let result = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid.0) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(20 - result as i32)
    }
}

/// Head and length of the thread's list of robust futexes; a zero address means none.
pub fn robust_list(tid: HostPid) -> io::Result<(TaskAddr, u32)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both pointers are to live 64-bit integers, which is what the call writes on a
    // 64-bit kernel.
    let result = unsafe {
        libc::syscall(
            libc::SYS_get_robust_list,
            tid.0,
            &raw mut head,
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((TaskAddr(head), len as u32))
}

/// Does something in another working directory. The rest of the process stays where it is: a thread of its
/// own with separate directories does the work.
pub fn in_directory<T: Send>(
    directory: &Path,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    apart(|| {
        std::env::set_current_dir(directory)?;
        work()
    })
}

/// As [`in_directory`], below another root.
pub fn in_root<T: Send>(
    root: BorrowedFd<'_>,
    directory: &Path,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    apart(|| {
        rustix::process::fchdir(root)?;
        rustix::process::chroot(".")?;
        std::env::set_current_dir(Path::new("/").join(directory))?;
        work()
    })
}

/// Does something in a thread with directories of its own.
fn apart<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let body = || {
        // SAFETY: CLONE_FS parts this thread's directories and umask from the others' and nothing else.
        if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
            return Err(io::Error::last_os_error());
        }
        work()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, body)?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_thread_has_a_nice_value_and_a_robust_list() {
        let me = HostPid(std::process::id().cast_signed());
        let scheduling = scheduling(me).expect("own thread");
        assert!((-20..20).contains(&scheduling.nice));
        let (head, len) = robust_list(me).expect("own thread");
        assert!(head.0 == 0 || len == 24);
    }

    #[test]
    fn another_directory_is_for_the_work_alone() {
        let before = std::env::current_dir().expect("there");
        let inside = in_directory(std::path::Path::new("/proc"), std::env::current_dir);
        assert_eq!(inside.expect("there"), std::path::Path::new("/proc"));
        assert_eq!(std::env::current_dir().expect("there"), before);
    }
}
