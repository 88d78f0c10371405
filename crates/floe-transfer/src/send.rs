//! The sending side: a dump's pagemaps go to a page server while the dump goes on.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use floe_image::dir::{PE_PARENT, PE_PRESENT};
use floe_kernel::ids::PAGE_SIZE;
use floe_memory::{Copied, PageRun, PageSource};

use crate::Connection;
use crate::frame::{Command, Frame, Target};

/// Bytes that are read before they are sent.
const CHUNK: u64 = 256 * 1024;
/// Pagemaps that may wait; each is a list of stretches without content.
const MOST_WAITING: usize = 64;

/// Why pages did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error("Reading {bytes} bytes of memory from {start:#x} on ({from})")]
    Read {
        from: String,
        start: u64,
        bytes: u64,
        #[source]
        source: io::Error,
    },
    #[error("Sending pages to the page server: its log says why if it ended")]
    Connection(#[source] io::Error),
    #[error("The page server says that it failed (status {0}): its log says why")]
    Refused(i32),
    #[error("Starting a thread that sends pages")]
    Thread(#[source] io::Error),
}

/// The pages of one task or segment.
#[derive(Debug)]
pub struct PagemapJob {
    /// Whose they are.
    pub target: Target,
    /// Stretches to send with where they are read, in the order of their addresses.
    pub runs: Vec<(Arc<dyn PageSource>, Vec<PageRun>)>,
    /// Stretches that the server has of an earlier generation.
    pub in_parent: Vec<PageRun>,
}

/// Sends pagemaps in a thread of its own.
#[derive(Debug)]
pub struct PageSender {
    jobs: SyncSender<Job>,
    worker: Option<JoinHandle<Result<Copied, SendError>>>,
}

#[derive(Debug)]
enum Job {
    Pagemap(PagemapJob),
    /// All was queued. A channel that closes without it belongs to a dump that failed, and the server must
    /// not take what it has for whole.
    End,
}

/// How the conversation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    ByClose,
    /// The socket was given to us and may be open elsewhere.
    ByForce,
}

impl PageSender {
    /// Sends over a connection that we made.
    pub fn connected(connection: Connection) -> Result<Self, SendError> {
        Self::start(connection, Ended::ByClose)
    }

    /// Sends over a connection that our caller made and may keep open.
    pub fn lent(connection: Connection) -> Result<Self, SendError> {
        Self::start(connection, Ended::ByForce)
    }

    fn start(connection: Connection, ended: Ended) -> Result<Self, SendError> {
        let (jobs, waiting) = sync_channel(MOST_WAITING);
        let worker = std::thread::Builder::new()
            .name("floe-send".into())
            .stack_size(128 * 1024)
            .spawn(move || work(connection, &waiting, ended))
            .map_err(SendError::Thread)?;
        Ok(PageSender {
            jobs,
            worker: Some(worker),
        })
    }

    /// Queues a pagemap; an error of an earlier one comes by [`PageSender::finish`].
    pub fn send(&mut self, job: PagemapJob) {
        // The worker is gone only after an error, which `finish` returns.
        let _ = self.jobs.send(Job::Pagemap(job));
    }

    /// Waits until the server has everything.
    pub fn finish(&mut self) -> Result<Copied, SendError> {
        let _ = self.jobs.send(Job::End);
        match self.worker.take().map(JoinHandle::join) {
            Some(Ok(done)) => done,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(Copied::default()),
        }
    }
}

fn work(
    mut connection: Connection,
    jobs: &Receiver<Job>,
    ended: Ended,
) -> Result<Copied, SendError> {
    let mut copied = Copied::default();
    let mut buffer = Vec::new();
    loop {
        match jobs.recv() {
            Ok(Job::Pagemap(job)) => {
                transfer(&mut connection, &job, (&mut buffer, &mut copied))?;
            }
            Ok(Job::End) => break,
            Err(_) => return Ok(copied),
        }
    }
    let close = match ended {
        Ended::ByClose => Command::Close,
        Ended::ByForce => Command::ForceClose,
    };
    let mut status = [0; 4];
    connection
        .write_frame(&Frame::bare(close))
        .and_then(|()| connection.flush())
        .and_then(|()| connection.read(&mut status))
        .map_err(SendError::Connection)?;
    match i32::from_le_bytes(status) {
        0 => Ok(copied),
        status => Err(SendError::Refused(status)),
    }
}

fn transfer(
    connection: &mut Connection,
    job: &PagemapJob,
    (buffer, copied): (&mut Vec<u8>, &mut Copied),
) -> Result<(), SendError> {
    let mut has_parent = [0];
    connection
        .write_frame(&Frame::about(Command::OpenAnswered, job.target))
        .and_then(|()| connection.flush())
        .and_then(|()| connection.read(&mut has_parent))
        .map_err(SendError::Connection)?;
    let object = job.target.encode();
    let mut holes = job.in_parent.iter().peekable();
    let hole = |run: &PageRun| Frame {
        command: Command::Add { flags: PE_PARENT },
        run: *run,
        object,
    };
    for (source, runs) in &job.runs {
        for run in runs {
            while let Some(before) = holes.next_if(|before| before.start < run.start) {
                let sent = connection.write_frame(&hole(before));
                sent.map_err(SendError::Connection)?;
            }
            let frame = Frame {
                command: Command::Add { flags: PE_PRESENT },
                ..hole(run)
            };
            let sent = connection.write_frame(&frame);
            sent.map_err(SendError::Connection)?;
            send_content(connection, source, *run, (buffer, copied))?;
        }
    }
    for rest in holes {
        let sent = connection.write_frame(&hole(rest));
        sent.map_err(SendError::Connection)?;
    }
    connection.flush().map_err(SendError::Connection)
}

fn send_content(
    connection: &mut Connection,
    source: &Arc<dyn PageSource>,
    run: PageRun,
    (buffer, copied): (&mut Vec<u8>, &mut Copied),
) -> Result<(), SendError> {
    let mut done = 0;
    while done < run.pages {
        let part = PageRun {
            start: run.start + done * PAGE_SIZE,
            pages: (run.pages - done).min(CHUNK / PAGE_SIZE),
        };
        let bytes = part.pages * PAGE_SIZE;
        buffer.resize(bytes as usize, 0);
        let began = Instant::now();
        let read = source.read(&[part], buffer);
        read.map_err(|error| SendError::Read {
            from: format!("{source:?}"),
            start: part.start,
            bytes,
            source: error,
        })?;
        let reading = began.elapsed();
        connection.write(buffer).map_err(SendError::Connection)?;
        add(copied, bytes, (reading, began.elapsed() - reading));
        done += part.pages;
    }
    Ok(())
}

fn add(copied: &mut Copied, bytes: u64, (reading, writing): (Duration, Duration)) {
    copied.bytes += bytes;
    copied.reading += reading;
    copied.writing += writing;
}
