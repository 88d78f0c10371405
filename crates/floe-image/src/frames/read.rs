//! Reading any part of a file of frames.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};

use super::{
    ENTRY, FILLER_MAGIC, FOOTER, Frame, MAX_FRAME, MAX_FRAMES, SKIPPABLE_MAGIC, TABLE_MAGIC,
    damaged,
};

/// Frames whose content is kept: neighbouring reads share one.
const KEPT: usize = 8;
const ZSTD_MAGIC: u32 = 0xFD2F_B528;
const LZ4_MAGIC: u32 = 0x184D_2204;

/// A file of frames; threads may read at once.
pub struct FramedReader {
    file: File,
    frames: Vec<Frame>,
    kept: Mutex<VecDeque<(usize, Arc<Vec<u8>>)>>,
    scratch: Mutex<Vec<Vec<u8>>>,
}

impl std::fmt::Debug for FramedReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let frames = self.frames.len();
        f.debug_struct("FramedReader")
            .field("file", &self.file)
            .field("frames", &frames)
            .finish_non_exhaustive()
    }
}

impl FramedReader {
    /// Reads the table at the end of the file.
    pub fn open(file: File) -> io::Result<FramedReader> {
        let size = file.metadata()?.len();
        let frames = read_table(&file, size)?;
        Ok(FramedReader::of(file, frames))
    }

    /// Reads frames of a file that has no table yet.
    pub fn of(file: File, frames: Vec<Frame>) -> FramedReader {
        FramedReader {
            file,
            frames,
            kept: Mutex::default(),
            scratch: Mutex::default(),
        }
    }

    /// The frames in their order.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// Length of the content, uncompressed.
    pub fn len(&self) -> u64 {
        self.frames
            .last()
            .map_or(0, |frame| frame.start + u64::from(frame.len))
    }

    /// Whether there is no content.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` with the content from `offset` on.
    pub fn read_exact_at(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            let number = self.frames.partition_point(|frame| frame.start <= offset);
            let frame = number
                .checked_sub(1)
                .map(|number| (number, self.frames[number]));
            let Some((number, frame)) =
                frame.filter(|(_, frame)| offset < frame.start + u64::from(frame.len))
            else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            let inside = (offset - frame.start) as usize;
            let part = (frame.len as usize - inside).min(buffer.len());
            let (now, later) = buffer.split_at_mut(part);
            if part == frame.len as usize {
                self.decode(&frame, now)?;
            } else {
                let content = self.content(number, &frame)?;
                now.copy_from_slice(&content[inside..inside + part]);
            }
            offset += part as u64;
            buffer = later;
        }
        Ok(())
    }

    fn content(&self, number: usize, frame: &Frame) -> io::Result<Arc<Vec<u8>>> {
        if let Some((_, content)) = self.kept().iter().find(|(kept, _)| *kept == number) {
            return Ok(content.clone());
        }
        let mut content = vec![0; frame.len as usize];
        self.decode(frame, &mut content)?;
        let content = Arc::new(content);
        let mut kept = self.kept();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back((number, content.clone()));
        Ok(content)
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<(usize, Arc<Vec<u8>>)>> {
        self.kept
            .lock()
            .expect("nobody panics while holding the kept frames")
    }

    /// Decodes one frame, whose content has exactly the length of `into`.
    pub fn decode(&self, frame: &Frame, into: &mut [u8]) -> io::Result<()> {
        let spare = || {
            self.scratch
                .lock()
                .expect("nobody panics while holding the buffers")
        };
        let mut stored = spare().pop().unwrap_or_default();
        stored.resize(frame.stored_len as usize, 0);
        let outcome = self
            .file
            .read_exact_at(&mut stored, frame.stored_at)
            .and_then(|()| decode(&stored, into))
            .map_err(|error| self.undecodable(&error));
        spare().push(stored);
        outcome
    }

    fn undecodable(&self, error: &io::Error) -> io::Error {
        let name = name_of(&self.file);
        damaged(&format!(
            "compressed data in {name} was damaged or cut: {error}"
        ))
    }
}

/// The file's own name, where proc has it.
fn name_of(file: &File) -> String {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    link.map_or("the file".to_string(), |path| path.display().to_string())
}

fn decode(stored: &[u8], into: &mut [u8]) -> io::Result<()> {
    let magic = stored.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    match magic {
        Some(ZSTD_MAGIC) => {
            thread_local! {
                static DECODER: std::cell::RefCell<Option<zstd::bulk::Decompressor<'static>>> =
                    const { std::cell::RefCell::new(None) };
            }
            let written = DECODER.with_borrow_mut(|decoder| {
                let decoder = match decoder {
                    Some(decoder) => decoder,
                    None => decoder.insert(zstd::bulk::Decompressor::new()?),
                };
                decoder.decompress_to_buffer(stored, into)
            })?;
            if written != into.len() {
                return Err(damaged("a frame is shorter than the table says"));
            }
            Ok(())
        }
        Some(LZ4_MAGIC) => {
            let mut decoder = lz4_flex::frame::FrameDecoder::new(stored);
            decoder.read_exact(into)?;
            if decoder.read(&mut [0])? != 0 {
                return Err(damaged("a frame is longer than the table says"));
            }
            Ok(())
        }
        Some(FILLER_MAGIC) if into.is_empty() => Ok(()),
        _ => Err(damaged("a frame begins with no magic of zstd or lz4")),
    }
}

fn read_table(file: &File, size: u64) -> io::Result<Vec<Frame>> {
    let missing = || {
        damaged(
            "it has no table of frames at its end: it was copied only in part, or is no file of Floe",
        )
    };
    let mut footer = [0; FOOTER];
    let at = size.checked_sub(FOOTER as u64).ok_or_else(missing)?;
    file.read_exact_at(&mut footer, at)?;
    let number = |bytes: &[u8], at: usize| {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
    };
    let count = number(&footer, 0);
    if number(&footer, 5) != TABLE_MAGIC || footer[4] & !0x80 != 0 || count > MAX_FRAMES {
        return Err(missing());
    }
    // The descriptor's high bit says that each entry has a checksum, which the frames have themselves.
    let entry = if footer[4] & 0x80 != 0 {
        ENTRY + 4
    } else {
        ENTRY
    };
    let length = u64::from(count) * entry as u64;
    let start = at.checked_sub(length + 8).ok_or_else(missing)?;
    let mut table = vec![0; length as usize + 8];
    file.read_exact_at(&mut table, start)?;
    if number(&table, 0) != SKIPPABLE_MAGIC
        || u64::from(number(&table, 4)) != length + FOOTER as u64
    {
        return Err(missing());
    }
    let (mut content, mut stored) = (0u64, 0u64);
    let mut frames = Vec::with_capacity(count as usize);
    for bytes in table[8..].chunks_exact(entry) {
        let frame = Frame {
            start: content,
            len: number(bytes, 4),
            stored_at: stored,
            stored_len: number(bytes, 0),
        };
        if frame.len > MAX_FRAME {
            return Err(damaged(
                "a frame in the table is larger than any that is written",
            ));
        }
        content += u64::from(frame.len);
        stored += u64::from(frame.stored_len);
        frames.push(frame);
    }
    if stored != start {
        return Err(damaged(
            "the table of frames does not fit the file: it was damaged or joined with another",
        ));
    }
    Ok(frames)
}
