//! The link to the directory that a dump builds on.

use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::{ImageWriter, WriteError};
use crate::dir::PARENT_LINK;

impl ImageWriter {
    /// Makes the link to the directory that this dump builds on; `target` is relative to this one.
    pub fn link_parent(&self, target: &Path) -> Result<(), WriteError> {
        self.unlink_parent()?;
        rustix::fs::symlinkat(target, &self.inner.fd, PARENT_LINK)
            .map_err(|errno| self.no_link(errno))?;
        self.inner.linked.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Takes away the link of an earlier dump into this directory.
    pub fn unlink_parent(&self) -> Result<(), WriteError> {
        match rustix::fs::unlinkat(&self.inner.fd, PARENT_LINK, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(self.no_link(errno)),
        }
    }

    fn no_link(&self, errno: Errno) -> WriteError {
        WriteError::Create {
            path: self.file_path(PARENT_LINK),
            source: errno.into(),
        }
    }
}
