//! System V shared memory, semaphores and message queues.

use std::io;

use super::check;
use super::memory::Mapping;

const NEW: i32 = libc::IPC_CREAT | libc::IPC_EXCL | 0o640;
/// Bytes of a message's type.
const TYPE: usize = 8;

/// Gives this process an IPC namespace of its own.
pub fn leave() -> io::Result<()> {
    // SAFETY: integers only.
    check(i64::from(unsafe { libc::unshare(libc::CLONE_NEWIPC) })).map(drop)
}

/// A new segment of `pages` pages; `key` may be `IPC_PRIVATE`.
pub fn segment(key: i32, pages: usize) -> io::Result<i32> {
    segment_with(key, pages, 0)
}

/// The same with further flags of `shmget(2)`.
pub fn segment_with(key: i32, pages: usize, flags: i32) -> io::Result<i32> {
    // SAFETY: integers only.
    let id = unsafe { libc::shmget(key, pages * super::memory::PAGE, NEW | flags) };
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

/// A new set of semaphores with these values.
pub fn semaphores(key: i32, values: &mut [u16]) -> io::Result<i32> {
    // SAFETY: integers only.
    let id = check(i64::from(unsafe {
        libc::semget(key, values.len() as i32, NEW)
    }))? as i32;
    // SAFETY: `values` has as many values as the set, which was just made.
    check(i64::from(unsafe {
        libc::semctl(id, 0, libc::SETALL, values.as_mut_ptr())
    }))?;
    Ok(id)
}

/// The values of the set with this key, if it has `count` semaphores.
pub fn values(key: i32, count: usize) -> io::Result<Vec<u16>> {
    let mut values = vec![0; count];
    // SAFETY: integers only; a set with fewer semaphores is refused.
    let id = check(i64::from(unsafe { libc::semget(key, count as i32, 0) }))? as i32;
    // SAFETY: nobody else in our namespace makes sets, and ours has as many semaphores.
    check(i64::from(unsafe {
        libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr())
    }))?;
    Ok(values)
}

/// A new message queue.
pub fn queue(key: i32) -> io::Result<i32> {
    // SAFETY: integers only.
    check(i64::from(unsafe { libc::msgget(key, NEW) })).map(|id| id as i32)
}

/// Appends a message.
pub fn send(id: i32, kind: u64, text: &[u8]) -> io::Result<()> {
    let message = [&kind.to_ne_bytes(), text].concat();
    // SAFETY: `message` has the type and as many bytes of text.
    let sent = unsafe { libc::msgsnd(id, message.as_ptr().cast(), text.len(), 0) };
    check(i64::from(sent)).map(drop)
}

/// Takes the first message.
pub fn receive(id: i32) -> io::Result<(u64, Vec<u8>)> {
    const ROOM: usize = 4096;
    let mut message = [0; TYPE + ROOM];
    let flags = libc::IPC_NOWAIT;
    // SAFETY: `message` has room for the type and `ROOM` bytes.
    let len = unsafe { libc::msgrcv(id, message.as_mut_ptr().cast(), ROOM, 0, flags) };
    let len = check(len as i64)? as usize;
    let kind = u64::from_ne_bytes(message[..TYPE].try_into().expect("eight bytes"));
    Ok((kind, message[TYPE..TYPE + len].to_vec()))
}
