//! Taking the tar of an archive apart as it comes: trusts nothing in it.

use std::io::{self, Read};

use crate::archive::{BLOCK, EARLY_NAME, HEAD_NAME, IMAGES, INDEX_NAME, MAX_INDEX, is_plain_name};
use crate::frame_stream::FrameStream;
use crate::unpack::{EARLIER, UnpackError, UnpackLimits};

/// Bytes that are given at once.
const PART: usize = 1 << 20;
/// Most files in an archive.
pub(crate) const MAX_MEMBERS: usize = 4_000_000;
/// What may stand behind the end of the tar, uncompressed: the table of frames has no content.
const MAX_TAIL: u64 = 1 << 20;

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// The text of the head.
    Head(Vec<u8>),
    /// Copies of pages.
    Early(Vec<u8>),
    /// A file begins: its plain name and its size in bytes.
    Begin { name: String, size: u64 },
    /// The next part of its content.
    Content(Vec<u8>),
    /// The text of the index, which is the last member.
    Index(Vec<u8>),
    /// All was read.
    End,
}

/// The members of an archive in a stream.
pub struct TarReader<R: Read> {
    source: FrameStream<R>,
    limits: UnpackLimits,
    bytes: u64,
    count: usize,
    /// Content of the member, and padding behind it, that was not read yet.
    left: u64,
    padding: u64,
}

impl<R: Read> TarReader<R> {
    /// Reads compressed content from `source`.
    pub fn new(source: R, limits: UnpackLimits) -> TarReader<R> {
        TarReader {
            source: FrameStream::new(source),
            limits,
            bytes: 0,
            count: 0,
            left: 0,
            padding: 0,
        }
    }

    /// The next piece; after [`Piece::End`] there is none.
    pub fn next_piece(&mut self) -> Result<Piece, UnpackError> {
        if self.left > 0 {
            let mut part = vec![0; self.left.min(PART as u64) as usize];
            self.source
                .read_exact(&mut part)
                .map_err(UnpackError::Decode)?;
            self.left -= part.len() as u64;
            return Ok(Piece::Content(part));
        }
        let mut block = [0; BLOCK as usize];
        let padding = &mut block[..std::mem::take(&mut self.padding) as usize];
        self.source
            .read_exact(padding)
            .map_err(UnpackError::Decode)?;
        self.source
            .read_exact(&mut block)
            .map_err(UnpackError::Decode)?;
        if block == [0; BLOCK as usize] {
            return self.end();
        }
        self.begin(tar::Header::from_byte_slice(&block))
    }

    fn begin(&mut self, header: &tar::Header) -> Result<Piece, UnpackError> {
        let name = String::from_utf8_lossy(&header.path_bytes()).into_owned();
        let refused = |what| UnpackError::Refused {
            name: name.clone(),
            what,
        };
        if !has_right_sum(header) {
            return Err(refused("whose header is damaged"));
        }
        if header.entry_type() != tar::EntryType::Regular {
            return Err(refused("which is no regular file"));
        }
        let size = header.size().map_err(UnpackError::Decode)?;
        (self.bytes, self.count) = (self.bytes.saturating_add(size), self.count + 1);
        if self.bytes > self.limits.bytes || self.count > MAX_MEMBERS {
            return Err(UnpackError::TooLarge {
                limit: self.limits.bytes,
            });
        }
        self.padding = size.next_multiple_of(BLOCK) - size;
        let of_ours = [HEAD_NAME, EARLY_NAME, INDEX_NAME]
            .iter()
            .position(|own| *own == name);
        if let Some(number) = of_ours.filter(|_| size <= MAX_INDEX) {
            let mut text = vec![0; size as usize];
            self.source
                .read_exact(&mut text)
                .map_err(UnpackError::Decode)?;
            return Ok([Piece::Head, Piece::Early, Piece::Index][number](text));
        }
        let plain = name
            .strip_prefix(IMAGES)
            .filter(|name| is_plain_name(name) && *name != EARLIER);
        let plain = plain.ok_or_else(|| refused("whose name leads elsewhere"))?;
        self.left = size;
        Ok(Piece::Begin {
            name: plain.to_owned(),
            size,
        })
    }

    /// Reads to the end, so that who writes into a pipe can finish.
    fn end(&mut self) -> Result<Piece, UnpackError> {
        let mut rest = (&mut self.source).take(MAX_TAIL + 1);
        let rest = io::copy(&mut rest, &mut io::sink()).map_err(UnpackError::Decode)?;
        if rest > MAX_TAIL {
            return Err(UnpackError::Refused {
                name: INDEX_NAME.into(),
                what: "with something behind it",
            });
        }
        Ok(Piece::End)
    }
}

/// The sum of a header's bytes, its own field read as spaces.
fn has_right_sum(header: &tar::Header) -> bool {
    let bytes = header.as_bytes();
    let sum: u32 = bytes[..148]
        .iter()
        .chain(&bytes[156..])
        .map(|byte| u32::from(*byte))
        .sum();
    header
        .cksum()
        .is_ok_and(|noted| noted == sum + 8 * u32::from(b' '))
}
