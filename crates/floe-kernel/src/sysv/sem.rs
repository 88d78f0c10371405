//! Sets of semaphores (`semget(2)`).
//!
//! Contract relied on: `GETALL` and `SETALL` move as many 16-bit values as the set has, which its maker
//! fixed for good.

use std::io;

use super::checked;

/// Makes a set that must not exist yet; `flags` are permissions.
pub fn create(key: u32, count: u32, flags: i32) -> io::Result<i32> {
    let flags = flags | libc::IPC_CREAT | libc::IPC_EXCL;
    // SAFETY: integers only.
    checked(unsafe { libc::semget(key.cast_signed(), count.cast_signed(), flags) })
}

/// Removes a set.
pub fn remove(id: i32) -> io::Result<()> {
    // SAFETY: the command takes no structure.
    checked(unsafe { libc::semctl(id, 0, libc::IPC_RMID) }).map(drop)
}

/// Changes owner and permissions of a set; its creator stays.
pub fn set_owner(id: i32, (uid, gid): (u32, u32), mode: u32) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `semid_ds` of integers.
    let mut state: libc::semid_ds = unsafe { std::mem::zeroed() };
    state.sem_perm.uid = uid;
    state.sem_perm.gid = gid;
    state.sem_perm.mode = mode as _;
    // SAFETY: `state` is a live `semid_ds`, from which IPC_SET only reads.
    checked(unsafe { libc::semctl(id, 0, libc::IPC_SET, &raw mut state) }).map(drop)
}

/// The values of a set of `count` semaphores. One that is removed and made anew with more of them under
/// the same number meanwhile is refused.
pub fn values(id: i32, count: u32) -> io::Result<Vec<u16>> {
    // SAFETY: all-zero bytes are a valid `semid_ds` of integers.
    let mut state: libc::semid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: `state` is live and has room for what IPC_STAT writes.
    checked(unsafe { libc::semctl(id, 0, libc::IPC_STAT, &raw mut state) })?;
    if state.sem_nsems != u64::from(count) {
        return Err(io::Error::from_raw_os_error(libc::EIDRM));
    }
    // The largest set that there can be (SEMMSL), so that no other one could write beyond the end.
    let mut values = vec![0u16; (1 << 16).max(count as usize)];
    // SAFETY: `values` has room for the values of any set.
    checked(unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) })?;
    values.truncate(count as usize);
    Ok(values)
}

/// Sets all values of a set that the caller made with as many semaphores.
pub fn set_values(id: i32, values: &[u16]) -> io::Result<()> {
    let mut room = vec![0u16; (1 << 16).max(values.len())];
    room[..values.len()].copy_from_slice(values);
    // SAFETY: `room` has as many values as the largest set.
    checked(unsafe { libc::semctl(id, 0, libc::SETALL, room.as_mut_ptr()) }).map(drop)
}
