//! Signal queues as files (`signalfd(2)`).
//!
//! Saved:    mask and flags (`/proc/<pid>/fdinfo/<fd>`), owner.
//! Rebuilt:  created with the mask, then flags and owner. Needs: nothing.
//! Not kept: nothing; pending signals belong to the tasks.

use floe_image::messages::{FdTypes, FileEntry, SignalfdEntry};

use super::{FdKind, file_entry};
use super::{FdRestore, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId};
use crate::restore::{Attempt, PlanError, Planner, plan_owner, set_flags};
use std::os::fd::AsFd;

/// See the module.
pub struct SignalFd;

impl FdKind for SignalFd {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.is_anon("[signalfd]")
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        _: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let entry = SignalfdEntry {
            id: id.0,
            flags: fd.flags(),
            fown: fd.owner()?,
            sigmask: fd.info_number("sigmask", 16)?,
        };
        Ok(FileEntry {
            sgfd: Some(entry),
            ..file_entry(FdTypes::Signalfd, id)
        })
    }
}

impl FdRestore for SignalFd {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Signalfd
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.sgfd)?;
        planner.open(entry.id, "make a signalfd", &[], move |_| {
            let signals = floe_kernel::anonymous::signalfd(entry.sigmask)
                .during("Making a signalfd for", || format!("{:#x}", entry.sigmask))?;
            set_flags(signals.as_fd(), entry.flags)?;
            Ok(signals)
        });
        plan_owner(planner, entry.id, &entry.fown);
        Ok(())
    }
}
