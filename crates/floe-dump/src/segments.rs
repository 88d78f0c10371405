//! Shared memory in rounds: its pages are copied while the program runs, and compared by the next round.
//!
//! A segment may be written by `write(2)`, by tasks outside of the tree, and through page tables that are gone
//! at the next look (a child that ended, a second mapping), so its pages are found changed by their content.
//! What is torn here, or written later, differs then and is copied again. The final dump maps both sides
//! before the tree is stopped, which then stands still for the comparison alone.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use floe_kernel::ids::HostPid;
use floe_kernel::mapped_file::MappedFile;
use floe_kernel::proc::{Mapping, ProcDir, parse_maps};
use floe_memory::data_runs;
use floe_resources::collect::{Segment, SharedMemoryDevice};
use floe_resources::fd::memfd::{huge_flag, is_memory_name, segment_id};
use rustix::fs::OFlags;

use crate::error::DumpError;
use crate::freeze::FrozenTree;
use crate::reserve::running_tasks;
use crate::track::TaskAreas;

/// Whether a mapping is of memory that may be shared.
pub fn is_segment(mapping: &Mapping) -> bool {
    mapping.shared && is_memory_name(&mapping.name)
}

/// Opens the segments that tasks have mapped, by their numbers in the images. One that cannot be opened is
/// left to the final dump.
pub fn open_mapped(
    tree: &FrozenTree,
    areas: &[TaskAreas],
) -> Result<BTreeMap<u64, Segment>, DumpError> {
    let mut segments = BTreeMap::new();
    if areas.iter().all(|task| task.shared.is_empty()) {
        return Ok(segments);
    }
    let memory = SharedMemoryDevice::probe()?;
    for (task, areas) in tree.living().zip(areas) {
        for mapping in &areas.shared {
            let system_v = mapping.name.starts_with(b"/SYSV");
            if system_v && segments.contains_key(&mapping.inode) {
                continue;
            }
            let name = format!("map_files/{}", mapping.map_files_name());
            let Ok(file) = task.proc.open_file(&name, OFlags::RDONLY) else {
                tracing::debug!(pid = task.pid.0, name, "left to the final dump");
                continue;
            };
            let Ok(stat) = rustix::fs::fstat(&file) else {
                continue;
            };
            if SharedMemoryDevice(stat.st_dev) != memory
                && huge_flag(task.pid, file.as_fd())?.is_none()
            {
                continue;
            }
            // System V segments are numbered for themselves.
            let id = match system_v {
                true => mapping.inode,
                false => segment_id(&stat).into(),
            };
            let size = stat.st_size.cast_unsigned();
            segments.entry(id).or_insert(Segment { id, file, size });
        }
    }
    Ok(segments)
}

/// Smaller ones are read as fast.
const WORTHWHILE: u64 = 1 << 20;

/// Segments of a running tree, mapped here, by device and inode.
#[derive(Debug, Default)]
pub struct MappedSegments(HashMap<(u64, u64), Arc<MappedFile>>);

impl MappedSegments {
    /// Maps the large ones that can be found now. What fails is read instead. A memfd is read as well: it
    /// can be made shorter, and then touching its mapping is the end of whoever does.
    pub fn of_running(root: HostPid) -> MappedSegments {
        let mut found = MappedSegments::default();
        let Ok(memory) = SharedMemoryDevice::probe() else {
            return found;
        };
        for proc in running_tasks(root) {
            let text = proc.read("maps").unwrap_or_default();
            let mappings = parse_maps(&text).unwrap_or_default();
            for mapping in mappings.iter().filter(|mapping| is_steady(mapping)) {
                found.add(&proc, mapping, memory);
            }
        }
        found
    }

    fn add(&mut self, proc: &ProcDir, mapping: &Mapping, memory: SharedMemoryDevice) -> Option<()> {
        let name = format!("map_files/{}", mapping.map_files_name());
        let file = proc.open_file(&name, OFlags::RDONLY).ok()?;
        let stat = rustix::fs::fstat(&file).ok()?;
        let (key, size) = ((stat.st_dev, stat.st_ino), stat.st_size.cast_unsigned());
        let is_known = self.0.contains_key(&key);
        if is_known || SharedMemoryDevice(stat.st_dev) != memory || size < WORTHWHILE {
            return None;
        }
        let mapped = MappedFile::of(&file, size).ok()?;
        for run in data_runs(&file, size).ok()? {
            mapped.populate(run.start..run.end()).ok()?;
        }
        self.0.insert(key, Arc::new(mapped));
        Some(())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// That of an open file.
    pub fn of(&self, file: BorrowedFd<'_>) -> Option<Arc<MappedFile>> {
        let stat = rustix::fs::fstat(file).ok()?;
        self.0.get(&(stat.st_dev, stat.st_ino)).cloned()
    }
}

/// Whether a mapping is of shared memory that keeps its length.
fn is_steady(mapping: &Mapping) -> bool {
    let is_large = mapping.end.0 - mapping.start.0 >= WORTHWHILE;
    is_large && is_segment(mapping) && !mapping.name.starts_with(b"/memfd:")
}
