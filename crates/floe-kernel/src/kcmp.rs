//! `kcmp(2)`: whether two tasks share a kernel object.
//!
//! Contract relied on: the call reads only its integer arguments (and, for epoll, one structure).

use std::cmp::Ordering;
use std::io;

use crate::ids::{HostPid, TaskFd};

/// A resource that whole tasks share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaskResource {
    /// The address space.
    Memory = 1,
    /// The table of descriptors.
    Files = 2,
    /// Working directory, root and umask.
    Fs = 3,
    /// Signal actions.
    SignalHandlers = 4,
}

const KCMP_FILE: i64 = 0;

fn kcmp(first: HostPid, second: HostPid, kind: i64, one: i64, two: i64) -> io::Result<Ordering> {
    // SAFETY: for the kinds used here all arguments are plain integers.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, first.0, second.0, kind, one, two) };
    match result {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        // 3 is "not equal, but no order", which the kernel does not answer for these kinds.
        2 | 3 => Ok(Ordering::Greater),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Orders two tasks by the kernel object behind `resource`; `Equal` means shared.
pub fn compare_tasks(
    first: HostPid,
    second: HostPid,
    resource: TaskResource,
) -> io::Result<Ordering> {
    kcmp(first, second, resource as i64, 0, 0)
}

/// Orders two descriptors by their open file descriptions; `Equal` means shared.
pub fn compare_files(first: (HostPid, TaskFd), second: (HostPid, TaskFd)) -> io::Result<Ordering> {
    kcmp(
        first.0,
        second.0,
        KCMP_FILE,
        i64::from(first.1.0),
        i64::from(second.1.0),
    )
}

#[repr(C)]
struct EpollSlot {
    efd: u32,
    tfd: u32,
    toff: u32,
}

/// Whether the file that epoll instance `epoll` of `owner` watches as number `tfd` (the `index`th of that
/// number) is the one behind `candidate`.
pub fn is_epoll_target(
    candidate: (HostPid, TaskFd),
    owner: HostPid,
    epoll: TaskFd,
    tfd: TaskFd,
    index: u32,
) -> io::Result<bool> {
    const KCMP_EPOLL_TFD: i64 = 7;
    let slot = EpollSlot {
        efd: epoll.0.cast_unsigned(),
        tfd: tfd.0.cast_unsigned(),
        toff: index,
    };
    kcmp(
        candidate.0,
        owner,
        KCMP_EPOLL_TFD,
        i64::from(candidate.1.0),
        &raw const slot as i64,
    )
    .map(|order| order == Ordering::Equal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn duplicates_are_equal_and_reopened_files_are_not() {
        let me = HostPid(std::process::id().cast_signed());
        let first = std::fs::File::open("/dev/null").expect("opens");
        let copy = first.try_clone().expect("dup");
        let other = std::fs::File::open("/dev/null").expect("opens");
        let fd = |file: &std::fs::File| (me, TaskFd(file.as_raw_fd()));
        assert_eq!(
            compare_files(fd(&first), fd(&copy)).expect("kcmp"),
            Ordering::Equal
        );
        assert_ne!(
            compare_files(fd(&first), fd(&other)).expect("kcmp"),
            Ordering::Equal
        );
        assert_eq!(
            compare_tasks(me, me, TaskResource::Memory).expect("kcmp"),
            Ordering::Equal
        );
    }
}
