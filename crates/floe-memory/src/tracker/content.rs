//! Tracking by content: a page is unchanged when the parent has the same bytes.
//!
//! Needs nothing of the kernel and no state between two rounds, and works on the images of any engine:
//! what counts is only what the parent really holds. The price is that all memory is read, in the final
//! dump while the program is stopped.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use floe_image::PagesReader;
use floe_kernel::ids::PAGE_SIZE;
use floe_kernel::mapped_file::MappedFile;

use super::{Area, DirtyTracker, TrackError, TrackerKind};
use crate::resolve::{PageIndex, StoredRun};
use crate::runs::{normalised, push_run};
use crate::select::PageRun;
use crate::source::PageSource;

/// Bytes that are compared at once: small enough that both sides stay in the second-level cache.
const CHUNK: u64 = 256 << 10;
/// Pieces from which on a second thread pays.
const MANY: usize = 64;
/// Threads that compare: the program stands still, so nobody else needs the processors of most machines.
const WORKERS: usize = 2;

/// Compares the pages of a source with those of a chain of images.
#[derive(Debug)]
pub struct ContentTracker {
    pages: Arc<dyn PageSource>,
    parent: Arc<PageIndex>,
    maps: Option<Maps>,
}

/// Both sides, mapped: comparing them copies nothing.
#[derive(Clone, Debug)]
pub struct Maps {
    pub now: Arc<MappedFile>,
    pub before: Arc<MappedPages>,
}

/// The pages files of an index, mapped, by their numbers; `None` for one that cannot be.
#[derive(Debug)]
pub struct MappedPages(Vec<Option<MappedFile>>);

impl MappedPages {
    /// Maps what `parent` has, and reads it if it is not in memory.
    pub fn of(parent: &PageIndex) -> MappedPages {
        let open = |number| {
            let file = parent.open(number).ok()?;
            let file = file.as_plain()?;
            let mapped = MappedFile::of(file, file.metadata().ok()?.len()).ok()?;
            let runs = parent.runs().iter().filter(|run| run.file == number);
            for run in runs {
                let first = run.offset / PAGE_SIZE * PAGE_SIZE;
                // What cannot be read must not be touched.
                mapped.populate(first..run.offset + run.len).ok()?;
            }
            Some(mapped)
        };
        MappedPages((0..parent.file_count()).map(open).collect())
    }
}

/// A piece of at most [`CHUNK`] bytes, and the file that has what it was.
type Piece = (StoredRun, Arc<PagesReader>);

impl ContentTracker {
    /// Compares `pages` with what `parent` has.
    pub fn new(pages: Arc<dyn PageSource>, parent: Arc<PageIndex>) -> Self {
        ContentTracker {
            pages,
            parent,
            maps: None,
        }
    }

    /// Compares through mappings where they reach.
    pub fn with_maps(mut self, maps: Option<Maps>) -> Self {
        self.maps = maps;
        self
    }

    /// Compares a piece through mappings; `None` where there are none.
    fn compare_mapped(&self, stored: &StoredRun, unchanged: &mut Vec<PageRun>) -> Option<()> {
        let maps = self.maps.as_ref()?;
        let before = maps.before.0.get(stored.file as usize)?.as_ref()?;
        let (start, offset) = (stored.start, stored.offset);
        if stored.end() > maps.now.size() || offset + stored.len > before.size() {
            return None;
        }
        for done in (0..stored.len).step_by(PAGE_SIZE as usize) {
            let page = start + done;
            if maps.now.same(page, (before, offset + done), PAGE_SIZE) {
                push_run(unchanged, page, page + PAGE_SIZE);
            }
        }
        Some(())
    }

    /// What the parent has of these pages, in pieces.
    fn pieces(&self, present: &[PageRun]) -> Result<Vec<Piece>, TrackError> {
        let mut files = vec![None; self.parent.file_count() as usize];
        let mut pieces = Vec::new();
        for run in present {
            for stored in self.parent.runs_in(run.start..run.end()) {
                let slot: &mut Option<Arc<PagesReader>> = &mut files[stored.file as usize];
                let file = match slot {
                    Some(file) => file,
                    None => slot.insert(self.parent.open(stored.file)?),
                };
                for done in (0..stored.len).step_by(CHUNK as usize) {
                    let piece = StoredRun {
                        start: stored.start + done,
                        len: CHUNK.min(stored.len - done),
                        offset: stored.offset + done,
                        ..stored
                    };
                    pieces.push((piece, file.clone()));
                }
            }
        }
        Ok(pieces)
    }

    /// Compares pieces until none is left; several threads may do so at a time.
    fn work(&self, pieces: &[Piece], next: &AtomicUsize) -> Result<Vec<PageRun>, TrackError> {
        let mut unchanged = Vec::new();
        let mut buffers = [Vec::new(), Vec::new()];
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            self.compare(piece, &mut buffers, &mut unchanged)?;
        }
        Ok(unchanged)
    }

    fn compare(
        &self,
        (stored, file): &Piece,
        [now, before]: &mut [Vec<u8>; 2],
        unchanged: &mut Vec<PageRun>,
    ) -> Result<(), TrackError> {
        if self.compare_mapped(stored, unchanged).is_some() {
            return Ok(());
        }
        let at = stored.start;
        let failed = |source| TrackError::Compare { at, source };
        now.resize(stored.len as usize, 0);
        before.resize(stored.len as usize, 0);
        file.read_exact_at(before, stored.offset).map_err(failed)?;
        let run = PageRun {
            start: at,
            pages: stored.len / PAGE_SIZE,
        };
        self.pages.read(&[run], now).map_err(failed)?;
        let size = PAGE_SIZE as usize;
        for (index, (new, old)) in now.chunks(size).zip(before.chunks(size)).enumerate() {
            if new == old {
                let page = at + index as u64 * PAGE_SIZE;
                push_run(unchanged, page, page + PAGE_SIZE);
            }
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
        let pieces = self.pieces(present)?;
        let next = AtomicUsize::new(0);
        if pieces.len() < MANY {
            return self.work(&pieces, &next);
        }
        let found = std::thread::scope(|scope| {
            let work = || self.work(&pieces, &next);
            let others: Vec<_> = (1..WORKERS).map(|_| scope.spawn(work)).collect();
            let mut all = work()?;
            for other in others {
                let found = other.join().expect("comparing does not panic");
                all.extend(found?);
            }
            Ok::<_, TrackError>(all)
        })?;
        Ok(normalised(found))
    }
}
