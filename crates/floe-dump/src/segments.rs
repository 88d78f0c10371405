//! Shared memory in rounds: its pages are copied while the program runs, and compared by the next round.
//!
//! A segment may be written by `write(2)`, and by tasks outside of the tree, so its pages are found changed
//! by their content. What is torn here, or written later, differs then and is copied again.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use floe_kernel::proc::Mapping;
use floe_resources::collect::{Segment, SharedMemoryDevice};
use floe_resources::fd::memfd::{huge_flag, is_memory_name, segment_id};
use rustix::fs::OFlags;

use crate::error::DumpError;
use crate::freeze::FrozenTree;
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
