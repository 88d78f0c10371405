//! Shared memory (`shmget(2)`).
//!
//! Contract relied on: `shmat(2)` at an address of the kernel's choice replaces no mapping, and
//! `munmap(2)` of the whole detaches.

use std::io;
use std::ptr;

use rustix::fs::{Mode, OFlags};

use super::checked;
use crate::ids::PAGE_SIZE;
use crate::shared_anonymous::SharedAnonymous;

/// `SHM_DEST` in the mode of a segment: it goes with its last mapping.
pub const MARKED: u32 = 0o1000;
/// `SHM_LOCKED` in the mode of a segment: it is never swapped out.
pub const LOCKED: u32 = 0o2000;

/// Makes a segment that must not exist yet; `flags` are permissions and `SHM_HUGETLB` with a size.
pub fn create(key: u32, size: u64, flags: i32) -> io::Result<i32> {
    let size = usize::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    let flags = flags | libc::IPC_CREAT | libc::IPC_EXCL;
    // SAFETY: integers only.
    checked(unsafe { libc::shmget(key.cast_signed(), size, flags) })
}

/// Marks a segment: its key is free at once, and it goes with its last mapping.
pub fn remove(id: i32) -> io::Result<()> {
    control(id, libc::IPC_RMID)
}

/// Keeps a segment in memory (`SHM_LOCK`).
pub fn lock(id: i32) -> io::Result<()> {
    const SHM_LOCK: i32 = 11;
    control(id, SHM_LOCK)
}

/// Changes owner and permissions of a segment; its creator stays.
pub fn set_owner(id: i32, (uid, gid): (u32, u32), mode: u32) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `shmid_ds` of integers.
    let mut state: libc::shmid_ds = unsafe { std::mem::zeroed() };
    state.shm_perm.uid = uid;
    state.shm_perm.gid = gid;
    state.shm_perm.mode = mode as libc::c_ushort & 0o777;
    // SAFETY: `state` is a live `shmid_ds`, from which IPC_SET only reads.
    checked(unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut state) }).map(drop)
}

/// Maps a whole segment of `size` bytes, and opens the file behind it. It stays attached as long as the
/// value lives.
pub fn attach(id: i32, size: u64) -> io::Result<SharedAnonymous> {
    let len = usize::try_from(size).ok();
    let len = len.and_then(|len| len.checked_next_multiple_of(PAGE_SIZE as usize));
    let len = len.ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let start = unsafe { libc::shmat(id, ptr::null(), 0) };
    if start.addr() == usize::MAX {
        return Err(io::Error::last_os_error());
    }
    let end = start.addr() + len;
    let path = format!("/proc/self/map_files/{:x}-{end:x}", start.addr());
    let fd = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    if fd.is_err() {
        // SAFETY: detaches what was attached above; no reference into it exists.
        unsafe { libc::shmdt(start) };
    }
    Ok(SharedAnonymous::of_mapping(fd?, start, len))
}

fn control(id: i32, command: i32) -> io::Result<()> {
    // SAFETY: these commands take no structure.
    checked(unsafe { libc::shmctl(id, command, ptr::null_mut()) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_behind_a_segment_is_its_content() {
        let id = create(0, 5000, 0o600).expect("a segment");
        let attached = attach(id, 5000);
        remove(id).expect("our own segment");
        let mut attached = match attached {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                println!("skipped: map_files needs CAP_CHECKPOINT_RESTORE");
                return;
            }
            attached => attached.expect("attached"),
        };
        attached.write_mapped(4999, b"x");
        let mut byte = [0];
        rustix::io::pread(&attached, &mut byte, 4999).expect("readable");
        assert_eq!(&byte, b"x");
    }
}
