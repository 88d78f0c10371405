//! The frame of an image file: magics, then entries with their sizes, then extras.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::catalogue::{Extra, IMAGE_MAGIC, ImageKind, SERVICE_MAGIC};
use crate::error::{EntryError, ImageError};
use crate::schema::{ImageMessage, MessageId, Schema};
use crate::wire;

/// Largest entry, in bytes: an `mm_entry` with the kernel's 65 530 mappings takes some 4 MiB, and
/// a host may raise that limit.
pub const MAX_ENTRY: u64 = 256 << 20;
/// Largest extra that is read into memory, in bytes; ghost files are streamed instead.
pub const MAX_EXTRA: u64 = 1 << 30;
/// Largest piece that is allocated before its bytes were seen.
const ALLOCATION_STEP: u64 = 1 << 20;
const BUFFER: usize = 64 << 10;

/// Reads one image file from front to back.
pub struct ImageReader<R = File> {
    source: BufReader<R>,
    path: PathBuf,
    kind: ImageKind,
    offset: u64,
    length: u64,
    index: u64,
    entry: Vec<u8>,
}

/// Where an entry lies.
#[derive(Clone, Copy, Debug)]
pub struct EntryPlace {
    /// Number of the entry, from 0.
    pub index: u64,
    /// Offset of its size in the file, in bytes.
    pub offset: u64,
}

impl ImageReader<File> {
    /// Reads the header of an opened file, whose `path` is for messages only.
    pub fn from_file(kind: ImageKind, file: File, path: PathBuf) -> Result<Self, ImageError> {
        let read_error = |source| ImageError::Read {
            path: path.clone(),
            offset: 0,
            source,
        };
        let length = file.metadata().map_err(read_error)?.len();
        ImageReader::new(kind, file, length, path)
    }
}

impl<R: Read + Seek> ImageReader<R> {
    /// Reads the header of `source`, which holds `length` bytes; `path` is for messages only.
    pub fn new(kind: ImageKind, source: R, length: u64, path: PathBuf) -> Result<Self, ImageError> {
        let capacity = BUFFER
            .min(usize::try_from(length).unwrap_or(BUFFER))
            .max(16);
        let mut reader = ImageReader {
            source: BufReader::with_capacity(capacity, source),
            path,
            kind,
            offset: 0,
            length,
            index: 0,
            entry: Vec::new(),
        };
        if !kind.is_raw() {
            reader.read_magic()?;
        }
        Ok(reader)
    }

    /// The file that is read.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kind that it was opened as.
    pub fn kind(&self) -> ImageKind {
        self.kind
    }

    /// The offset of the next byte.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes that are left.
    pub fn left(&self) -> u64 {
        self.length.saturating_sub(self.offset)
    }

    fn read_magic(&mut self) -> Result<(), ImageError> {
        let first = self.read_u32("a magic")?;
        let wanted = self.kind.magic();
        // The inventory, and every image of version 1, has no first magic.
        if first == wanted {
            return Ok(());
        }
        let first_wanted = self.kind.first_magic().unwrap_or(wanted);
        if first != first_wanted {
            return Err(self.wrong_magic(0, first_wanted, first));
        }
        match self.read_u32("a magic")? {
            found if found == wanted => Ok(()),
            found => Err(self.wrong_magic(4, wanted, found)),
        }
    }

    fn wrong_magic(&self, offset: u64, wanted: u32, found: u32) -> ImageError {
        let (path, expected) = (self.path.clone(), self.kind.name());
        ImageError::Magic {
            path,
            offset,
            expected,
            wanted,
            found,
        }
    }

    /// The next entry's message bytes, or `None` at the end of the file.
    pub fn next_entry(&mut self) -> Result<Option<(EntryPlace, &[u8])>, ImageError> {
        if self.left() == 0 {
            return Ok(None);
        }
        let place = EntryPlace {
            index: self.index,
            offset: self.offset,
        };
        let size = u64::from(self.read_u32("an entry's size")?);
        let mut entry = std::mem::take(&mut self.entry);
        let outcome = self.read_bytes(
            "an entry",
            Sized {
                size,
                limit: MAX_ENTRY,
            },
            &mut entry,
        );
        self.entry = entry;
        outcome?;
        self.index += 1;
        Ok(Some((place, &self.entry)))
    }

    /// The next entry as a message, or `None` at the end of the file.
    pub fn next_message<M: ImageMessage>(&mut self) -> Result<Option<M>, ImageError> {
        let Some((place, bytes)) = self.next_entry()? else {
            return Ok(None);
        };
        match decode::<M>(bytes) {
            Ok(message) => Ok(Some(message)),
            Err(source) => Err(self.entry_error(place, source)),
        }
    }

    /// The only entry of the file.
    pub fn only_message<M: ImageMessage>(&mut self) -> Result<M, ImageError> {
        let Some(message) = self.next_message()? else {
            return Err(ImageError::Empty {
                path: self.path.clone(),
                expected: M::NAME,
            });
        };
        if self.left() != 0 {
            return Err(ImageError::Trailing {
                path: self.path.clone(),
                offset: self.offset,
            });
        }
        Ok(message)
    }

    /// An error about the entry at `place`.
    pub fn entry_error(&self, place: EntryPlace, source: EntryError) -> ImageError {
        ImageError::Entry {
            path: self.path.clone(),
            index: place.index,
            offset: place.offset,
            source,
        }
    }

    /// The length that the extra after the entry just read has, and that length with padding.
    ///
    /// Not for message queues and ghosts, whose extras are entries themselves: they give zero.
    pub fn extra_length(&self) -> (u64, u64) {
        let field = |number| wire::varint_field(&self.entry, number).unwrap_or(0);
        let (size, pad) = match self.kind.extra() {
            Extra::None | Extra::PagemapTail | Extra::MessageQueue | Extra::Ghost => (0, 1),
            Extra::Counted { fields, unit, pad } => {
                let count = fields
                    .iter()
                    .fold(0u64, |sum, number| sum.saturating_add(field(*number)));
                (count.saturating_mul(unit), pad)
            }
            // ipc_shm_entry.size, unless ipc_shm_entry.in_pagemaps
            Extra::SharedMemory if field(3) != 0 => (0, 1),
            Extra::SharedMemory => (field(2), 4),
        };
        (size, size.checked_next_multiple_of(pad).unwrap_or(u64::MAX))
    }

    /// Reads the extra after the entry just read, without its padding.
    pub fn read_extra(&mut self) -> Result<Vec<u8>, ImageError> {
        let (size, padded) = self.extra_length();
        let mut extra = Vec::new();
        self.read_bytes(
            "an entry's data",
            Sized {
                size,
                limit: MAX_EXTRA,
            },
            &mut extra,
        )?;
        self.skip("padding", padded - size)?;
        Ok(extra)
    }

    /// Reads `size` bytes that the caller knows to come next.
    pub fn read_payload(&mut self, size: u64) -> Result<Vec<u8>, ImageError> {
        let mut payload = Vec::new();
        self.read_bytes(
            "an entry's data",
            Sized {
                size,
                limit: MAX_EXTRA,
            },
            &mut payload,
        )?;
        Ok(payload)
    }

    /// Steps over `size` bytes that must be there.
    pub fn skip(&mut self, what: &'static str, size: u64) -> Result<(), ImageError> {
        self.require(what, size)?;
        let distance = i64::try_from(size).map_err(|_| self.truncated(what, size))?;
        self.source
            .seek_relative(distance)
            .map_err(|source| self.read_error(source))?;
        self.offset += size;
        Ok(())
    }

    /// Gives back the source, positioned at [`Self::offset`].
    pub fn into_source(mut self) -> Result<R, ImageError> {
        let offset = self.offset;
        match self.source.seek(SeekFrom::Start(offset)) {
            Ok(_) => Ok(self.source.into_inner()),
            Err(source) => Err(self.read_error(source)),
        }
    }

    fn read_u32(&mut self, what: &'static str) -> Result<u32, ImageError> {
        self.require(what, 4)?;
        let mut bytes = [0; 4];
        self.source
            .read_exact(&mut bytes)
            .map_err(|source| self.read_error(source))?;
        self.offset += 4;
        Ok(u32::from_le_bytes(bytes))
    }

    fn read_bytes(
        &mut self,
        what: &'static str,
        sized: Sized,
        into: &mut Vec<u8>,
    ) -> Result<(), ImageError> {
        let Sized { size, limit } = sized;
        if size > limit {
            let (path, offset) = (self.path.clone(), self.offset);
            return Err(ImageError::TooLarge {
                path,
                offset,
                what,
                size,
                limit,
            });
        }
        self.require(what, size)?;
        into.clear();
        // A sparse file may claim any length: grow only as bytes arrive.
        into.reserve(usize::try_from(size.min(ALLOCATION_STEP)).expect("a small number"));
        let read = self.source.by_ref().take(size).read_to_end(into);
        let read = read.map_err(|source| self.read_error(source))?;
        self.offset += read as u64;
        if (read as u64) < size {
            return Err(self.read_error(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }

    fn require(&self, what: &'static str, size: u64) -> Result<(), ImageError> {
        if self.left() < size {
            return Err(self.truncated(what, size));
        }
        Ok(())
    }

    fn truncated(&self, what: &'static str, wanted: u64) -> ImageError {
        ImageError::Truncated {
            path: self.path.clone(),
            offset: self.offset,
            what,
            wanted,
            left: self.left(),
        }
    }

    fn read_error(&self, source: io::Error) -> ImageError {
        ImageError::Read {
            path: self.path.clone(),
            offset: self.offset,
            source,
        }
    }
}

/// A size from a file with the limit for it, in bytes.
struct Sized {
    size: u64,
    limit: u64,
}

/// Decodes one message and checks that it is whole.
pub fn decode<M: ImageMessage>(bytes: &[u8]) -> Result<M, EntryError> {
    debug_assert_eq!(Schema::get().message(M::ID).name, M::NAME);
    wire::check(M::ID, bytes)?;
    M::decode(bytes).map_err(|source| EntryError::Decode {
        message: M::NAME,
        source,
    })
}

/// The message that entry number `index` of a file of this kind holds; `None` for raw files.
pub fn entry_message(kind: ImageKind, index: u64) -> Option<MessageId> {
    match (kind.extra(), index) {
        (Extra::PagemapTail, 1..) => Schema::get().message_id("pagemap_entry"),
        _ => kind.entry(),
    }
}

/// The kind that the magic in the first bytes of a file belongs to.
///
/// Of kinds that share a magic (pagemaps of tasks and of segments) the more usual one.
pub fn kind_of_header(header: &[u8]) -> Option<ImageKind> {
    let word = |at: usize| Some(u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?));
    let magic = match word(0)? {
        IMAGE_MAGIC | SERVICE_MAGIC => word(4)?,
        magic => magic,
    };
    match ImageKind::all().find(|kind| !kind.is_raw() && kind.magic() == magic)? {
        ImageKind::BinfmtMiscOld => Some(ImageKind::BinfmtMisc),
        kind => Some(kind),
    }
}
