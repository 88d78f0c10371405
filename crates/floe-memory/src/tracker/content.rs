//! Tracking by content: a page is unchanged when the parent has the same bytes.
//!
//! Needs nothing of the kernel and no state between two rounds, and works on the images of any engine:
//! what counts is only what the parent really holds. The price is that all memory is read, in the final
//! dump while the program is stopped.

use std::sync::Arc;

use floe_image::PagesReader;
use floe_kernel::ids::PAGE_SIZE;

use super::{Area, DirtyTracker, TrackError, TrackerKind};
use crate::resolve::{PageIndex, StoredRun};
use crate::runs::push_run;
use crate::select::PageRun;
use crate::source::PageSource;

/// Bytes that are compared at once.
const CHUNK: u64 = 1 << 20;

/// Compares the pages of a source with those of a chain of images.
#[derive(Debug)]
pub struct ContentTracker {
    pages: Arc<dyn PageSource>,
    parent: Arc<PageIndex>,
    files: Vec<Option<Arc<PagesReader>>>,
}

impl ContentTracker {
    /// Compares `pages` with what `parent` has.
    pub fn new(pages: Arc<dyn PageSource>, parent: Arc<PageIndex>) -> Self {
        let files = (0..parent.file_count()).map(|_| None).collect();
        ContentTracker {
            pages,
            parent,
            files,
        }
    }

    fn compare(
        &mut self,
        stored: StoredRun,
        buffers: &mut [Vec<u8>; 2],
        unchanged: &mut Vec<PageRun>,
    ) -> Result<(), TrackError> {
        let slot = &mut self.files[stored.file as usize];
        let file = match slot {
            Some(file) => file,
            None => slot.insert(self.parent.open(stored.file)?),
        };
        let [now, before] = buffers;
        let mut done = 0;
        while done < stored.len {
            let len = CHUNK.min(stored.len - done);
            let at = stored.start + done;
            now.resize(len as usize, 0);
            before.resize(len as usize, 0);
            let failed = |source| TrackError::Compare { at, source };
            file.read_exact_at(before, stored.offset + done)
                .map_err(failed)?;
            let run = PageRun {
                start: at,
                pages: len / PAGE_SIZE,
            };
            self.pages.read(&[run], now).map_err(failed)?;
            let size = PAGE_SIZE as usize;
            for (index, (new, old)) in now.chunks(size).zip(before.chunks(size)).enumerate() {
                if new == old {
                    let page = at + index as u64 * PAGE_SIZE;
                    push_run(unchanged, page, page + PAGE_SIZE);
                }
            }
            done += len;
        }
        Ok(())
    }
}

impl DirtyTracker for ContentTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::Content
    }

    fn arm(&mut self, _areas: &[Area]) -> Result<(), TrackError> {
        Ok(())
    }

    fn arm_fresh(&mut self) -> Result<(), TrackError> {
        Ok(())
    }

    fn survey(&mut self, _areas: &[Area]) -> Result<(), TrackError> {
        Ok(())
    }

    fn unchanged(&mut self, _area: &Area, present: &[PageRun]) -> Result<Vec<PageRun>, TrackError> {
        let mut unchanged = Vec::new();
        let mut buffers = [Vec::new(), Vec::new()];
        let parent = self.parent.clone();
        for run in present {
            for stored in parent.runs_in(run.start..run.end()) {
                self.compare(stored, &mut buffers, &mut unchanged)?;
            }
        }
        Ok(unchanged)
    }
}
