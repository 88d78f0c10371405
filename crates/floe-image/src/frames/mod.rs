//! Compressed content in independent frames with a table at the end.
//!
//! The file is what `zstd` or `lz4` read as one stream. Behind it lies a table of the frames in a
//! skippable frame (the format that zstd calls seekable), so that any part can be read alone and
//! several threads can work at once.

mod read;
mod write;

use std::io;

pub use read::FramedReader;
pub use write::FrameWriter;

/// Uncompressed bytes in a frame. A restore reads 512 KiB at once, a lone page costs one frame.
pub const FRAME_BYTES: usize = 256 << 10;
/// Largest frame that is read, in uncompressed bytes: an index lies in one frame.
pub const MAX_FRAME: u32 = 256 << 20;
/// Most frames in a file: 256 TiB of content.
pub const MAX_FRAMES: u32 = 1 << 30;

/// First bytes of the frame that holds the table, and its last bytes.
const SKIPPABLE_MAGIC: u32 = 0x184D_2A5E;
/// First bytes of a frame that fills room.
const FILLER_MAGIC: u32 = 0x184D_2A50;
const TABLE_MAGIC: u32 = 0x8F92_EAB1;
const FOOTER: usize = 9;
const ENTRY: usize = 8;

/// How frames are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// zstd at a level.
    Zstd(i32),
    /// lz4.
    Lz4,
}

impl Codec {
    /// Ending of the names of files that are compressed so.
    pub fn suffix(self) -> &'static str {
        match self {
            Codec::Zstd(_) => ".zst",
            Codec::Lz4 => ".lz4",
        }
    }

    /// `zstd`, `zstd:LEVEL` or `lz4`.
    pub fn parse(text: &str) -> Option<Codec> {
        match text.split_once(':') {
            None if text == "zstd" => Some(Codec::Zstd(zstd::DEFAULT_COMPRESSION_LEVEL)),
            None if text == "lz4" => Some(Codec::Lz4),
            Some(("zstd", level)) => {
                let level: i32 = level.parse().ok()?;
                let known = zstd::compression_level_range().contains(&level);
                known.then_some(Codec::Zstd(level))
            }
            _ => None,
        }
    }
}

impl std::fmt::Display for Codec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Codec::Zstd(level) => write!(f, "zstd:{level}"),
            Codec::Lz4 => write!(f, "lz4"),
        }
    }
}

/// One frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Offset of its content, uncompressed.
    pub start: u64,
    /// Length of its content, uncompressed.
    pub len: u32,
    /// Offset in the file.
    pub stored_at: u64,
    /// Length in the file.
    pub stored_len: u32,
}

/// Bytes of the beginning of a frame that holds nothing; as many follow as its second half says.
pub const FILLER_HEAD: usize = 8;

/// The beginning of a frame without content, which takes `size` bytes in all, [`FILLER_HEAD`] or more.
pub fn filler(size: u32) -> [u8; FILLER_HEAD] {
    let rest = size.saturating_sub(FILLER_HEAD as u32);
    let number = u64::from(rest) << 32 | u64::from(FILLER_MAGIC);
    number.to_le_bytes()
}

/// The frame that holds the table.
fn encode_table(frames: &[Frame]) -> Vec<u8> {
    let size = frames.len() * ENTRY + FOOTER;
    let mut bytes = Vec::with_capacity(8 + size);
    let put = |bytes: &mut Vec<u8>, number: u32| bytes.extend_from_slice(&number.to_le_bytes());
    put(&mut bytes, SKIPPABLE_MAGIC);
    put(&mut bytes, size as u32);
    for frame in frames {
        put(&mut bytes, frame.stored_len);
        put(&mut bytes, frame.len);
    }
    put(&mut bytes, frames.len() as u32);
    bytes.push(0);
    put(&mut bytes, TABLE_MAGIC);
    bytes
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}
