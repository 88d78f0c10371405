//! Event counters (`eventfd(2)`).
//!
//! Saved:    counter and flags (`/proc/<pid>/fdinfo/<fd>`), owner.
//! Rebuilt:  created with the counter, then flags and owner. Needs: nothing.
//! Not kept: blocked readers; they restart with their own task.

use floe_image::messages::{EventfdFileEntry, FdTypes, FileEntry};

use super::{FdKind, file_entry};
use super::{FdRestore, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId};
use crate::restore::{Attempt, PlanError, Planner, plan_owner, set_flags};
use rustix::event::EventfdFlags;
use std::os::fd::AsFd;

/// See the module.
pub struct EventFd;

/// `EFD_SEMAPHORE`, which fdinfo prints on a line of its own (Linux 6.5+).
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
        let told = fd.info().value("eventfd-semaphore");
        if told.is_none() {
            tracing::info!(
                "an eventfd is taken for a plain counter: this kernel does not tell whether it is a \
                 semaphore"
            );
        }
        let semaphore = told.is_some_and(|value| value == b"1");
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

impl FdRestore for EventFd {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Eventfd
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.efd)?;
        planner.open(entry.id, "make an eventfd", &[], move |_| {
            let semaphore = if entry.flags & SEMAPHORE != 0 {
                EventfdFlags::SEMAPHORE
            } else {
                EventfdFlags::empty()
            };
            let what = || format!("with counter {}", entry.counter);
            let event = rustix::event::eventfd(0, semaphore | EventfdFlags::CLOEXEC)
                .during("Making an eventfd", what)?;
            if entry.counter > 0 {
                rustix::io::write(&event, &entry.counter.to_ne_bytes())
                    .during("Setting an eventfd", what)?;
            }
            set_flags(event.as_fd(), entry.flags)?;
            Ok(event)
        });
        plan_owner(planner, entry.id, &entry.fown);
        Ok(())
    }
}
