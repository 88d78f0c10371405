//! Locks on files (`flock(2)`, `fcntl(2)`) and leases.
//!
//! Saved:    kind, mode and range of each, with a task and descriptor that hold it
//!           (`/proc/<pid>/fdinfo/<fd>`).
//! Rebuilt:  taken again through that descriptor. Needs: the descriptors of the task.
//! Not kept: waiters; they ask again with their own task.

use std::collections::HashSet;

use floe_image::ImageKind;
use floe_image::messages::FileLockEntry;
use floe_kernel::ids::HostPid;
use floe_kernel::proc::{FileLock, LockKind, LockMode, parse_locks};

use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};

/// `file_lock_entry.flag`.
pub mod flag {
    pub const POSIX: u32 = 1;
    pub const FLOCK: u32 = 2;
    pub const OFD: u32 = 4;
    pub const LEASE: u32 = 8;
}

/// Added to the type of a lease that somebody waits for; the type is then what it is broken down to.
pub const BREAKING: u32 = 4;

/// Locks that were saved: what a duplicate of the descriptor would show again.
#[derive(Default)]
struct Saved(HashSet<SavedKey>);

#[derive(PartialEq, Eq, Hash)]
struct SavedKey {
    file: FileId,
    /// Locks of `fcntl` belong to a table of descriptors, all others to the description.
    owner: Option<HostPid>,
    kind: LockKind,
    range: (u64, Option<u64>),
}

/// Saves the locks that a descriptor holds.
pub fn collect_locks(
    id: FileId,
    fd: &FdProbe<'_>,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    if !fd.info().locked {
        return Ok(());
    }
    if !collector.options.file_locks {
        let what = format!("{}, locked", String::from_utf8_lossy(fd.target()));
        return Err(CollectError::Unsupported(Obstacle::fd(
            fd.pid(),
            fd.fd(),
            what,
            "use --file-locks",
        )));
    }
    let lines: Vec<u8> = fd
        .info()
        .values("lock")
        .flat_map(|line| [line, b"\n"].concat())
        .collect();
    for lock in parse_locks(&lines).map_err(|error| fd.proc().bad(error))? {
        let owner = (lock.kind == LockKind::Posix).then_some(fd.pid());
        let key = SavedKey {
            file: id,
            owner,
            kind: lock.kind,
            range: (lock.start, lock.end),
        };
        if collector.cache(Saved::default).0.insert(key) {
            collector.append_side(ImageKind::FileLocks, &entry(fd, &lock))?;
        }
    }
    Ok(())
}

fn entry(fd: &FdProbe<'_>, lock: &FileLock) -> FileLockEntry {
    let mode = match lock.mode {
        LockMode::Read => libc::F_RDLCK,
        LockMode::Write => libc::F_WRLCK,
        LockMode::Unlock => libc::F_UNLCK,
    };
    FileLockEntry {
        flag: match lock.kind {
            LockKind::Posix => flag::POSIX,
            LockKind::Flock => flag::FLOCK,
            LockKind::Ofd => flag::OFD,
            LockKind::Lease => flag::LEASE,
        },
        r#type: mode.cast_unsigned() | if lock.breaking { BREAKING } else { 0 },
        pid: fd.pid().0,
        fd: fd.fd().0,
        start: lock.start.cast_signed(),
        // Zero is "to the end of the file, wherever that is".
        len: lock
            .end
            .map_or(0, |end| (end + 1 - lock.start).cast_signed()),
    }
}
