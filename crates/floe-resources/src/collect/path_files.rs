//! Files that a task refers to without a descriptor: its program, directories and mappings.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use floe_image::messages::FileEntry;
use floe_kernel::ids::HostPid;
use rustix::fs::{AtFlags, Stat, StatxFlags};

use super::probe::no_owner;
use super::{CollectError, Collector, FileId};
use crate::fd::memfd::collect_memfd;
use crate::fd::regular::{NamedFile, collect_named};

type CollectFile = fn(FileId, NamedFile<'_>, &mut Collector<'_>) -> Result<FileEntry, CollectError>;

/// An opened (`O_PATH`) link of `/proc`, such as `exe`, `cwd`, `root` or one of `map_files`.
#[derive(Debug)]
pub struct PathFile {
    pid: HostPid,
    /// What refers to it, for messages.
    role: &'static str,
    file: OwnedFd,
    stat: Stat,
}

impl PathFile {
    /// Takes an opened link.
    pub fn new(pid: HostPid, role: &'static str, file: OwnedFd) -> Result<Self, CollectError> {
        let stat = rustix::fs::fstat(&file).map_err(|errno| CollectError::Task {
            pid,
            action: "Looking at a file",
            source: errno.into(),
        })?;
        Ok(PathFile {
            pid,
            role,
            file,
            stat,
        })
    }

    /// Metadata of the file.
    pub fn stat(&self) -> &Stat {
        &self.stat
    }

    /// The opened file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Adds the file to the images, once for all that refer to it, and returns its number. Restore
    /// decides on flags by itself.
    pub fn collect(&self, collector: &mut Collector<'_>) -> Result<FileId, CollectError> {
        self.collect_as(collector, collect_named)
    }

    /// As [`PathFile::collect`], for memory that was never in a directory.
    pub fn collect_memory(&self, collector: &mut Collector<'_>) -> Result<FileId, CollectError> {
        self.collect_as(collector, collect_memfd)
    }

    fn collect_as(
        &self,
        collector: &mut Collector<'_>,
        collect: CollectFile,
    ) -> Result<FileId, CollectError> {
        let failed = |errno: rustix::io::Errno| CollectError::Task {
            pid: self.pid,
            action: "Looking at a file",
            source: errno.into(),
        };
        let mount = rustix::fs::statx(&self.file, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
            .map_err(failed)?
            .stx_mnt_id;
        let (id, new) = collector
            .ids()
            .of_path(self.stat.st_dev, self.stat.st_ino, mount);
        if new {
            let link = super::probe::own_link(self.file.as_fd()).map_err(failed)?;
            let named = NamedFile {
                pid: self.pid,
                role: self.role.to_string(),
                file: self.file.as_fd(),
                stat: &self.stat,
                target: &link,
                flags: 0,
                pos: 0,
                owner: no_owner(),
                is_mapped: true,
            };
            let entry = collect(id, named, collector)?;
            collector.add_file(entry);
        }
        Ok(id)
    }
}
