//! Open namespaces (`/proc/<pid>/ns/*`).
//!
//! Saved:    the kind and the number of the namespace, flags.
//! Rebuilt:  our own namespace of that kind is opened, a user namespace when it is made, others of the tree through
//!           a task in it. Needs: that task.
//! Not kept: namespaces that only this descriptor keeps alive, and mount namespaces of single tasks; they
//!           are refused.

use std::os::fd::{AsFd, OwnedFd};

use floe_image::messages::{FdTypes, FileEntry, NsFileEntry};
use floe_kernel::namespace::{NsIdentity, NsKind, own_fd_path, own_proc_path};
use floe_plan::Handle;
use rustix::fs::{Mode, OFlags};

use super::{FdKind, FdRestore, file_entry, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::mount;
use crate::namespace::{entered, ids, made};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, TaskImages, set_flags};

/// See the module.
pub struct Namespace;

impl FdKind for Namespace {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        NsKind::of_link(fd.target()).is_some()
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let kind = NsKind::of_link(fd.target()).expect("it was recognised by it");
        let identity = NsIdentity {
            device: fd.stat().st_dev,
            inode: fd.stat().st_ino,
        };
        let Some(ns_id) = collector.namespaces().number(kind, identity) else {
            let what = String::from_utf8_lossy(fd.target());
            let remedy =
                "close it: only namespaces that a task of the tree or Floe is in can be kept";
            return Err(CollectError::Unsupported(Obstacle::fd(
                fd.pid(),
                fd.fd(),
                what,
                remedy,
            )));
        };
        let entry = NsFileEntry {
            id: id.0,
            ns_id,
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
        // One that is joined is in place of that of the caller.
        let joined =
            |kind: NsKind| kind == NsKind::User && planner.images.users.get(entry.ns_id).is_some();
        let kind = kind.filter(|kind| !joined(*kind));
        let ours =
            kind.filter(|kind| host.and_then(|host| ids::get(host, *kind)) == Some(entry.ns_id));
        let Some(kind) = ours else {
            return plan_of_tree(entry, planner);
        };
        let flags = entry.flags;
        let name = format!("open our {} namespace", kind);
        planner.open(entry.id, name, &[], move |_| {
            open(own_proc_path(&format!("self/ns/{kind}")), flags)
        });
        Ok(())
    }
}

/// A namespace of the tree is there with the first task that is in it.
fn plan_of_tree(entry: &NsFileEntry, planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let images = planner.images;
    let number = entry.ns_id;
    if entry.ns_cflag == NsKind::User.flag() && images.users.get(number).is_some() {
        let flags = entry.flags;
        let name = format!("open user namespace {number}");
        planner.open(entry.id, name, &[made(number)], move |world| {
            let namespace = world.namespaces().get(number)?;
            open(own_fd_path(namespace.as_fd()), flags)
        });
        return Ok(());
    }
    let found = NsKind::of_flag(entry.ns_cflag).and_then(|kind| {
        let is_in = |task: &&TaskImages| {
            let number = task.ids.as_ref().and_then(|ids| ids::get(ids, kind));
            number == Some(entry.ns_id)
        };
        let root = images.root();
        let member = std::iter::once(root).chain(&images.tasks).find(is_in)?;
        Some((kind, member.pid()))
    });
    let Some((kind, member)) = found else {
        return Err(PlanError::Unsupported {
            object: format!("Namespace {} (file {:#x})", entry.ns_id, entry.id),
            remedy: "only namespaces that a task is in can be kept",
        });
    };
    let mut needs = vec![Handle::Tree];
    needs.extend(entered(images, member));
    needs.extend(mount::entered(images, member));
    let flags = entry.flags;
    let name = format!("open the {kind} namespace of task {member}");
    planner.open(entry.id, name, &needs, move |world| {
        let pid = world.puppet(member)?.pid();
        open(own_proc_path(&format!("{pid}/ns/{kind}")), flags)
    });
    Ok(())
}

fn open(path: String, flags: u32) -> Result<OwnedFd, ExecuteError> {
    let file = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .during("Opening", || path)?;
    set_flags(file.as_fd(), flags)?;
    Ok(file)
}
