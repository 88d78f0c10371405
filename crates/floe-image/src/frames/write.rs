//! Writing frames with several threads.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::{Codec, FRAME_BYTES, Frame, encode_table};

/// Content for a worker, and where its answer goes.
struct Job {
    content: Vec<u8>,
    reply: Sender<io::Result<Encoded>>,
}

/// A compressed frame, and the buffer of its content to be used again.
struct Encoded {
    stored: Vec<u8>,
    content: Vec<u8>,
}

/// Compresses what is written to it. Frames go out in their order; memory is bounded by a few frames
/// a thread.
pub struct FrameWriter<W: Write> {
    out: W,
    jobs: Option<Sender<Job>>,
    workers: Vec<JoinHandle<()>>,
    running: VecDeque<Receiver<io::Result<Encoded>>>,
    buffer: Vec<u8>,
    spare: Vec<Vec<u8>>,
    frames: Vec<Frame>,
    /// Frames that were written before ours by somebody else.
    before: Vec<Frame>,
    content: u64,
    stored: u64,
}

impl<W: Write> FrameWriter<W> {
    /// Writes to `out` by `threads` threads.
    pub fn new(out: W, codec: Codec, threads: usize) -> io::Result<FrameWriter<W>> {
        let (jobs, queue) = mpsc::channel();
        let queue = Arc::new(Mutex::new(queue));
        let mut workers = Vec::new();
        for _ in 0..threads.max(1) {
            let queue = queue.clone();
            let worker = std::thread::Builder::new().name("floe-compress".into());
            workers.push(worker.spawn(move || work(codec, &queue))?);
        }
        Ok(FrameWriter {
            out,
            jobs: Some(jobs),
            workers,
            running: VecDeque::new(),
            buffer: Vec::with_capacity(FRAME_BYTES),
            spare: Vec::new(),
            frames: Vec::new(),
            before: Vec::new(),
            content: 0,
            stored: 0,
        })
    }

    /// Bytes of content so far.
    pub fn position(&self) -> u64 {
        self.content + self.buffer.len() as u64
    }

    /// Ends the frame, so that what comes next begins one.
    pub fn cut(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        while self.running.len() >= 2 * self.workers.len() {
            self.take()?;
        }
        let next = self
            .spare
            .pop()
            .unwrap_or_else(|| Vec::with_capacity(FRAME_BYTES));
        let content = std::mem::replace(&mut self.buffer, next);
        self.frames.push(Frame {
            start: self.content,
            len: content.len() as u32,
            stored_at: 0,
            stored_len: 0,
        });
        self.content += content.len() as u64;
        let (reply, answer) = mpsc::channel();
        let jobs = self.jobs.as_ref().expect("taken only by the end");
        jobs.send(Job { content, reply })
            .map_err(|_| worker_died())?;
        self.running.push_back(answer);
        Ok(())
    }

    /// Writes `content` as one frame of its own, however long.
    pub fn write_frame(&mut self, content: &[u8]) -> io::Result<()> {
        self.cut()?;
        self.buffer.extend_from_slice(content);
        self.cut()
    }

    /// Writes out the oldest frame in work.
    fn take(&mut self) -> io::Result<()> {
        let Some(answer) = self.running.pop_front() else {
            return Ok(());
        };
        let Encoded {
            stored,
            mut content,
        } = answer.recv().map_err(|_| worker_died())??;
        self.out.write_all(&stored)?;
        let number = self.frames.len() - 1 - self.running.len();
        self.frames[number].stored_at = self.stored;
        self.frames[number].stored_len = stored.len() as u32;
        self.stored += stored.len() as u64;
        content.clear();
        if content.capacity() <= 2 * FRAME_BYTES {
            self.spare.push(content);
        }
        Ok(())
    }

    /// Ends the last frame and writes out all; the frames, and where they go.
    pub fn drain(&mut self) -> io::Result<(&[Frame], &mut W)> {
        self.cut()?;
        while !self.running.is_empty() {
            self.take()?;
        }
        Ok((&self.frames, &mut self.out))
    }

    /// Notes frames that stand before all of ours, for the table.
    pub fn put_before(&mut self, frames: Vec<Frame>) {
        self.before = frames;
    }

    /// Ends the last frame; where they went, and the frames, without a table.
    pub fn into_frames(mut self) -> io::Result<(W, Vec<Frame>)> {
        self.drain()?;
        drop(self.jobs.take());
        for worker in self.workers.drain(..) {
            worker.join().map_err(|_| worker_died())?;
        }
        Ok((self.out, [self.before, self.frames].concat()))
    }

    /// Ends the last frame and writes the table; the number of bytes in all.
    pub fn finish(self) -> io::Result<(W, u64)> {
        let (mut out, frames) = self.into_frames()?;
        let table = encode_table(&frames);
        out.write_all(&table)?;
        out.flush()?;
        let stored: u64 = frames.iter().map(|frame| u64::from(frame.stored_len)).sum();
        Ok((out, stored + table.len() as u64))
    }
}

impl<W: Write> Write for FrameWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() >= FRAME_BYTES {
            self.cut()?;
        }
        let taken = bytes.len().min(FRAME_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    /// A frame stays open: a flush would make short ones.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn worker_died() -> io::Error {
    io::Error::other("a thread that compresses has ended")
}

fn work(codec: Codec, queue: &Mutex<Receiver<Job>>) {
    let mut encoder = Encoder::new(codec);
    loop {
        let job = queue
            .lock()
            .expect("workers do not panic while they wait")
            .recv();
        let Ok(Job { content, reply }) = job else {
            return;
        };
        let stored = match &mut encoder {
            Ok(encoder) => encoder.encode(&content),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        // Nobody waits for it if the writer was given up.
        let _ = reply.send(stored.map(|stored| Encoded { stored, content }));
    }
}

enum Encoder {
    Zstd(Box<zstd::bulk::Compressor<'static>>),
    Lz4,
}

impl Encoder {
    fn new(codec: Codec) -> io::Result<Encoder> {
        match codec {
            Codec::Lz4 => Ok(Encoder::Lz4),
            Codec::Zstd(level) => {
                let mut compressor = zstd::bulk::Compressor::new(level)?;
                compressor.include_checksum(true)?;
                Ok(Encoder::Zstd(Box::new(compressor)))
            }
        }
    }

    fn encode(&mut self, content: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Encoder::Zstd(compressor) => compressor.compress(content),
            Encoder::Lz4 => {
                let info = lz4_flex::frame::FrameInfo::new()
                    .content_checksum(true)
                    .block_size(lz4_flex::frame::BlockSize::Max256KB);
                let mut encoder = lz4_flex::frame::FrameEncoder::with_frame_info(info, Vec::new());
                encoder.write_all(content)?;
                encoder.finish().map_err(io::Error::other)
            }
        }
    }
}
