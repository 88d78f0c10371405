//! Images as JSON and back, in the shape that CRIU's image tool gives them.
//!
//! Driven by the run-time schema, so every field of every message is there. What the shape has no
//! place for (fields that the tables do not know, padding that is not zero) goes under keys of its
//! own, which other tools pass over: decoding and encoding again gives the same bytes.

mod decode;
mod encode;
mod present;
mod text;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::ImageError;
use crate::framing;
pub use crate::framing::ImageReader;

pub use decode::{ImageInfo, decode_image, info};
pub use encode::encode_from_json;
pub use text::render;

/// Key of the fields that the schema does not know, as protobuf in base64.
pub const UNKNOWN_FIELDS: &str = "floe_unknown";
/// Key of padding that is not zero, in base64.
pub const PADDING: &str = "floe_padding";
/// Key of the bytes that follow an entry.
pub const EXTRA: &str = "extra";

/// How numbers are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// As numbers, on one line.
    Plain,
    /// Addresses in hex, devices, flags and states by name; indented.
    Pretty,
}

/// Whether the bytes that follow entries are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// In base64.
    Keep,
    /// Only their size: such JSON cannot be encoded again.
    Omit,
}

/// What [`decode_to_json`] shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JsonOptions {
    /// How numbers are shown.
    pub style: Style,
    /// Whether extras are shown.
    pub payload: Payload,
}

/// JSON that is no image.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// A value is not what stands there in an image.
    #[error("{at}: {expected} is expected, not {found}")]
    Value {
        /// Where in the JSON.
        at: String,
        /// What must be there.
        expected: String,
        /// What is there, shortened.
        found: String,
    },
    /// A key that the message has no field for.
    #[error("{at}: {message} has no field {key}")]
    UnknownKey {
        /// Where in the JSON.
        at: String,
        /// Message, as CRIU names it.
        message: &'static str,
        /// The key.
        key: String,
    },
    /// The `magic` names no kind of image that has entries.
    #[error("`magic` is {name}, which is no image with entries")]
    UnknownMagic {
        /// The name.
        name: String,
    },
    /// A required field is absent, or messages are nested too deep.
    #[error("{at}")]
    Wire {
        /// Where in the JSON.
        at: String,
        /// What is wrong.
        #[source]
        source: crate::wire::WireError,
    },
}

/// An image file as JSON: `{"magic": "CORE", "entries": [...]}`.
pub fn decode_to_json(path: &Path, options: JsonOptions) -> Result<Value, ImageError> {
    decode_image(open(path)?, options)
}

/// Magic, entries and size of an image file.
pub fn image_info(path: &Path) -> Result<ImageInfo, ImageError> {
    info(open(path)?)
}

fn open(path: &Path) -> Result<ImageReader<File>, ImageError> {
    let error = |source| ImageError::Read {
        path: path.to_path_buf(),
        offset: 0,
        source,
    };
    let file = File::open(path).map_err(error)?;
    let length = file.metadata().map_err(error)?.len();
    reader_by_magic(file, length, path.to_path_buf())
}

/// A reader for an image whose magic says what it is; `path` is for messages only.
pub fn reader_by_magic<R: Read + Seek>(
    mut source: R,
    length: u64,
    path: PathBuf,
) -> Result<ImageReader<R>, ImageError> {
    let mut header = Vec::new();
    let read = source.by_ref().take(8).read_to_end(&mut header);
    let rewound = read.and_then(|_| source.seek(SeekFrom::Start(0)));
    if let Err(source) = rewound {
        return Err(ImageError::Read {
            path,
            offset: 0,
            source,
        });
    }
    if header.len() < 4 {
        let (offset, what, left) = (0, "a magic", header.len() as u64);
        return Err(ImageError::Truncated {
            path,
            offset,
            what,
            wanted: 4,
            left,
        });
    }
    let Some(kind) = framing::kind_of_header(&header) else {
        return Err(ImageError::UnknownMagic { path, header });
    };
    ImageReader::new(kind, source, length, path)
}
