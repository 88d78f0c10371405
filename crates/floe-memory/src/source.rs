//! Where pages are read from.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use floe_kernel::ids::{HostPid, PAGE_SIZE, TaskAddr};
use floe_kernel::vm::{self, RemoteRange};

use crate::select::PageRun;

/// Something that has pages at addresses.
pub trait PageSource: Send + Sync + std::fmt::Debug {
    /// Reads `runs` one after another; they fill `buffer` exactly.
    fn read(&self, runs: &[PageRun], buffer: &mut [u8]) -> io::Result<()>;
}

/// Readable memory of a task.
#[derive(Debug)]
pub struct TaskPages(pub HostPid);

impl PageSource for TaskPages {
    fn read(&self, runs: &[PageRun], buffer: &mut [u8]) -> io::Result<()> {
        let ranges: Vec<RemoteRange> = runs
            .iter()
            .map(|run| RemoteRange {
                start: TaskAddr(run.start),
                len: (run.pages * PAGE_SIZE) as usize,
            })
            .collect();
        let mut done = 0;
        // Chunks of what one call takes; a short read names the page that failed with the next call.
        for part in ranges.chunks(vm::MAX_RANGES) {
            let len: usize = part.iter().map(|range| range.len).sum();
            read_part(self.0, part, &mut buffer[done..done + len])?;
            done += len;
        }
        Ok(())
    }
}

fn read_part(pid: HostPid, ranges: &[RemoteRange], buffer: &mut [u8]) -> io::Result<()> {
    let read = vm::read_ranges(pid, ranges, buffer)?;
    if read == buffer.len() {
        return Ok(());
    }
    let mut at = 0;
    for range in ranges {
        let end = at + range.len;
        if end > read {
            let inside = read.saturating_sub(at);
            let start = TaskAddr(range.start.0 + inside as u64);
            vm::read_exact(pid, start, &mut buffer[at + inside..end])
                .map_err(|error| io::Error::new(error.kind(), format!("at {start}: {error}")))?;
        }
        at = end;
    }
    Ok(())
}

/// Memory of a task that its own protection bits hide, through `/proc/<pid>/mem`.
#[derive(Debug)]
pub struct ForcedTaskPages(pub OwnedFd);

impl PageSource for ForcedTaskPages {
    fn read(&self, runs: &[PageRun], buffer: &mut [u8]) -> io::Result<()> {
        read_file(&self.0, runs, buffer)
    }
}

/// Memory of a task that runs: what it unmaps on the way reads as zeros, and is noted as unsure.
#[derive(Debug)]
pub struct LivePages {
    /// Reads fast, but the kernel copies pages for it that the task shares with a forked one.
    plain: Option<TaskPages>,
    forced: ForcedTaskPages,
    unsure: Arc<Mutex<Vec<PageRun>>>,
}

impl LivePages {
    /// The task's memory, also through its open `/proc/<pid>/mem`; pages that could not be read are
    /// added to `unsure`.
    pub fn new(pid: HostPid, memory: OwnedFd, unsure: Arc<Mutex<Vec<PageRun>>>) -> Self {
        LivePages {
            plain: Some(TaskPages(pid)),
            forced: ForcedTaskPages(memory),
            unsure,
        }
    }

    /// For a task that was forked, or forks: `process_vm_readv(2)` pins the pages that it reads, which
    /// ends their sharing with other tasks (Linux 5.19+), so memory would grow. Takes twice as long.
    pub fn keeping_shared(mut self) -> Self {
        self.plain = None;
        self
    }

    fn read_runs(&self, runs: &[PageRun], buffer: &mut [u8]) -> io::Result<()> {
        match &self.plain {
            Some(plain) => plain.read(runs, buffer),
            None => self.forced.read(runs, buffer),
        }
    }

    fn read_page(&self, page: PageRun, buffer: &mut [u8]) {
        // A page that the program hid from itself is still there, and is read past its protection.
        if matches!(rustix::io::pread(&self.forced.0, &mut *buffer, page.start), Ok(read) if read == buffer.len())
        {
            return;
        }
        buffer.fill(0);
        self.unsure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(page);
    }
}

impl PageSource for LivePages {
    fn read(&self, runs: &[PageRun], buffer: &mut [u8]) -> io::Result<()> {
        if self.read_runs(runs, buffer).is_ok() {
            return Ok(());
        }
        let mut rest = buffer;
        for run in runs {
            let (part, after) = rest.split_at_mut((run.pages * PAGE_SIZE) as usize);
            if self.read_runs(&[*run], part).is_err() {
                for (index, page) in part.chunks_mut(PAGE_SIZE as usize).enumerate() {
                    let start = run.start + index as u64 * PAGE_SIZE;
                    self.read_page(PageRun { start, pages: 1 }, page);
                }
            }
            rest = after;
        }
        Ok(())
    }
}

/// Pages of a file (shared memory, memfd), by offset. Past the end of the file they are zero.
#[derive(Debug)]
pub struct FilePages(pub OwnedFd);

impl PageSource for FilePages {
    fn read(&self, runs: &[PageRun], buffer: &mut [u8]) -> io::Result<()> {
        read_file(&self.0, runs, buffer)
    }
}

fn read_file(file: impl AsFd, runs: &[PageRun], buffer: &mut [u8]) -> io::Result<()> {
    let mut rest = buffer;
    for run in runs {
        let (mut part, after) = rest.split_at_mut((run.pages * PAGE_SIZE) as usize);
        let mut offset = run.start;
        while !part.is_empty() {
            match rustix::io::pread(&file, &mut *part, offset) {
                Ok(0) => {
                    part.fill(0);
                    break;
                }
                Ok(read) => {
                    offset += read as u64;
                    part = &mut part[read..];
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        rest = after;
    }
    Ok(())
}
