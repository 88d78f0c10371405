//! Files that cannot be found under the name that `/proc` shows.
//!
//! Saved:    so far only files that are where their name says; all others are obstacles.
//! Rebuilt:  -
//! Not kept: -

mod ghost;
mod names;
mod rebuild;

use std::path::Path;

pub use rebuild::{NAMES_GONE, is_link, needs_of_name, open_by_name, plan_names};
use rustix::io::Errno;

use super::regular::NamedFile;
use crate::collect::{CollectError, Collector, FileId};

/// What the kernel adds to the name of a file without one.
const DELETED: &[u8] = b" (deleted)";

/// The name under which restore will find the file of entry `id`.
///
/// This is where deleted files get their ghost or link-remap: the entries of `remap-fpath` name `id`.
pub fn reachable_name(
    _id: FileId,
    file: &NamedFile<'_>,
    _collector: &mut Collector<'_>,
) -> Result<Vec<u8>, CollectError> {
    if !file.target.starts_with(b"/") {
        return Err(file.obstacle("", "close it: it has no path"));
    }
    if is_there(file, file.target)? {
        return Ok(file.target.to_vec());
    }
    let name = file.target.strip_suffix(DELETED).unwrap_or(file.target);
    if file.stat.st_nlink == 0 {
        return Err(file.obstacle(", deleted", "close it: deleted files are not supported yet"));
    }
    if name.len() < file.target.len() && is_there(file, name)? {
        return Ok(name.to_vec());
    }
    Err(file.obstacle(
        ", not the file at that path",
        "close it: renamed or hidden files are not supported yet",
    ))
}

/// Whether `name` leads to the very file.
fn is_there(file: &NamedFile<'_>, name: &[u8]) -> Result<bool, CollectError> {
    use std::os::unix::ffi::OsStrExt;
    let path = Path::new(std::ffi::OsStr::from_bytes(name));
    match rustix::fs::lstat(path) {
        Ok(stat) => Ok((stat.st_dev, stat.st_ino) == (file.stat.st_dev, file.stat.st_ino)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG | Errno::ACCESS) => Ok(false),
        Err(errno) => Err(CollectError::Task {
            pid: file.pid,
            action: "Looking for an open file",
            source: errno.into(),
        }),
    }
}
