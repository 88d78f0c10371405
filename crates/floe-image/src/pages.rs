//! Pages of a dump, wherever they are stored: a plain file, a compressed one, an archive.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rayon::prelude::*;

use crate::frames::{FRAME_BYTES, FramedReader};

/// Bytes that are read and hashed at once, by all threads.
const HASHED: usize = 4 << 20;

/// Bytes for which no other thread is called: that takes longer than hashing them.
const BY_ONE: u64 = 128 << 10;

/// Pages that come by once, such as those of an archive in a pipe.
pub trait PassingPages: std::fmt::Debug + Send + Sync {
    /// Length in bytes.
    fn size(&self) -> u64;
    /// Fills `buffer` from `offset` on; each byte can be read once.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// BLAKE3 of all, if they have passed; `None` where they must be read for it.
    fn known_hash(&self) -> Option<blake3::Hash>;
}

/// The content of one `pages-N.img`; threads may read at once.
#[derive(Debug)]
pub enum PagesReader {
    /// A file of plain pages.
    Plain(File),
    /// A part of a file of frames.
    Framed {
        /// The file.
        frames: Arc<FramedReader>,
        /// Where the pages begin in its content.
        start: u64,
        /// Their length in bytes.
        len: u64,
    },
    /// Pages that come by once.
    Passing(Arc<dyn PassingPages>),
}

impl PagesReader {
    /// Length in bytes.
    pub fn size(&self) -> io::Result<u64> {
        match self {
            PagesReader::Plain(file) => Ok(file.metadata()?.len()),
            PagesReader::Framed { len, .. } => Ok(*len),
            PagesReader::Passing(pages) => Ok(pages.size()),
        }
    }

    /// Fills `buffer` from `offset` on.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            PagesReader::Plain(file) => file.read_exact_at(buffer, offset),
            PagesReader::Framed { frames, start, len } => {
                let end = offset.checked_add(buffer.len() as u64);
                if end.is_none_or(|end| end > *len) {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                frames.read_exact_at(buffer, start + offset)
            }
            PagesReader::Passing(pages) => pages.read_exact_at(buffer, offset),
        }
    }

    /// BLAKE3 of the whole content, by all processors; what is compressed is decoded by all as well.
    pub fn hash(&self) -> io::Result<blake3::Hash> {
        if let PagesReader::Passing(pages) = self
            && let Some(hash) = pages.known_hash()
        {
            return Ok(hash);
        }
        let size = self.size()?;
        let mut hasher = blake3::Hasher::new();
        if size <= BY_ONE {
            let mut content = vec![0; size as usize];
            self.read_exact_at(&mut content, 0)?;
            return Ok(hasher.update(&content).finalize());
        }
        let mut buffer = vec![0; size.min(HASHED as u64) as usize];
        let mut at = 0;
        while at < size {
            let part = &mut buffer[..(size - at).min(HASHED as u64) as usize];
            part.par_chunks_mut(FRAME_BYTES)
                .enumerate()
                .try_for_each(|(number, piece)| {
                    self.read_exact_at(piece, at + (number * FRAME_BYTES) as u64)
                })?;
            hasher.update_rayon(part);
            at += part.len() as u64;
        }
        Ok(hasher.finalize())
    }

    /// The file of plain pages, to copy within the kernel; `None` for a compressed one.
    pub fn as_plain(&self) -> Option<&File> {
        match self {
            PagesReader::Plain(file) => Some(file),
            PagesReader::Framed { .. } | PagesReader::Passing(_) => None,
        }
    }
}
