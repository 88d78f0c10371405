//! What is to be given to a mapped task, and how: decided before anything is given.

use std::ops::Range;

use floe_kernel::vm;
use floe_memory::StoredRun;

use super::fill::FillOptions;
use super::plan::MemoryPlan;
use super::region::{Origin, Region};

/// Bytes that a worker reads at once: half of a second-level cache, so that the copy into the task
/// comes from there.
const BATCH_BYTES: u64 = 512 * 1024;
/// Pieces in a batch, so that one call takes them all.
const BATCH_PIECES: usize = vm::MAX_RANGES;
/// From this much on, userfaultfd (some 40 us to set up) beats writing (1.5 us more a page).
const UFFD_FLOOR: u64 = 256 * 1024;
/// The same for one region (2 us to register).
const UFFD_REGION_FLOOR: u64 = 16 * 1024;
const HUGE_PAGE: u64 = 2 << 20;

/// How a piece gets into the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    /// `UFFDIO_COPY`.
    Copy,
    /// `process_vm_writev`.
    Write,
    /// `/proc/PID/mem`.
    Force,
}

/// Content for consecutive addresses, consecutive in its batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub start: u64,
    pub len: u64,
    pub method: Method,
    /// Whether only pages that differ from the parent's are given.
    pub compared: bool,
}

/// Consecutive bytes of one pages file.
#[derive(Debug)]
pub(super) struct Batch {
    pub file: u32,
    pub offset: u64,
    pub len: u64,
    pub pieces: Vec<Piece>,
}

/// Batches in the order in which they must be done.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// Batches with a piece to be forced.
    pub forced: Vec<Batch>,
    /// The others without a piece to be copied.
    pub written: Vec<Batch>,
    pub copied: Vec<Batch>,
    /// All batches instead, in the order of the file, where they must be read so.
    pub ordered: Vec<Batch>,
    in_order: bool,
    /// What must be registered for content to be copied.
    pub registered: Vec<Range<u64>>,
    /// Pages that the parent has and the task has not.
    pub dropped: Vec<Range<u64>>,
}

impl Work {
    pub fn of(plan: &MemoryPlan, options: &FillOptions) -> Work {
        let mut work = Work {
            in_order: options.in_order,
            ..Work::default()
        };
        let amount = |region: &Region| -> u64 {
            let runs = plan.pages.runs_in(region.range.clone());
            runs.map(|run| run.len).sum()
        };
        let may_copy = |region: &&Region| {
            options.userfaultfd
                && region.is_anonymous()
                && !region.is_hugetlb()
                && region.origin == Origin::New
        };
        let copyable: u64 = plan.regions.iter().filter(may_copy).map(amount).sum();
        for region in plan.regions.iter().filter(|region| region.is_private()) {
            let huge_allowed = plan.may_get_huge_pages(region);
            let copies = may_copy(&region)
                && match huge_allowed {
                    // One write would make a whole huge page, most of it never asked for.
                    true => amount(region) > 0,
                    false => copyable >= UFFD_FLOOR && amount(region) >= UFFD_REGION_FLOOR,
                };
            work.add(plan, region, copies, huge_allowed);
        }
        let forced = |batch: &Batch| {
            let mut methods = batch.pieces.iter().map(|piece| piece.method);
            methods.any(|method| method == Method::Force)
        };
        (work.forced, work.written) = work.written.into_iter().partition(forced);
        work
    }

    fn add(&mut self, plan: &MemoryPlan, region: &Region, copies: bool, huge_allowed: bool) {
        let plain = if region.prot & libc::PROT_WRITE as u32 != 0 || region.is_hugetlb() {
            Method::Write
        } else {
            Method::Force
        };
        let covers = match &region.origin {
            Origin::Inherited { covers, .. } => covers.clone(),
            Origin::New => region.range.start..region.range.start,
        };
        for run in plan.pages.runs_in(covers.clone()) {
            self.push(run, plain, true);
        }
        self.drop_missing(plan, covers.clone());
        let mut copied = false;
        // In what is registered nothing can be written, and in its order all is given after that.
        let writes_whole = huge_allowed && plain == Method::Write && !self.in_order;
        for run in plan.pages.runs_in(covers.end..region.range.end) {
            let whole = match (copies, writes_whole) {
                (false, _) => run.start..run.end(),
                (true, false) => run.start..run.start,
                (true, true) => whole_huge_pages(&run, &region.range),
            };
            let method = if copies { Method::Copy } else { plain };
            copied |= copies && (whole.start > run.start || whole.end < run.end());
            self.push(part(&run, run.start..whole.start), method, false);
            self.push(part(&run, whole.clone()), plain, false);
            self.push(part(&run, whole.end..run.end()), method, false);
        }
        if copied {
            self.registered.push(region.range.clone());
        }
    }

    /// What the parent has in a range and the task has not.
    fn drop_missing(&mut self, plan: &MemoryPlan, range: Range<u64>) {
        let Some(parent) = &plan.parent_pages else {
            return;
        };
        for theirs in parent.runs_in(range) {
            let mut free_from = theirs.start;
            let ends = plan.pages.runs_in(theirs.start..theirs.end());
            let ends = ends.map(|own| own.start..own.end());
            for own in ends.chain(std::iter::once(theirs.end()..theirs.end())) {
                if own.start > free_from {
                    self.dropped.push(free_from..own.start);
                }
                free_from = own.end;
            }
        }
    }

    fn push(&mut self, run: StoredRun, method: Method, compared: bool) {
        let batches = match method {
            _ if self.in_order => &mut self.ordered,
            Method::Copy => &mut self.copied,
            Method::Write | Method::Force => &mut self.written,
        };
        let mut rest = run;
        while rest.len > 0 {
            let fits = |batch: &&mut Batch| {
                batch.file == rest.file
                    && batch.offset + batch.len == rest.offset
                    && batch.len < BATCH_BYTES
                    && batch.pieces.len() < BATCH_PIECES
            };
            if batches.last_mut().as_ref().is_none_or(|batch| !fits(batch)) {
                batches.push(Batch {
                    file: rest.file,
                    offset: rest.offset,
                    len: 0,
                    pieces: Vec::new(),
                });
            }
            let batch = batches.last_mut().expect("one was just pushed");
            let len = rest.len.min(BATCH_BYTES - batch.len);
            batch.pieces.push(Piece {
                start: rest.start,
                len,
                method,
                compared,
            });
            batch.len += len;
            rest = part(&rest, rest.start + len..rest.end());
        }
    }
}

/// A part of a run.
fn part(run: &StoredRun, range: Range<u64>) -> StoredRun {
    StoredRun {
        start: range.start,
        len: range.end - range.start,
        file: run.file,
        offset: run.offset + (range.start - run.start),
    }
}

/// The part of a run that consists of whole huge pages of its region.
fn whole_huge_pages(run: &StoredRun, region: &Range<u64>) -> Range<u64> {
    let start = run.start.next_multiple_of(HUGE_PAGE);
    let end = run.end().min(region.end) / HUGE_PAGE * HUGE_PAGE;
    if start < end {
        start..end
    } else {
        run.start..run.start
    }
}
