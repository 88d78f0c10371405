//! Filling: content for the private memory of a mapped puppet.
//!
//! Nothing of it runs in the task. Missing pages of anonymous memory come by `UFFDIO_COPY`, which makes
//! exactly the pages that the image has, whatever their protection; whole huge pages and small amounts
//! by `process_vm_writev`; what the task itself may not write (relocated read-only data, copies in
//! private mappings of files) through `/proc/PID/mem`.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use floe_inject::Arg;
use floe_kernel::ids::{HostPid, PAGE_SIZE, TaskAddr, TaskFd};
use floe_kernel::pidfd::Pidfd;
use floe_kernel::uffd::Uffd;
use floe_kernel::vm::{self, RemoteRange};
use floe_memory::{PageIndex, StoredRun};

use super::error::MemoryError;
use super::map::{Puppet, Steps};
use super::plan::MemoryPlan;
use super::region::{Origin, Region};

/// Bytes that a worker reads at once: half of a second-level cache, so that the copy into the task
/// comes from there.
const BATCH_BYTES: u64 = 512 * 1024;
/// Pieces in a batch, so that one call takes them all.
const BATCH_PIECES: usize = vm::MAX_RANGES;
/// Below this much, a thread costs more than it saves.
const BYTES_PER_WORKER: u64 = 4 << 20;
/// From this much on, userfaultfd (some 40 us to set up) beats writing (1.5 us more a page).
const UFFD_FLOOR: u64 = 256 * 1024;
/// The same for one region (2 us to register).
const UFFD_REGION_FLOOR: u64 = 16 * 1024;
const HUGE_PAGE: u64 = 2 << 20;

/// How to fill.
#[derive(Clone, Copy, Debug)]
pub struct FillOptions {
    /// Threads to use at most.
    pub workers: usize,
    /// Whether userfaultfd may be used; without it all is written.
    pub userfaultfd: bool,
}

/// What was filled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FillStats {
    /// Pages given to the task.
    pub restored: u64,
    /// Pages held against the parent's.
    pub compared: u64,
    /// Pages that were equal to the parent's and stay shared with it.
    pub shared: u64,
}

impl FillStats {
    fn add(&mut self, other: FillStats) {
        self.restored += other.restored;
        self.compared += other.compared;
        self.shared += other.shared;
    }
}

/// How a piece gets into the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// `UFFDIO_COPY`.
    Copy,
    /// `process_vm_writev`.
    Write,
    /// `/proc/PID/mem`.
    Force,
    /// The last, for pages that differ from the parent's.
    Compare,
}

/// Content for consecutive addresses, consecutive in its batch.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: u64,
    len: u64,
    method: Method,
}

/// Consecutive bytes of one pages file.
#[derive(Debug)]
struct Batch {
    file: u32,
    offset: u64,
    len: u64,
    pieces: Vec<Piece>,
}

/// Batches in the order in which they must be done.
#[derive(Debug, Default)]
struct Work {
    /// Only the thread that traces the task may force writes, on kernels that restrict it.
    forced: Vec<Batch>,
    written: Vec<Batch>,
    copied: Vec<Batch>,
    /// What `copied` needs registered.
    registered: Vec<Range<u64>>,
    /// Pages that the parent has and the task has not.
    dropped: Vec<Range<u64>>,
}

/// Gives a mapped task its private pages.
pub fn fill(
    plan: &MemoryPlan,
    puppet: &mut Puppet<'_>,
    options: &FillOptions,
) -> Result<FillStats, MemoryError> {
    let work = Work::of(plan, options);
    drop_pages(&work.dropped, puppet)?;
    let filler = Filler {
        pid: puppet.thread.pid(),
        pages: Pages::new(&plan.pages),
        parent: plan.parent_pages.as_deref().map(Pages::new),
        memory: OnceLock::new(),
        uffd: None,
    };
    let mut stats = filler.run(&work.forced, 1)?;
    stats.add(filler.run(&work.written, options.workers)?);
    if work.copied.is_empty() {
        return Ok(stats);
    }
    let (uffd, remote) = register(&work.registered, puppet)?;
    let filler = Filler {
        uffd: Some(uffd),
        ..filler
    };
    stats.add(filler.run(&work.copied, options.workers)?);
    let args = [remote.0 as u64, 0, 0, 0, 0, 0];
    let close = ("close of the userfaultfd", libc::SYS_close);
    puppet.arena.call(puppet.thread, close, args)?;
    Ok(stats)
}

/// Makes a userfaultfd in the task, gets it and registers what it is to fill.
fn register(ranges: &[Range<u64>], puppet: &mut Puppet<'_>) -> Result<(Uffd, TaskFd), MemoryError> {
    let pid = puppet.thread.pid();
    let failed = |what| move |source| MemoryError::Task { pid, what, source };
    let args = [libc::O_CLOEXEC as u64, 0, 0, 0, 0, 0];
    let make = ("userfaultfd", libc::SYS_userfaultfd);
    let remote = puppet.arena.call(puppet.thread, make, args)?;
    let remote = TaskFd(remote as i32);
    let fd = Pidfd::open(pid)
        .and_then(|task| task.duplicate_fd(remote))
        .map_err(failed("getting its userfaultfd"))?;
    let uffd = Uffd::new(fd, 0).map_err(failed("UFFDIO_API"))?;
    for range in ranges {
        uffd.register_missing(TaskAddr(range.start), range.end - range.start)
            .map_err(failed("UFFDIO_REGISTER"))?;
    }
    Ok((uffd, remote))
}

fn drop_pages(ranges: &[Range<u64>], puppet: &mut Puppet<'_>) -> Result<(), MemoryError> {
    let mut steps = Steps::new(puppet);
    for range in ranges {
        let args = [
            range.start,
            range.end - range.start,
            libc::MADV_DONTNEED as u64,
        ];
        let label = format!("madvise(MADV_DONTNEED) of {:#x}", range.start);
        let program = steps.program(0)?;
        program.call(label, libc::SYS_madvise, &args.map(Arg::from));
    }
    steps.run()
}

impl Work {
    fn of(plan: &MemoryPlan, options: &FillOptions) -> Work {
        let mut work = Work::default();
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
            self.push(run, Method::Compare);
        }
        self.drop_missing(plan, covers.clone());
        let mut copied = false;
        for run in plan.pages.runs_in(covers.end..region.range.end) {
            let whole = match (copies, huge_allowed && plain == Method::Write) {
                (false, _) => run.start..run.end(),
                (true, false) => run.start..run.start,
                (true, true) => whole_huge_pages(&run, &region.range),
            };
            let method = if copies { Method::Copy } else { plain };
            copied |= copies && (whole.start > run.start || whole.end < run.end());
            self.push(part(&run, run.start..whole.start), method);
            self.push(part(&run, whole.clone()), plain);
            self.push(part(&run, whole.end..run.end()), method);
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

    fn push(&mut self, run: StoredRun, method: Method) {
        let batches = match method {
            Method::Copy => &mut self.copied,
            Method::Write => &mut self.written,
            Method::Force | Method::Compare => &mut self.forced,
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

/// The pages files of an index, opened at most once each.
struct Pages<'a> {
    index: &'a PageIndex,
    files: Vec<OnceLock<File>>,
}

impl<'a> Pages<'a> {
    fn new(index: &'a PageIndex) -> Self {
        let files = (0..index.file_count()).map(|_| OnceLock::new()).collect();
        Pages { index, files }
    }

    fn read(&self, file: u32, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryError> {
        let slot = &self.files[file as usize];
        let opened = match slot.get() {
            Some(opened) => opened,
            None => {
                let opened = self.index.open(file)?;
                slot.get_or_init(|| opened)
            }
        };
        let bytes = buffer.len();
        opened
            .read_exact_at(buffer, offset)
            .map_err(|source| MemoryError::ReadPages {
                offset,
                bytes,
                source,
            })
    }
}

/// What all workers share.
struct Filler<'a> {
    pid: HostPid,
    pages: Pages<'a>,
    parent: Option<Pages<'a>>,
    memory: OnceLock<File>,
    uffd: Option<Uffd>,
}

/// What one worker owns.
#[derive(Default)]
struct Buffers {
    own: Vec<u8>,
    parents: Vec<u8>,
}

impl Filler<'_> {
    fn run(&self, batches: &[Batch], workers: usize) -> Result<FillStats, MemoryError> {
        let bytes: u64 = batches.iter().map(|batch| batch.len).sum();
        let workers = workers.min((bytes / BYTES_PER_WORKER) as usize).max(1);
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let result = Mutex::new(Ok(FillStats::default()));
        let work = || {
            let mut stats = FillStats::default();
            let mut buffers = Buffers::default();
            let mut outcome = Ok(());
            while !failed.load(Ordering::Relaxed) {
                let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) else {
                    break;
                };
                outcome = self.fill_batch(batch, &mut buffers, &mut stats);
                if outcome.is_err() {
                    failed.store(true, Ordering::Relaxed);
                }
            }
            let mut result = result
                .lock()
                .expect("workers do not panic while they hold it");
            match (outcome, &mut *result) {
                (Err(error), Ok(_)) => *result = Err(error),
                (Ok(()), Ok(total)) => total.add(stats),
                (_, Err(_)) => {}
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..workers {
                // Without a thread the others do its part.
                let _ = std::thread::Builder::new()
                    .name("floe-fill".into())
                    .stack_size(128 * 1024)
                    .spawn_scoped(scope, work);
            }
            work();
        });
        result
            .into_inner()
            .expect("workers do not panic while they hold it")
    }

    fn fill_batch(
        &self,
        batch: &Batch,
        buffers: &mut Buffers,
        stats: &mut FillStats,
    ) -> Result<(), MemoryError> {
        buffers.own.resize(batch.len as usize, 0);
        self.pages
            .read(batch.file, batch.offset, &mut buffers.own)?;
        if batch
            .pieces
            .iter()
            .all(|piece| piece.method == Method::Write)
        {
            stats.restored += batch.len / PAGE_SIZE;
            return self.write(&batch.pieces, &buffers.own);
        }
        let mut at = 0;
        for piece in &batch.pieces {
            let bytes = &buffers.own[at..at + piece.len as usize];
            at += bytes.len();
            match piece.method {
                Method::Copy => self.copy(piece.start, bytes)?,
                Method::Write => self.write(std::slice::from_ref(piece), bytes)?,
                Method::Force => self.force(piece.start, bytes)?,
                Method::Compare => {
                    self.compare(piece.start, bytes, &mut buffers.parents, stats)?;
                    continue;
                }
            }
            stats.restored += piece.len / PAGE_SIZE;
        }
        Ok(())
    }

    fn failed(
        &self,
        how: &'static str,
        start: u64,
        bytes: &[u8],
        source: std::io::Error,
    ) -> MemoryError {
        MemoryError::Fill {
            pid: self.pid,
            how,
            start,
            bytes: bytes.len(),
            source,
        }
    }

    fn copy(&self, start: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let uffd = self.uffd.as_ref().expect("opened before pieces are copied");
        let mut at = 0;
        while at < bytes.len() {
            let (to, rest) = (start + at as u64, &bytes[at..]);
            match uffd.copy(TaskAddr(to), rest) {
                Ok(done) => at += done,
                Err(source) => return Err(self.failed("UFFDIO_COPY", to, rest, source)),
            }
        }
        Ok(())
    }

    fn write(&self, pieces: &[Piece], bytes: &[u8]) -> Result<(), MemoryError> {
        let ranges: Vec<RemoteRange> = pieces
            .iter()
            .map(|piece| RemoteRange {
                start: TaskAddr(piece.start),
                len: piece.len as usize,
            })
            .collect();
        let failed = |source| self.failed("process_vm_writev", pieces[0].start, bytes, source);
        match vm::write_ranges(self.pid, &ranges, bytes) {
            Ok(done) if done == bytes.len() => Ok(()),
            Ok(_) => Err(failed(std::io::Error::from_raw_os_error(libc::EFAULT))),
            Err(source) => Err(failed(source)),
        }
    }

    fn force(&self, start: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let failed = |source| self.failed("writing /proc/PID/mem", start, bytes, source);
        let memory = match self.memory.get() {
            Some(memory) => memory,
            None => {
                let path = format!("/proc/{}/mem", self.pid);
                let opened = File::options().write(true).open(path).map_err(failed)?;
                self.memory.get_or_init(|| opened)
            }
        };
        memory.write_all_at(bytes, start).map_err(failed)
    }

    /// Writes the pages that differ from the parent's, or that the parent has not.
    fn compare(
        &self,
        start: u64,
        bytes: &[u8],
        parents: &mut Vec<u8>,
        stats: &mut FillStats,
    ) -> Result<(), MemoryError> {
        const PAGE: usize = PAGE_SIZE as usize;
        let parent = self
            .parent
            .as_ref()
            .expect("pieces are compared with a parent's");
        let mut equal = vec![false; bytes.len() / PAGE];
        for run in parent.index.runs_in(start..start + bytes.len() as u64) {
            parents.resize(run.len as usize, 0);
            parent.read(run.file, run.offset, parents)?;
            let at = (run.start - start) as usize;
            let own = bytes[at..at + parents.len()].chunks_exact(PAGE);
            for (index, (own, theirs)) in own.zip(parents.chunks_exact(PAGE)).enumerate() {
                stats.compared += 1;
                equal[at / PAGE + index] = own == theirs;
            }
        }
        let mut page = 0;
        while page < equal.len() {
            let same = equal[page];
            let end = equal[page..].iter().position(|&other| other != same);
            let end = end.map_or(equal.len(), |len| page + len);
            if same {
                stats.shared += (end - page) as u64;
            } else {
                stats.restored += (end - page) as u64;
                self.force(
                    start + (page * PAGE) as u64,
                    &bytes[page * PAGE..end * PAGE],
                )?;
            }
            page = end;
        }
        Ok(())
    }
}
