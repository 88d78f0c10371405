//! Room for pages in the files that they go to, made before the tree is stopped.
//!
//! Finding room takes a file system more time than copying into it, and the tasks can run meanwhile. But
//! only one thread can do it for a file, where two copy and hash: what is found in advance makes the freeze
//! shorter and the whole dump longer. The size is a guess: what is too much is cut off.

use std::collections::HashMap;
use std::fs::File;

use floe_image::{ImageKind, ImageWriter, WriteError};
use floe_kernel::ids::{ByteCount, HostPid};
use floe_kernel::proc::{ProcDir, ProcError, parse_status};
use rustix::fs::FallocateFlags;

/// Smaller tasks are not worth a look.
const WORTHWHILE: ByteCount = ByteCount(16 << 20);
/// A half of the room is made in advance: measured, a GiB takes 0.31 s frozen and 0.55 s in all with all of
/// it, 0.36 s and 0.49 s with half, 0.43 s and 0.44 s with none.
const RESERVED_PART: u64 = 2;
/// Tasks that are looked at; a tree with more has small ones mostly.
const MOST_TASKS: usize = 64;

/// Pages files with room, by task.
#[derive(Debug, Default)]
pub struct Reserved {
    files: HashMap<HostPid, (u32, File)>,
}

impl Reserved {
    /// Makes room for the big tasks of the running tree; file systems that cannot are left alone.
    pub fn make(writer: &ImageWriter, root: HostPid) -> Result<Self, WriteError> {
        let mut reserved = Reserved::default();
        for (pid, bytes) in big_tasks(root) {
            let pages_id = reserved.files.len() as u32 + 1;
            let file = writer.create_raw(ImageKind::Pages, u64::from(pages_id))?;
            // Not supported, or no room: the writes will tell.
            let part = bytes.0 / RESERVED_PART;
            let _ = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, part);
            reserved.files.insert(pid, (pages_id, file));
        }
        Ok(reserved)
    }

    /// The highest number of a pages file.
    pub fn last_id(&self) -> u32 {
        self.files.values().map(|(id, _)| *id).max().unwrap_or(0)
    }

    /// The file for the pages of a task, with its number.
    pub fn take(&mut self, pid: HostPid) -> Option<(u32, File)> {
        self.files.remove(&pid)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        for (_, file) in self.files.values() {
            // Its task ended before it was stopped. If this fails, only room is lost.
            let _ = file.set_len(0);
        }
    }
}

/// Whether a task of the running tree has so much memory that reading about it takes long.
pub fn has_big_tasks(root: HostPid) -> bool {
    !big_tasks(root).is_empty()
}

/// Tasks with much memory of their own.
fn big_tasks(root: HostPid) -> Vec<(HostPid, ByteCount)> {
    let mut big = Vec::new();
    for proc in running_tasks(root) {
        let bytes = own_bytes(&proc).unwrap_or(ByteCount(0));
        big.extend((bytes >= WORTHWHILE).then_some((proc.pid(), bytes)));
    }
    big
}

/// Tasks of the tree, as far as they can be seen without stopping any; of one with many tasks, the first.
pub fn running_tasks(root: HostPid) -> Vec<ProcDir> {
    let mut pids = vec![root];
    let mut tasks = Vec::new();
    let mut next = 0;
    while next < pids.len() && next < MOST_TASKS {
        // A task that is gone, or hides, is left out.
        if let Ok(proc) = ProcDir::open(pids[next]) {
            pids.extend(proc.children(pids[next]).unwrap_or_default());
            tasks.push(proc);
        }
        next += 1;
    }
    tasks
}

fn own_bytes(proc: &ProcDir) -> Result<ByteCount, ProcError> {
    let status = parse_status(&proc.read_record("status")?).map_err(|error| proc.bad(error))?;
    Ok(status.anonymous.unwrap_or(ByteCount(0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use floe_image::Sync;

    #[test]
    fn only_big_tasks_get_room_and_unused_room_is_given_back() {
        let place = tempfile::tempdir().expect("a directory");
        let writer = ImageWriter::create(place.path(), Sync::None).expect("writable");
        let own = HostPid(std::process::id().cast_signed());
        let memory = vec![1u8; 2 * WORTHWHILE.0 as usize];
        let reserved = Reserved::make(&writer, own).expect("writable");
        std::hint::black_box(&memory);
        assert_eq!(reserved.last_id(), 1);
        let size = || {
            std::fs::metadata(place.path().join("pages-1.img"))
                .expect("made")
                .len()
        };
        assert!(size() == 0 || size() >= 2 * WORTHWHILE.0 / RESERVED_PART);
        drop(reserved);
        assert_eq!(size(), 0);
    }
}
