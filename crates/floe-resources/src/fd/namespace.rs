//! Open namespaces (`/proc/<pid>/ns/*`).
//!
//! Saved:    the kind and the number of the namespace, flags.
//! Rebuilt:  our own namespace of that kind is opened. Needs: nothing.
//! Not kept: namespaces that only this descriptor keeps alive; they are refused.

use floe_image::messages::{FdTypes, FileEntry, NsFileEntry};
use floe_kernel::namespace::NsKind;
use rustix::fs::{Mode, OFlags};

use super::{FdKind, FdRestore, file_entry, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::namespace::ids;
use crate::restore::{Attempt, PlanError, Planner, set_flags};
use std::os::fd::AsFd;

/// See the module.
pub struct Namespace;

fn own_path(kind: NsKind) -> String {
    format!("/proc/self/ns/{kind}")
}

impl FdKind for Namespace {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        NsKind::of_link(fd.target()).is_some()
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        _: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let kind = NsKind::of_link(fd.target()).expect("it was recognised by it");
        let own = rustix::fs::stat(own_path(kind))
            .map_err(|errno| fd.failed("Comparing the namespace", errno))?;
        if (own.st_dev, own.st_ino) != (fd.stat().st_dev, fd.stat().st_ino) {
            let what = String::from_utf8_lossy(fd.target());
            let remedy = "close it: only the namespaces that Floe itself is in can be kept so far";
            return Err(CollectError::Unsupported(Obstacle::fd(
                fd.pid(),
                fd.fd(),
                what,
                remedy,
            )));
        }
        let entry = NsFileEntry {
            id: id.0,
            ns_id: ids::host_number(kind),
            ns_cflag: kind.flag(),
            flags: fd.flags(),
        };
        Ok(FileEntry {
            nsf: Some(entry),
            ..file_entry(FdTypes::Ns, id)
        })
    }
}

impl FdRestore for Namespace {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Ns
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.nsf)?;
        let kind = NsKind::of_flag(entry.ns_cflag);
        let host = planner.images.inventory.root_ids.as_ref();
        let ours =
            kind.filter(|kind| host.and_then(|host| ids::get(host, *kind)) == Some(entry.ns_id));
        let Some(kind) = ours else {
            return Err(PlanError::Unsupported {
                object: format!("Namespace {} (file {:#x})", entry.ns_id, entry.id),
                remedy: "only the namespaces that the dump ran in can be kept so far",
            });
        };
        let flags = entry.flags;
        let name = format!("open our {} namespace", kind);
        planner.open(entry.id, name, &[], move |_| {
            let path = own_path(kind);
            let file = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .during("Opening", || path)?;
            set_flags(file.as_fd(), flags)?;
            Ok(file)
        });
        Ok(())
    }
}
