//! Files of a file system in memory, as a compressed archive (`tmpfs-dev-N.tar.gz.img`).
//!
//! Saved:    directories, regular files without their holes, links, fifos, device nodes, names of sockets;
//!           owner, mode, time of change, extended attributes.
//! Rebuilt:  unpacked below the root of the new file system, and nowhere else.
//! Not kept: times of access, flags of chattr(1).

mod pack;
mod records;
mod unpack;

use std::io;
use std::os::fd::OwnedFd;

pub use pack::pack;
pub use unpack::unpack;

use floe_kernel::namespace::own_fd_path;
use rustix::fs::ResolveFlags;

/// The record that tells the type of a file that archives have no type for, as star(1) writes it. Others
/// make an empty file of it.
const FILE_TYPE: &str = "SCHILY.filetype";
const SOCKET: &[u8] = b"socket";

/// A name in an open directory, for calls that take a path only.
fn path_at(directory: &OwnedFd, name: &[u8]) -> Vec<u8> {
    [own_fd_path(directory).as_bytes(), b"/", name].concat()
}

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
