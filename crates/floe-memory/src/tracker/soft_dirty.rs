//! Tracking by soft-dirty bits, as CRIU does: `/proc/<pid>/clear_refs` clears them, a write sets the
//! page's, a new mapping has them set (Documentation/admin-guide/mm/soft-dirty.rst).
//!
//! The bits belong to everybody: whether the last one who cleared them was our last round is for the
//! caller to know, who says so by `continued`.

use std::fs::File;
use std::io::Write;

use floe_kernel::ids::{HostPid, PAGE_SIZE, TaskAddr};
use floe_kernel::pagemap::{Pagemap, entry};

use super::{Area, DirtyTracker, TrackError, TrackerKind};
use crate::runs::{difference, normalised, push_run};
use crate::select::PageRun;

/// Pagemap entries that are read at once.
const ENTRIES: usize = 32 * 1024;

/// Reads and clears the soft-dirty bits of one task.
#[derive(Debug)]
pub struct SoftDirtyTracker {
    pid: HostPid,
    pagemap: Pagemap,
    clear_refs: File,
    /// Whether the bits count from the last round on.
    continued: bool,
    /// What was written before they were cleared; `None` until then.
    written: Option<Vec<PageRun>>,
}

impl SoftDirtyTracker {
    /// Tracks the task behind an open `pagemap` and a writable `clear_refs`.
    pub fn new(pid: HostPid, pagemap: Pagemap, clear_refs: File, continued: bool) -> Self {
        SoftDirtyTracker {
            pid,
            pagemap,
            clear_refs,
            continued,
            written: None,
        }
    }

    /// Pages of `start..end` that are there with the bit as `dirty` says.
    fn pages(&self, start: u64, end: u64, dirty: bool) -> Result<Vec<PageRun>, TrackError> {
        let mut found = Vec::new();
        let mut entries = vec![0u64; ENTRIES];
        let mut at = start;
        while at < end {
            let wanted = ENTRIES.min(((end - at) / PAGE_SIZE) as usize);
            let read = self
                .pagemap
                .entries(TaskAddr(at), &mut entries[..wanted])
                .map_err(|source| TrackError::Scan {
                    pid: self.pid,
                    start: TaskAddr(start),
                    end: TaskAddr(end),
                    source,
                })?;
            for (index, bits) in entries[..read].iter().enumerate() {
                let there = bits & (entry::PRESENT | entry::SWAPPED) != 0;
                if there && (bits & entry::SOFT_DIRTY != 0) == dirty {
                    let page = at + index as u64 * PAGE_SIZE;
                    push_run(&mut found, page, page + PAGE_SIZE);
                }
            }
            if read == 0 {
                break;
            }
            at += read as u64 * PAGE_SIZE;
        }
        Ok(found)
    }
}

impl DirtyTracker for SoftDirtyTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::SoftDirty
    }

    fn arm(&mut self, areas: &[Area]) -> Result<(), TrackError> {
        let mut written = Vec::new();
        for area in areas {
            written.extend(self.pages(area.range.start.0, area.range.end.0, true)?);
        }
        self.clear_refs
            .write_all(b"4")
            .map_err(|source| TrackError::Clear {
                pid: self.pid,
                source,
            })?;
        self.written = Some(normalised(written));
        Ok(())
    }

    fn arm_fresh(&mut self) -> Result<(), TrackError> {
        Ok(())
    }

    fn survey(&mut self, _areas: &[Area]) -> Result<(), TrackError> {
        Ok(())
    }

    fn unchanged(&mut self, area: &Area, _present: &[PageRun]) -> Result<Vec<PageRun>, TrackError> {
        if !self.continued {
            return Ok(Vec::new());
        }
        let clean = self.pages(area.range.start.0, area.range.end.0, false)?;
        Ok(match &self.written {
            Some(written) => difference(&clean, written),
            None => clean,
        })
    }
}
