//! Named pipes (`mkfifo(3)`).
//!
//! Saved:    flags and owner of each end, the name as a regular file entry; size and unread bytes once.
//! Rebuilt:  opened by name, then size and bytes. Needs: the file at its path.
//! Not kept: nothing.

use floe_image::ImageKind;
use floe_image::messages::{FdTypes, FifoEntry, FileEntry};
use rustix::fs::FileType;

use super::regular::{NamedFile, collect_named};
use super::{FdKind, file_entry, pipe};
use crate::collect::{CollectError, Collector, FdProbe, FileId};

/// See the module.
pub struct Fifo;

impl FdKind for Fifo {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.file_type() == FileType::Fifo && fd.target().starts_with(b"/") && !fd.is_path()
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let pipe_id = pipe::pipe_id(fd);
        pipe::save_data(ImageKind::FifoData, pipe_id, fd, collector)?;
        let name_id = collector.ids().fresh();
        let name = collect_named(name_id, NamedFile::of(fd)?, collector)?;
        collector.add_file(name);
        let entry = FifoEntry {
            id: id.0,
            pipe_id,
            regf_id: Some(name_id.0),
        };
        Ok(FileEntry {
            fifo: Some(entry),
            ..file_entry(FdTypes::Fifo, id)
        })
    }
}
