//! Directories and files that are mounted somewhere, and have been deleted.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode};
use rustix::io::Errno;

use super::execute::open_within;

/// A name that is there only to be copied.
#[derive(Debug)]
pub struct Leftover {
    directory: OwnedFd,
    /// The name.
    pub name: String,
    is_directory: bool,
}

impl Leftover {
    /// Takes it away.
    pub fn remove(&self) -> Result<(), Errno> {
        let flags = match self.is_directory {
            true => AtFlags::REMOVEDIR,
            false => AtFlags::empty(),
        };
        rustix::fs::unlinkat(&self.directory, self.name.as_str(), flags)
    }
}

/// Makes what was deleted, and the directories that it was in.
pub fn make_deleted(
    source: BorrowedFd<'_>,
    part: &str,
    kind: FileType,
) -> std::io::Result<(OwnedFd, Vec<Leftover>)> {
    let mut at = source.try_clone_to_owned()?;
    let mut made = Vec::new();
    let names: Vec<&str> = part.split('/').collect();
    for (index, name) in names.iter().enumerate() {
        let is_last = index + 1 == names.len();
        let is_directory = !is_last || kind == FileType::Directory;
        let result = if is_directory {
            rustix::fs::mkdirat(&at, *name, Mode::from_raw_mode(0o755))
        } else {
            rustix::fs::mknodat(&at, *name, kind, Mode::from_raw_mode(0o644), 0)
        };
        match result {
            Ok(()) => made.push(Leftover {
                directory: at.try_clone()?,
                name: (*name).to_string(),
                is_directory,
            }),
            Err(Errno::EXIST) if !is_last => {}
            Err(errno) => return Err(errno.into()),
        }
        at = open_within(at.as_fd(), name)?;
    }
    Ok((at, made))
}
