//! Pages of a dump, wherever they are stored: a plain file, a compressed one, an archive.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::frames::FramedReader;

/// Pages that come by once, such as those of an archive in a pipe.
pub trait PassingPages: std::fmt::Debug + Send + Sync {
    /// Length in bytes.
    fn size(&self) -> u64;
    /// Fills `buffer` from `offset` on; each byte can be read once.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
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

    /// The file of plain pages, to copy within the kernel; `None` for a compressed one.
    pub fn as_plain(&self) -> Option<&File> {
        match self {
            PagesReader::Plain(file) => Some(file),
            PagesReader::Framed { .. } | PagesReader::Passing(_) => None,
        }
    }
}
