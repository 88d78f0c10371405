//! Images that are written entry by entry.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use super::{HASHED, ImageWriter, WriteError};
use crate::catalogue::{Extra, ImageKind};
use crate::framing::MAX_ENTRY;
use crate::schema::ImageMessage;

/// An image that is written entry by entry; [`EntryStream::finish`] must end it.
#[must_use = "an image is whole only after `finish`"]
#[derive(Debug)]
pub struct EntryStream {
    sink: Sink,
    writer: ImageWriter,
    name: String,
    kind: ImageKind,
    size: u64,
    hasher: Option<blake3::Hasher>,
}

/// Where its bytes go.
#[derive(Debug)]
pub(super) enum Sink {
    File(BufWriter<File>),
    /// Its bytes so far, see [`ImageWriter::hold`]. They are hashed when they are written.
    Held(Vec<u8>),
    /// See [`ImageWriter::nowhere`].
    Nowhere,
}

impl EntryStream {
    /// A stream that nothing was written to.
    pub(super) fn new((writer, sink): (&ImageWriter, Sink), name: String, kind: ImageKind) -> Self {
        let to_file = matches!(sink, Sink::File(_));
        EntryStream {
            sink,
            writer: writer.clone(),
            name,
            kind,
            size: 0,
            hasher: to_file.then(blake3::Hasher::new),
        }
    }

    /// Appends one entry.
    pub fn append<M: ImageMessage>(&mut self, message: &M) -> Result<(), WriteError> {
        let size = message.encoded_len();
        if size as u64 > MAX_ENTRY {
            return Err(WriteError::TooLarge {
                path: self.path(),
                size: size as u64,
            });
        }
        let mut bytes = Vec::with_capacity(4 + size);
        bytes.extend_from_slice(&u32::try_from(size).expect("below MAX_ENTRY").to_le_bytes());
        message.encode_raw(&mut bytes);
        self.append_raw(&bytes)
    }

    /// Appends one entry and the bytes that belong to it, with the padding of the kind.
    pub fn append_with_extra<M: ImageMessage>(
        &mut self,
        message: &M,
        extra: &[u8],
    ) -> Result<(), WriteError> {
        self.append(message)?;
        let pad = match self.kind.extra() {
            Extra::Counted { pad, .. } => pad,
            Extra::SharedMemory => 4,
            // Each message of a queue is appended as an entry with its own text.
            Extra::MessageQueue => 8,
            Extra::None | Extra::PagemapTail | Extra::Ghost => 1,
        };
        self.append_raw(extra)?;
        let length = extra.len() as u64;
        let padding = usize::try_from(length.next_multiple_of(pad) - length).expect("less than 8");
        self.append_raw(&[0; 8][..padding])
    }

    /// Appends bytes as they are.
    pub fn append_raw(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.size += bytes.len() as u64;
        if self.size > HASHED {
            self.hasher = None;
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(bytes);
        }
        match &mut self.sink {
            Sink::Nowhere => return Ok(()),
            Sink::Held(held) if self.writer.take_room(bytes.len()) => {
                held.extend_from_slice(bytes);
                return Ok(());
            }
            _ => {}
        }
        let written = self.file()?.write_all(bytes);
        written.map_err(|source| WriteError::Write {
            path: self.path(),
            source,
        })
    }

    /// The file, which is made now if what comes before it was kept in memory.
    fn file(&mut self) -> Result<&mut BufWriter<File>, WriteError> {
        let begun = match &mut self.sink {
            Sink::File(_) => None,
            Sink::Held(held) => Some(std::mem::take(held)),
            Sink::Nowhere => Some(Vec::new()),
        };
        if let Some(held) = begun {
            let mut file = self.writer.begin(&self.name)?;
            if let Err(source) = file.write_all(&held) {
                let path = self.path();
                return Err(WriteError::Write { path, source });
            }
            self.sink = Sink::File(file);
        }
        match &mut self.sink {
            Sink::File(file) => Ok(file),
            Sink::Held(_) | Sink::Nowhere => unreachable!("made above"),
        }
    }

    /// Flushes, and gives the file positioned at its end for content that the caller streams.
    ///
    /// The file's size is measured when all is finished.
    pub fn into_file(mut self) -> Result<File, WriteError> {
        self.file()?;
        let path = self.path();
        let Sink::File(file) = self.sink else {
            unreachable!("made above");
        };
        file.into_inner().map_err(|error| WriteError::Write {
            path,
            source: error.into_error(),
        })
    }

    /// Flushes and ends the image.
    pub fn finish(self) -> Result<(), WriteError> {
        let path = self.path();
        let mut file = match self.sink {
            Sink::File(file) => file,
            Sink::Held(held) => {
                self.writer.held().files.push((self.name, held));
                return Ok(());
            }
            Sink::Nowhere => return Ok(()),
        };
        if let Err(source) = file.flush() {
            return Err(WriteError::Write { path, source });
        }
        let hash = self.hasher.map(|hasher| hasher.finalize());
        self.writer.note_file(&self.name, self.size, hash);
        Ok(())
    }

    fn path(&self) -> PathBuf {
        self.writer.file_path(&self.name)
    }
}
