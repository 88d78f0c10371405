//! Moving pages from sources to sinks with several threads and little memory.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use floe_image::{PIECE_BYTES, PieceHashes};
use floe_kernel::ids::PAGE_SIZE;

use crate::select::PageRun;
use crate::source::PageSource;

/// Bytes that a worker reads before it writes them. Small enough to stay in the second-level cache,
/// so that the write reads it from there; and what a sink can hash by itself.
const BATCH_BYTES: u64 = PIECE_BYTES;

/// Less is copied by the caller while it waits for the end: a thread takes longer to start.
const WORTH_A_THREAD: u64 = 1 << 20;

/// Something that takes pages at offsets.
pub trait PageSink: Send + Sync + std::fmt::Debug {
    /// Writes all of `bytes` at `offset`.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// A part could not be read and will not come: who waits for it need not any more.
    fn give_up(&self);
}

/// Takes the pages of a dump, which then lie in no file of its directory.
pub trait PageStore: Send + Sync + std::fmt::Debug {
    /// The place of `pages-ID`, of which `bytes` will come, behind those that began before.
    fn begin(&self, pages_id: u32, bytes: u64) -> Arc<dyn PageSink>;
}

impl PageSink for File {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn give_up(&self) {}
}

/// A file whose bytes are hashed while they are in the cache.
#[derive(Debug)]
pub(crate) struct HashedFile {
    pub file: Arc<File>,
    pub hashes: Arc<PieceHashes>,
}

impl PageSink for HashedFile {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.hashes.note(offset, bytes);
        self.file.write_all_at(bytes, offset)
    }

    fn give_up(&self) {}
}

/// Copying pages failed.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The source could not give a page.
    #[error("Reading {bytes} bytes of memory from {start:#x} on ({from})")]
    Read {
        from: String,
        start: u64,
        bytes: u64,
        #[source]
        source: io::Error,
    },
    /// The sink could not take it: often the file system is full.
    #[error("Writing {bytes} bytes of memory pages at offset {offset}")]
    Write {
        offset: u64,
        bytes: u64,
        #[source]
        source: io::Error,
    },
    /// The system would not give a thread.
    #[error("Starting a thread that copies pages")]
    Thread {
        #[source]
        source: io::Error,
    },
}

/// What was moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Bytes moved.
    pub bytes: u64,
    /// Time spent in reads, summed over threads.
    pub reading: Duration,
    /// Time spent in writes, summed over threads.
    pub writing: Duration,
}

struct Batch {
    source: Arc<dyn PageSource>,
    sink: Arc<dyn PageSink>,
    runs: Vec<PageRun>,
    offset: u64,
    bytes: u64,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Batch>,
    running: usize,
    closed: bool,
    copied: Copied,
    error: Option<CopyError>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    idle: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("workers do not panic while they hold the queue")
    }
}

/// Worker threads that copy pages while the caller goes on. Batches name pages and hold no content, so
/// memory is bounded by one batch a worker, however much is queued.
pub struct PagePump {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    limit: usize,
    /// Bytes queued so far.
    sent: u64,
}

impl PagePump {
    /// A pump of at most `workers` threads; they start when there is work that is worth one.
    pub fn new(workers: usize) -> Self {
        PagePump {
            shared: Arc::default(),
            workers: Vec::new(),
            limit: workers.max(1),
            sent: 0,
        }
    }

    /// Queues `runs` of `source` to be written to `sink` from `offset` on without gaps; returns the
    /// offset after them.
    pub fn send(
        &mut self,
        source: &Arc<dyn PageSource>,
        sink: &Arc<dyn PageSink>,
        runs: &[PageRun],
        offset: u64,
    ) -> Result<u64, CopyError> {
        let mut at = offset;
        let mut batch = Vec::new();
        let mut bytes = 0;
        let mut batches = Vec::new();
        let mut close = |batch: &mut Vec<PageRun>, bytes: &mut u64, at: &mut u64| {
            if *bytes > 0 {
                let runs = std::mem::take(batch);
                batches.push(Batch {
                    source: source.clone(),
                    sink: sink.clone(),
                    runs,
                    offset: *at,
                    bytes: *bytes,
                });
                *at += *bytes;
                *bytes = 0;
            }
        };
        for run in runs {
            let mut rest = *run;
            while rest.pages > 0 {
                let room = BATCH_BYTES - (at + bytes) % BATCH_BYTES;
                let pages = rest.pages.min(room / PAGE_SIZE);
                batch.push(PageRun {
                    start: rest.start,
                    pages,
                });
                bytes += pages * PAGE_SIZE;
                rest = PageRun {
                    start: rest.start + pages * PAGE_SIZE,
                    pages: rest.pages - pages,
                };
                if (at + bytes).is_multiple_of(BATCH_BYTES) {
                    close(&mut batch, &mut bytes, &mut at);
                }
            }
        }
        close(&mut batch, &mut bytes, &mut at);
        self.enqueue(batches)?;
        Ok(at)
    }

    fn enqueue(&mut self, batches: Vec<Batch>) -> Result<(), CopyError> {
        if batches.is_empty() {
            return Ok(());
        }
        self.sent += batches.iter().map(|batch| batch.bytes).sum::<u64>();
        let waiting = {
            let mut state = self.shared.lock();
            state.queue.extend(batches);
            state.queue.len()
        };
        if self.sent < WORTH_A_THREAD {
            return Ok(());
        }
        while self.workers.len() < self.limit.min(waiting) {
            let shared = self.shared.clone();
            let builder = std::thread::Builder::new()
                .name("floe-pages".into())
                .stack_size(128 * 1024);
            let worker = builder
                .spawn(move || work(&shared))
                .map_err(|source| CopyError::Thread { source })?;
            self.workers.push(worker);
        }
        self.shared.work.notify_all();
        Ok(())
    }

    /// Waits until all that was sent is written.
    pub fn drain(&mut self) -> Result<Copied, CopyError> {
        if self.workers.is_empty() {
            // It ends when nothing is queued.
            self.shared.lock().closed = true;
            work(&self.shared);
            self.shared.lock().closed = false;
        }
        let mut state = self.shared.lock();
        while state.error.is_none() && (!state.queue.is_empty() || state.running > 0) {
            state = self
                .shared
                .idle
                .wait(state)
                .expect("workers do not panic while they hold the queue");
        }
        match state.error.take() {
            Some(error) => {
                state.queue.clear();
                Err(error)
            }
            None => Ok(state.copied),
        }
    }
}

impl Drop for PagePump {
    fn drop(&mut self) {
        {
            let mut state = self.shared.lock();
            state.queue.clear();
            state.closed = true;
        }
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // A worker that panicked has lost nothing that is still wanted.
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared) {
    let mut buffer = vec![0u8; BATCH_BYTES as usize];
    let mut state = shared.lock();
    loop {
        while state.queue.is_empty() {
            if state.closed {
                return;
            }
            state = shared
                .work
                .wait(state)
                .expect("workers do not panic while they hold the queue");
        }
        let Some(batch) = state.queue.pop_front() else {
            continue;
        };
        state.running += 1;
        drop(state);
        let result = copy(&batch, &mut buffer[..batch.bytes as usize]);
        if result.is_err() {
            batch.sink.give_up();
        }
        state = shared.lock();
        state.running -= 1;
        match result {
            Ok(copied) => {
                state.copied.bytes += copied.bytes;
                state.copied.reading += copied.reading;
                state.copied.writing += copied.writing;
            }
            Err(error) => {
                state.queue.clear();
                state.error.get_or_insert(error);
            }
        }
        if state.queue.is_empty() && state.running == 0 {
            shared.idle.notify_all();
        }
    }
}

fn copy(batch: &Batch, buffer: &mut [u8]) -> Result<Copied, CopyError> {
    let started = Instant::now();
    batch
        .source
        .read(&batch.runs, buffer)
        .map_err(|source| CopyError::Read {
            from: format!("{:?}", batch.source),
            start: batch.runs.first().map_or(0, |run| run.start),
            bytes: batch.bytes,
            source,
        })?;
    let read = Instant::now();
    batch
        .sink
        .write(batch.offset, buffer)
        .map_err(|source| CopyError::Write {
            offset: batch.offset,
            bytes: batch.bytes,
            source,
        })?;
    Ok(Copied {
        bytes: batch.bytes,
        reading: read - started,
        writing: read.elapsed(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Page N of it holds the byte N.
    #[derive(Debug)]
    struct Numbered;

    impl PageSource for Numbered {
        fn read(&self, runs: &[PageRun], buffer: &mut [u8]) -> io::Result<()> {
            let pages = runs
                .iter()
                .flat_map(|run| (0..run.pages).map(|i| run.start / PAGE_SIZE + i));
            for (chunk, page) in buffer.chunks_mut(PAGE_SIZE as usize).zip(pages) {
                if page == 666 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                chunk.fill(page as u8);
            }
            Ok(())
        }
    }

    fn pump_pages(runs: &[PageRun]) -> (File, Result<Copied, CopyError>) {
        let file = tempfile::tempfile().expect("a file");
        let sink: Arc<dyn PageSink> = Arc::new(file.try_clone().expect("dup"));
        let mut pump = PagePump::new(2);
        pump.send(&(Arc::new(Numbered) as Arc<dyn PageSource>), &sink, runs, 0)
            .expect("threads");
        let copied = pump.drain();
        (file, copied)
    }

    #[test]
    fn runs_of_any_shape_arrive_in_order_without_gaps() {
        let runs = [
            PageRun {
                start: 4096,
                pages: 200,
            },
            PageRun {
                start: 4096 * 1000,
                pages: 1,
            },
            PageRun {
                start: 4096 * 2000,
                pages: 90,
            },
        ];
        let (file, copied) = pump_pages(&runs);
        assert_eq!(copied.expect("copied").bytes, 291 * 4096);
        let numbers: Vec<u64> = (1..201).chain([1000]).chain(2000..2090).collect();
        for (index, number) in numbers.iter().enumerate() {
            let mut page = [0u8; 4096];
            file.read_exact_at(&mut page, index as u64 * 4096)
                .expect("written");
            assert!(
                page.iter().all(|&byte| byte == *number as u8),
                "page {index}"
            );
        }
    }

    #[test]
    fn a_failed_read_is_reported_with_its_address() {
        let (_, copied) = pump_pages(&[PageRun {
            start: 4096 * 660,
            pages: 500,
        }]);
        assert!(
            copied
                .expect_err("page 666")
                .to_string()
                .contains("from 0x294000")
        );
    }
}
