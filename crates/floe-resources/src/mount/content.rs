//! Files of a file system in memory, as a compressed archive (`tmpfs-dev-N.tar.gz.img`).
//!
//! Saved:    directories, regular files without their holes, links, fifos, device nodes; owner, mode, time of
//!           change, extended attributes.
//! Rebuilt:  unpacked below the root of the new file system, and nowhere else.
//! Not kept: sockets; they are bound again. Times of access.

mod pack;
mod records;
mod unpack;

use std::io;

pub use pack::pack;
pub use unpack::unpack;

use rustix::fs::ResolveFlags;

/// Bytes copied at once.
const CHUNK: usize = 1 << 20;

/// Names of an archive lead nowhere else: not through links, nor into other file systems.
const INSIDE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_XDEV);

/// What failed, and with which file.
#[derive(Debug, thiserror::Error)]
#[error("{action} {path}")]
pub struct ContentError {
    pub action: &'static str,
    pub path: String,
    #[source]
    pub source: io::Error,
}

/// Names the operation and the file.
fn failed<E: Into<io::Error>>(action: &'static str, path: &[u8]) -> impl FnOnce(E) -> ContentError {
    move |source| ContentError {
        action,
        path: String::from_utf8_lossy(path).into_owned(),
        source: source.into(),
    }
}

#[cfg(test)]
mod tests;
