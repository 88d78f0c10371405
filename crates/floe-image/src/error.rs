//! What can be wrong with images, each with the file it is about.

use std::io;
use std::path::PathBuf;

use crate::catalogue::ImageKind;
use crate::wire::WireError;

/// Reading images failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The images directory itself cannot be opened.
    #[error("Opening the images directory {}", path.display())]
    OpenDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An image that must be there is not.
    #[error("{name} is missing in {}{hint}", dir.display())]
    Missing {
        /// Kind of the image.
        kind: ImageKind,
        /// Its file name.
        name: String,
        /// Where it was looked for.
        dir: PathBuf,
        /// What most likely happened.
        hint: String,
    },
    /// A file cannot be opened or read.
    #[error("Reading {} at offset {offset}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Where in the file, in bytes.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file begins with another magic.
    #[error("{} is no {expected} image: its magic at offset {offset} is {found:#010x}, not {wanted:#010x} (mixed up or damaged)", path.display())]
    Magic {
        /// The file.
        path: PathBuf,
        /// Where in the file, in bytes.
        offset: u64,
        /// Name of the expected kind.
        expected: &'static str,
        /// Magic of the expected kind.
        wanted: u32,
        /// What stands there.
        found: u32,
    },
    /// The file begins with no magic of any image.
    #[error("{} begins with no known magic ({header:02x?}): raw data such as pages-N.img, or damaged", path.display())]
    UnknownMagic {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        header: Vec<u8>,
    },
    /// The file ends too early.
    #[error("{} ends too early: at offset {offset} {wanted} bytes of {what} are expected, {left} are left (copied only in part?)", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Where in the file, in bytes.
        offset: u64,
        /// What was expected there.
        what: &'static str,
        /// Its size in bytes.
        wanted: u64,
        /// Bytes left in the file.
        left: u64,
    },
    /// A size in the file is above the limit for it.
    #[error("{} is damaged: at offset {offset} {what} of {size} bytes, at most {limit} are allowed", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Where in the file, in bytes.
        offset: u64,
        /// What has that size.
        what: &'static str,
        /// The size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// An entry's message is incomplete or damaged.
    #[error("{}, entry {index} at offset {offset}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// Number of the entry, from 0.
        index: u64,
        /// Where in the file, in bytes.
        offset: u64,
        /// What is wrong in it.
        #[source]
        source: EntryError,
    },
    /// The file has no entry where one must be.
    #[error("{} has no entry: a {expected} must be there", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// Message that must be there.
        expected: &'static str,
    },
    /// The file goes on after its only entry.
    #[error("{} goes on at offset {offset} after its only entry", path.display())]
    Trailing {
        /// The file.
        path: PathBuf,
        /// Where in the file, in bytes.
        offset: u64,
    },
    /// An old image has something that no longer has a place.
    #[error("{}: {what}", path.display())]
    Upgrade {
        /// The file.
        path: PathBuf,
        /// What cannot be upgraded.
        what: String,
    },
    /// The chain of parent directories comes back to itself.
    #[error("The parent link in {} leads back to an earlier directory of the chain", path.display())]
    ParentLoop {
        /// Directory whose link closes the loop.
        path: PathBuf,
    },
    /// The chain of parent directories is too long.
    #[error("The chain of parent directories is longer than {limit} at {}", path.display())]
    ParentChain {
        /// Directory at which counting stopped.
        path: PathBuf,
        /// The limit.
        limit: usize,
    },
}

/// What is wrong inside one entry.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    /// Bytes that do not fit the schema.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Bytes that prost refuses although they fit the schema.
    #[error("decoding {message}")]
    Decode {
        /// Message, as CRIU names it.
        message: &'static str,
        /// prost's reason.
        #[source]
        source: prost::DecodeError,
    },
}
