//! Tracking by a userfaultfd: `UFFDIO_REGISTER` for asynchronous write protection, `PAGEMAP_SCAN` that
//! reports and protects in one step (Linux 6.7+).
//!
//! The kernel keeps the registration with the mapping: a new mapping has none, nor one that was moved
//! (`mremap`), nor those of a forked child or of a new program. So "registered with our descriptor" is
//! what makes a page trustworthy, and no comparison of maps is needed.

use std::collections::{HashMap, HashSet};
use std::io;

use floe_kernel::ids::{HostPid, PAGE_SIZE, TaskAddr};
use floe_kernel::pagemap::{PageRegion, Pagemap, Query, category};
use floe_kernel::uffd::Uffd;

use super::{Area, DirtyTracker, TrackError, TrackerKind};
use crate::runs::{difference, normalised, push_run};
use crate::select::{PageRun, Selection};

/// Regions that one ioctl may return.
const REGIONS: usize = 8192;

/// Runs that are protected one by one.
const FEW_RUNS: usize = 512;

/// Write protection of one task's memory.
#[derive(Debug)]
pub struct UffdTracker {
    pid: HostPid,
    pagemap: Pagemap,
    uffd: Uffd,
    /// Whether pages that are protected now are as the last round copied them.
    continued: bool,
    /// Pages that a round could not copy for sure.
    unsure: Vec<PageRun>,
    /// What the renewal of the protection found; `None` until then.
    armed: Option<Armed>,
    /// Areas that were not protected before.
    fresh: Vec<Area>,
    /// What a survey found unchanged, by the area.
    surveyed: HashMap<(u64, u64), Vec<PageRun>>,
    regions: Vec<PageRegion>,
}

/// What was found while the task was stopped and protected anew.
#[derive(Debug)]
struct Armed {
    /// Pages that were written, or not tracked, before.
    written: Vec<PageRun>,
    /// Starts of the areas that were registered before. The program runs on, so this cannot be asked
    /// again later.
    tracked: HashSet<u64>,
}

impl UffdTracker {
    /// Tracks the task behind an open `/proc/<pid>/pagemap` with a descriptor made in it.
    pub fn new(pid: HostPid, pagemap: Pagemap, uffd: Uffd) -> Self {
        UffdTracker {
            pid,
            pagemap,
            uffd,
            continued: false,
            unsure: Vec::new(),
            armed: None,
            fresh: Vec::new(),
            surveyed: HashMap::new(),
            regions: Vec::new(),
        }
    }

    /// Goes on from the last round, which left these pages unsure.
    pub fn continued(mut self, unsure: Vec<PageRun>) -> Self {
        self.continued = true;
        self.unsure = normalised(unsure);
        self
    }

    /// Gives the descriptor back, which ends nothing as long as it stays open.
    pub fn into_uffd(self) -> Uffd {
        self.uffd
    }

    /// Whether the mapping at `start` is registered with our own descriptor.
    fn is_ours(&mut self, area: &Area) -> io::Result<bool> {
        let any = Query {
            required: category::WP_ALLOWED,
            returned: category::WP_ALLOWED,
            ..Query::default()
        };
        let start = area.range.start;
        let first = TaskAddr(start.0 + PAGE_SIZE);
        let mut region = [PageRegion::default()];
        if self.pagemap.scan(start, first, &any, &mut region)?.regions == 0 {
            return Ok(false);
        }
        Ok(self.register(area).is_ok())
    }

    fn register(&self, area: &Area) -> io::Result<()> {
        let len = area.range.end.0 - area.range.start.0;
        self.uffd.register_write_protect(area.range.start, len)
    }

    /// Whether any of these areas is registered with our descriptor. None is when the task became
    /// another program, whose address space this descriptor cannot reach.
    pub fn is_alive(&mut self, areas: &[Area]) -> bool {
        areas.iter().any(|area| self.is_ours(area).unwrap_or(false))
    }

    fn walk(
        &mut self,
        area: &Area,
        query: &Query,
        protect: bool,
        found: &mut Vec<PageRun>,
    ) -> io::Result<()> {
        self.regions.resize(REGIONS, PageRegion::default());
        let (mut at, end) = (area.range.start, area.range.end);
        while at < end {
            let scanned = if protect {
                self.pagemap
                    .scan_and_protect(at, end, query, &mut self.regions)?
            } else {
                self.pagemap.scan(at, end, query, &mut self.regions)?
            };
            for region in &self.regions[..scanned.regions] {
                push_run(found, region.start, region.end);
            }
            at = scanned.walked_to.max(TaskAddr(at.0 + PAGE_SIZE));
        }
        Ok(())
    }

    fn failed(&self, area: &Area, source: io::Error) -> TrackError {
        TrackError::Scan {
            pid: self.pid,
            start: area.range.start,
            end: area.range.end,
            source,
        }
    }

    /// Protects one area; what was written in it, or all of it when it was not protected before, goes to
    /// `armed`.
    fn arm_area(&mut self, area: &Area, armed: &mut Armed) -> io::Result<()> {
        if !(self.continued && self.is_ours(area)?) {
            // Another descriptor has it, or it cannot be tracked: it stays unprotected, so all of its
            // pages are copied every time. Only a stopped task is registered: once it runs, the range
            // may be a part of another mapping, which would be split.
            if self.register(area).is_ok() {
                self.fresh.push(area.clone());
            }
            return Ok(());
        }
        let mut query = present(area.selection);
        query.required |= category::WRITTEN;
        armed.tracked.insert(area.range.start.0);
        self.walk(area, &query, true, &mut armed.written)
    }

    /// Protects all pages of an area for the first time. A scan that protects takes for each page several
    /// times as long as the protection of a range.
    fn protect_all(&mut self, area: &Area) -> io::Result<()> {
        let query = present(area.selection);
        let mut runs = Vec::new();
        self.walk(area, &query, false, &mut runs)?;
        if runs.len() > FEW_RUNS {
            return self.walk(area, &query, true, &mut Vec::new());
        }
        runs.iter().try_for_each(|run| {
            let start = TaskAddr(run.start);
            self.uffd.write_protect(start, run.pages * PAGE_SIZE)
        })
    }
}

/// Pages with content of their own. Not those of the zero page: they are protected by nature. A page
/// without content must not match, or the protecting scan would fill the page tables with markers.
fn present(selection: Selection) -> Query {
    let unwanted = match selection {
        Selection::CopiedOnWrite => category::ZERO | category::FILE,
        Selection::Anonymous | Selection::Everything => category::ZERO,
    };
    Query {
        inverted: unwanted,
        required: unwanted,
        any_of: category::PRESENT | category::SWAPPED,
        returned: 0,
    }
}

/// Protected pages that were not written. Where a private mapping of a file lost a page
/// (`MADV_DONTNEED`), a marker stays that cannot be told from a swapped page, so only present ones count
/// there.
fn protected(selection: Selection) -> Query {
    let mut query = present(selection);
    query.inverted |= category::WRITTEN;
    query.required |= category::WRITTEN | category::WP_ALLOWED;
    if selection != Selection::Anonymous {
        query.any_of = category::PRESENT;
    }
    query
}

fn key(area: &Area) -> (u64, u64) {
    (area.range.start.0, area.range.end.0)
}

impl DirtyTracker for UffdTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::Uffd
    }

    fn arm(&mut self, areas: &[Area]) -> Result<(), TrackError> {
        let mut armed = Armed {
            written: Vec::new(),
            tracked: HashSet::new(),
        };
        for area in areas {
            let result = self.arm_area(area, &mut armed);
            result.map_err(|source| self.failed(area, source))?;
        }
        armed.written = normalised(armed.written);
        self.armed = Some(armed);
        Ok(())
    }

    fn arm_fresh(&mut self) -> Result<(), TrackError> {
        for area in std::mem::take(&mut self.fresh) {
            // The task may have unmapped it: what is not protected is copied every time.
            let _ = self.protect_all(&area);
        }
        Ok(())
    }

    fn survey(&mut self, areas: &[Area]) -> Result<(), TrackError> {
        for area in areas {
            let clean = self.unchanged(area, &[])?;
            self.surveyed.insert(key(area), clean);
        }
        Ok(())
    }

    fn unchanged(&mut self, area: &Area, _present: &[PageRun]) -> Result<Vec<PageRun>, TrackError> {
        if let Some(clean) = self.surveyed.remove(&key(area)) {
            return Ok(clean);
        }
        let tracked = match &self.armed {
            _ if !self.continued => false,
            Some(armed) => armed.tracked.contains(&area.range.start.0),
            None => {
                let ours = self.is_ours(area);
                ours.map_err(|source| self.failed(area, source))?
            }
        };
        let mut clean = Vec::new();
        if !tracked {
            return Ok(clean);
        }
        let walked = self.walk(area, &protected(area.selection), false, &mut clean);
        walked.map_err(|source| self.failed(area, source))?;
        if let Some(armed) = &self.armed {
            clean = difference(&clean, &armed.written);
        }
        Ok(difference(&clean, &self.unsure))
    }
}
