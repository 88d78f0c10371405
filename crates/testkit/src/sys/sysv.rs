//! System V shared memory.

use std::io;

use super::check;
use super::memory::Mapping;

/// A new private segment of `pages` pages.
pub fn segment(pages: usize) -> io::Result<i32> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | 0o640;
    // SAFETY: integers only.
    let id = unsafe { libc::shmget(libc::IPC_PRIVATE, pages * super::memory::PAGE, flags) };
    check(i64::from(id)).map(|id| id as i32)
}

/// Marks a segment to go with its last mapping.
pub fn mark(id: i32) -> io::Result<()> {
    // SAFETY: the command takes no structure.
    let done = unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    check(i64::from(done)).map(drop)
}

/// Attaches a segment of `pages` pages; `flags` as of `shmat(2)`.
pub fn attach(id: i32, pages: usize, flags: i32) -> io::Result<Mapping> {
    // SAFETY: at an address of the kernel's choice nothing is replaced.
    let start = unsafe { libc::shmat(id, std::ptr::null(), flags) };
    if start.addr() == usize::MAX {
        return Err(io::Error::last_os_error());
    }
    Ok(Mapping::of(start.addr(), pages))
}

/// Mappings of a segment that exist now, and whether it is marked.
pub fn state(id: i32) -> io::Result<(u64, bool)> {
    // SAFETY: all-zero bytes are a valid `shmid_ds`.
    let mut state: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: `state` is live and has room for what IPC_STAT writes.
    let done = unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut state) };
    check(i64::from(done))?;
    Ok((state.shm_nattch, state.shm_perm.mode & 0o1000 != 0))
}
