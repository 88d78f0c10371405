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
use std::sync::{Arc, Mutex, OnceLock};

use floe_image::PagesReader;
use floe_inject::Arg;
use floe_kernel::ids::{HostPid, PAGE_SIZE, TaskAddr, TaskFd};
use floe_kernel::pidfd::Pidfd;
use floe_kernel::uffd::{USER_MODE_ONLY, Uffd};
use floe_kernel::vm::{self, RemoteWrite};
use floe_memory::{PageIndex, StoredRun};

use super::error::MemoryError;
use super::map::{Puppet, Steps};
use super::parents::ParentPages;
use super::plan::MemoryPlan;
use super::work::{Batch, Method, Piece, Work};

/// Below this much, a thread costs more than it saves.
const BYTES_PER_WORKER: u64 = 4 << 20;

/// How to fill.
#[derive(Clone, Debug)]
pub struct FillOptions {
    /// Threads to use at most.
    pub workers: usize,
    /// Whether userfaultfd may be used; without it all is written.
    pub userfaultfd: bool,
    /// Content of parents, for all tasks of a tree.
    pub parents: Arc<ParentPages>,
    /// Whether pages must be read once and in their order, because they come through a pipe.
    pub in_order: bool,
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
        parent: plan.parent_pages.as_ref(),
        parents: &options.parents,
        in_order: options.in_order,
        memory: OnceLock::new(),
        uffd: None,
    };
    if let Some(vdso) = plan.vdso.as_ref().filter(|_| !plan.keeps_vdso)
        && let Some(old) = &vdso.old
    {
        filler.force(old.code.start, &old.bytes)?;
    }
    // Some kernels let only the tracer force writes.
    let mut stats = filler.run(&work.forced, 1)?;
    stats.add(filler.run(&work.written, options.workers)?);
    if work.registered.is_empty() {
        stats.add(filler.run(&work.ordered, 1)?);
        return Ok(stats);
    }
    let (uffd, remote) = register(&work.registered, puppet)?;
    let filler = Filler {
        uffd: Some(uffd),
        ..filler
    };
    stats.add(filler.run(&work.copied, options.workers)?);
    stats.add(filler.run(&work.ordered, 1)?);
    let args = [remote.0 as u64, 0, 0, 0, 0, 0];
    let close = ("close of the userfaultfd", libc::SYS_close);
    puppet.arena.call(puppet.thread, close, args)?;
    Ok(stats)
}

/// Makes a userfaultfd in the task, gets it and registers what it is to fill.
fn register(ranges: &[Range<u64>], puppet: &mut Puppet<'_>) -> Result<(Uffd, TaskFd), MemoryError> {
    let pid = puppet.thread.pid();
    let failed = |what| move |source| MemoryError::Task { pid, what, source };
    // The task is stopped, so nothing faults meanwhile; and it may have no privilege over the system.
    let flags = libc::O_CLOEXEC | USER_MODE_ONLY;
    let args = [flags as u64, 0, 0, 0, 0, 0];
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

/// The pages files of an index, opened at most once each.
struct Pages<'a> {
    index: &'a PageIndex,
    files: Vec<OnceLock<Arc<PagesReader>>>,
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
    parent: Option<&'a Arc<PageIndex>>,
    parents: &'a ParentPages,
    in_order: bool,
    memory: OnceLock<File>,
    uffd: Option<Uffd>,
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
            let mut buffer = Vec::new();
            let mut outcome = Ok(());
            while !failed.load(Ordering::Relaxed) {
                let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) else {
                    break;
                };
                outcome = self.fill_batch(batch, &mut buffer, &mut stats);
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
        buffer: &mut Vec<u8>,
        stats: &mut FillStats,
    ) -> Result<(), MemoryError> {
        if buffer.len() < batch.len as usize {
            buffer.resize(batch.len as usize, 0);
        }
        let content = &mut buffer[..batch.len as usize];
        self.pages.read(batch.file, batch.offset, content)?;
        let mut writes = Vec::new();
        let mut at = 0;
        for piece in &batch.pieces {
            let bytes = &content[at..at + piece.len as usize];
            at += bytes.len();
            if !piece.compared {
                self.give(piece, bytes, &mut writes)?;
                stats.restored += piece.len / PAGE_SIZE;
                continue;
            }
            for range in self.differing(piece, bytes, stats)? {
                let part = Piece {
                    start: piece.start + range.start as u64,
                    ..*piece
                };
                self.give(&part, &bytes[range], &mut writes)?;
            }
        }
        self.write(&writes)
    }

    /// Gives content at once, or notes what one call can write together.
    fn give<'b>(
        &self,
        piece: &Piece,
        bytes: &'b [u8],
        writes: &mut Vec<RemoteWrite<'b>>,
    ) -> Result<(), MemoryError> {
        match piece.method {
            Method::Copy => self.copy(piece.start, bytes),
            Method::Force => self.force(piece.start, bytes),
            Method::Write => {
                writes.push(RemoteWrite {
                    start: TaskAddr(piece.start),
                    bytes,
                });
                Ok(())
            }
        }
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
                // Someone looked at the page first, as `ps` does at command lines.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    let page = &rest[..rest.len().min(PAGE_SIZE as usize)];
                    self.force(to, page)?;
                    at += page.len();
                }
                Err(source) => return Err(self.failed("UFFDIO_COPY", to, rest, source)),
            }
        }
        Ok(())
    }

    fn write(&self, writes: &[RemoteWrite<'_>]) -> Result<(), MemoryError> {
        for part in writes.chunks(vm::MAX_RANGES) {
            let wanted: usize = part.iter().map(|write| write.bytes.len()).sum();
            let failed = |source| {
                let first = part[0];
                self.failed("process_vm_writev", first.start.0, first.bytes, source)
            };
            match vm::write_scattered(self.pid, part) {
                Ok(done) if done == wanted => {}
                Ok(_) => return Err(failed(std::io::Error::from_raw_os_error(libc::EFAULT))),
                Err(source) => return Err(failed(source)),
            }
        }
        Ok(())
    }

    fn force(&self, start: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let written = self
            .memory()
            .and_then(|memory| memory.write_all_at(bytes, start));
        written.map_err(|source| self.failed("writing /proc/PID/mem", start, bytes, source))
    }

    /// The task's memory, past its protection.
    fn memory(&self) -> std::io::Result<&File> {
        if let Some(memory) = self.memory.get() {
            return Ok(memory);
        }
        let path = format!("/proc/{}/mem", self.pid);
        let opened = File::options().read(true).write(true).open(path)?;
        Ok(self.memory.get_or_init(|| opened))
    }

    /// Calls `see` with the parent's content of a run: offset in it, and bytes, part by part. What
    /// passes by cannot be read again, but the task has inherited it.
    fn parents_content(
        &self,
        parent: &Arc<PageIndex>,
        run: &StoredRun,
        mut see: impl FnMut(usize, &[u8]),
    ) -> Result<(), MemoryError> {
        if !self.in_order {
            return self.parents.read(parent, run, see);
        }
        let mut bytes = vec![0; run.len as usize];
        let read = self
            .memory()
            .and_then(|memory| memory.read_exact_at(&mut bytes, run.start));
        read.map_err(|source| self.failed("reading /proc/PID/mem", run.start, &bytes, source))?;
        see(0, &bytes);
        Ok(())
    }

    /// The parts of a piece that differ from the parent's pages, or that the parent has not.
    fn differing(
        &self,
        piece: &Piece,
        bytes: &[u8],
        stats: &mut FillStats,
    ) -> Result<Vec<Range<usize>>, MemoryError> {
        const PAGE: usize = PAGE_SIZE as usize;
        let parent = self.parent.expect("pieces are compared with a parent's");
        let mut equal = vec![false; bytes.len() / PAGE];
        for run in parent.runs_in(piece.start..piece.start + piece.len) {
            let at = (run.start - piece.start) as usize;
            self.parents_content(parent, &run, |offset, theirs| {
                let at = at + offset;
                let own = bytes[at..at + theirs.len()].chunks_exact(PAGE);
                for (index, (own, theirs)) in own.zip(theirs.chunks_exact(PAGE)).enumerate() {
                    stats.compared += 1;
                    equal[at / PAGE + index] = own == theirs;
                }
            })?;
        }
        let mut differing: Vec<Range<usize>> = Vec::new();
        for (page, equal) in equal.into_iter().enumerate() {
            let range = page * PAGE..(page + 1) * PAGE;
            if equal {
                stats.shared += 1;
                continue;
            }
            stats.restored += 1;
            match differing.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => differing.push(range),
            }
        }
        Ok(differing)
    }
}
