//! System V IPC in the IPC namespace that the calling thread is in.
//!
//! Contract relied on: set*id system calls change the calling thread only; the control calls take
//! integers and the structure that each call here names.

pub mod msg;
pub mod sem;
pub mod shm;

use std::io;

/// Runs `work` with another effective user and group, which become the creator of what it makes.
pub fn as_creator<T>(
    (uid, gid): (u32, u32),
    work: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let (own_uid, own_gid) = (rustix::process::geteuid(), rustix::process::getegid());
    let set = |call, id: u32| {
        let keep = u32::MAX;
        // SAFETY: integers only; the system call changes this thread alone.
        checked(unsafe { libc::syscall(call, keep, id, keep) } as i32).map(drop)
    };
    set(libc::SYS_setresgid, gid)?;
    let done = match set(libc::SYS_setresuid, uid) {
        Ok(()) => {
            let done = work();
            let back = set(libc::SYS_setresuid, own_uid.as_raw());
            back.expect("the saved user id may be taken again");
            done
        }
        Err(error) => Err(error),
    };
    let back = set(libc::SYS_setresgid, own_gid.as_raw());
    back.expect("the saved group id may be taken again");
    done
}

fn checked(result: i32) -> io::Result<i32> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}
