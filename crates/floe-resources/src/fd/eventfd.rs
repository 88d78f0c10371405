//! Event counters (`eventfd(2)`).
//!
//! Saved:    counter and flags (`/proc/<pid>/fdinfo/<fd>`), owner.
//! Rebuilt:  created with the counter, then flags and owner. Needs: nothing.
//! Not kept: blocked readers; they restart with their own task.

use floe_image::messages::{EventfdFileEntry, FdTypes, FileEntry};

use super::{FdKind, file_entry};
use crate::collect::{CollectError, Collector, FdProbe, FileId};

/// See the module.
pub struct EventFd;

/// `EFD_SEMAPHORE`, which fdinfo prints on a line of its own.
const SEMAPHORE: u32 = 1;

impl FdKind for EventFd {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.is_anon("[eventfd]")
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        _: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let counter = fd.info_number("eventfd-count", 16)?;
        let semaphore = fd
            .info()
            .value("eventfd-semaphore")
            .is_some_and(|value| value == b"1");
        let entry = EventfdFileEntry {
            id: id.0,
            flags: fd.flags() | if semaphore { SEMAPHORE } else { 0 },
            fown: fd.owner()?,
            counter,
        };
        Ok(FileEntry {
            efd: Some(entry),
            ..file_entry(FdTypes::Eventfd, id)
        })
    }
}
