//! One dump at a time writes to a directory; what nobody writes to any more was left by one that was killed.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::error::DumpError;

/// A directory that is ours until this is dropped, or this process ends.
#[derive(Debug)]
pub struct DirLock {
    _directory: Option<OwnedFd>,
}

impl DirLock {
    /// Takes a directory, which is made if it is not there. What else is wrong with it is for whoever writes to it.
    pub fn take(path: &Path) -> Result<DirLock, DumpError> {
        let _ = rustix::fs::mkdir(path, Mode::RWXU);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(directory) = rustix::fs::open(path, flags, Mode::empty()) else {
            return Ok(DirLock { _directory: None });
        };
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => Err(DumpError::DirectoryTaken {
                path: path.to_path_buf(),
            }),
            // Not every file system has locks.
            _ => Ok(DirLock {
                _directory: Some(directory),
            }),
        }
    }

    /// Removes a directory and all in it, unless somebody writes to it.
    pub fn remove_left(path: &Path) {
        let Ok(_ours) = DirLock::take(path) else {
            return;
        };
        if let Err(error) = std::fs::remove_dir_all(path) {
            tracing::warn!(%error, path = %path.display(), "what a killed dump has left stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_taken_once_and_removed_only_when_it_is_free() {
        let place = tempfile::tempdir().expect("a directory");
        let path = place.path().join("images");
        let lock = DirLock::take(&path).expect("free");
        let error = DirLock::take(&path).expect_err("taken");
        assert!(error.to_string().contains("another dump"), "{error}");
        DirLock::remove_left(&path);
        assert!(path.exists());
        drop(lock);
        DirLock::remove_left(&path);
        assert!(!path.exists());
    }
}
