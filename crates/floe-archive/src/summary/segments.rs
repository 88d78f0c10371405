//! Shared memory of a checkpoint: what tasks map together, each segment once.

use std::collections::{BTreeMap, BTreeSet};

use floe_image::catalogue::ImageKind;
use floe_image::messages::{FileEntry, MemfdInodeEntry, VmaEntry};
use floe_image::{ImageDir, ImageError};
use floe_memory::PageIndex;
use serde::Serialize;

use super::{SummaryError, by_generation};
use crate::Chain;

/// Bits of `vma_entry.status`.
const ANONYMOUS: u32 = 1 << 8;
const SYSV: u32 = 1 << 10;
const MEMFD: u32 = 1 << 14;

/// What the kernel calls the file of an anonymous shared mapping.
const ANONYMOUS_NAME: &str = "/dev/zero";

/// A segment of shared memory.
#[derive(Clone, Debug, Serialize)]
pub struct SegmentSummary {
    /// Its number in the images.
    pub id: u64,
    pub object: String,
    /// Tasks that have it mapped.
    pub pids: BTreeSet<u32>,
    /// Bytes, as far as it is mapped or its file says.
    pub size: u64,
    /// Bytes of pages, as in a mapping's summary.
    pub stored: Vec<u64>,
}

/// What is known of segments while mappings are read.
#[derive(Debug)]
pub(super) struct Segments {
    /// Numbers of segments by those of the inodes of memfds.
    inodes: BTreeMap<u64, u64>,
    found: BTreeMap<u64, SegmentSummary>,
}

fn unmapped(id: u64, object: String, size: u64) -> SegmentSummary {
    SegmentSummary {
        id,
        object,
        pids: BTreeSet::new(),
        size,
        stored: Vec::new(),
    }
}

impl Segments {
    pub(super) fn read(dir: &ImageDir) -> Result<Segments, ImageError> {
        let memfds: Vec<MemfdInodeEntry> = dir.read_all(ImageKind::MemfdInode, 0)?;
        let (mut inodes, mut found) = (BTreeMap::new(), BTreeMap::new());
        for memfd in memfds {
            let id = u64::from(memfd.shmid);
            inodes.insert(memfd.inode_id, id);
            let object = match memfd.name.as_str() {
                ANONYMOUS_NAME => format!("shared {id:#x}"),
                name => format!("memfd {name}"),
            };
            found.insert(id, unmapped(id, object, memfd.size));
        }
        Ok(Segments { inodes, found })
    }

    /// Takes note of a task's mapping if it is one of a segment.
    pub(super) fn note(&mut self, pid: u32, vma: &VmaEntry, files: &BTreeMap<u32, &FileEntry>) {
        let (id, object) = if vma.status & ANONYMOUS != 0 {
            (Some(vma.shmid), "shared")
        } else if vma.status & SYSV != 0 {
            (Some(vma.shmid), "System V")
        } else if vma.status & MEMFD != 0 {
            let file = u32::try_from(vma.shmid).ok().and_then(|id| files.get(&id));
            let inode = file.and_then(|file| Some(u64::from(file.memfd.as_ref()?.inode_id)));
            (inode.and_then(|inode| self.inodes.get(&inode).copied()), "")
        } else {
            return;
        };
        let Some(id) = id else { return };
        let new = || unmapped(id, format!("{object} {id:#x}"), 0);
        let segment = self.found.entry(id).or_insert_with(new);
        segment.pids.insert(pid);
        let end = vma.pgoff.saturating_add(vma.end.saturating_sub(vma.start));
        segment.size = segment.size.max(end);
    }

    /// All that have pages in the checkpoint.
    pub(super) fn finish(
        mut self,
        dir: &ImageDir,
        chain: &Chain,
    ) -> Result<Vec<SegmentSummary>, SummaryError> {
        let mut segments = Vec::new();
        for id in dir.ids(ImageKind::ShmemPagemap)? {
            let pages = PageIndex::read(dir, ImageKind::ShmemPagemap, id)?;
            let new = || unmapped(id, format!("shared {id:#x}"), 0);
            let mut segment = self.found.remove(&id).unwrap_or_else(new);
            segment.stored = by_generation(chain, &pages, 0..u64::MAX);
            segments.push(segment);
        }
        Ok(segments)
    }
}
