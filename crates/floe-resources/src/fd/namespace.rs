//! Open namespaces (`/proc/<pid>/ns/*`).
//!
//! Saved:    the kind and the number of the namespace, flags.
//! Rebuilt:  our own namespace of that kind is opened. Needs: nothing.
//! Not kept: namespaces that only this descriptor keeps alive; they are refused.

use floe_image::messages::{FdTypes, FileEntry, NsFileEntry, TaskKobjIdsEntry};
use rustix::fs::{Mode, OFlags};

use super::{FdKind, FdRestore, file_entry, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::restore::{Attempt, PlanError, Planner, set_flags};
use std::os::fd::AsFd;

/// See the module.
pub struct Namespace;

/// A kind of namespace.
#[derive(Debug)]
pub struct Kind {
    /// Its link in `/proc/<pid>/ns`.
    pub name: &'static str,
    /// The number that the coordinator's own has in our images.
    pub number: u32,
    /// Its flag in `clone(2)`.
    flag: u32,
    /// Its number in the ids of a task.
    id: fn(&TaskKobjIdsEntry) -> Option<u32>,
}

/// Every kind there is.
pub const KINDS: [Kind; 8] = [
    Kind {
        name: "pid",
        number: 1,
        flag: libc::CLONE_NEWPID as u32,
        id: |ids| ids.pid_ns_id,
    },
    Kind {
        name: "net",
        number: 2,
        flag: libc::CLONE_NEWNET as u32,
        id: |ids| ids.net_ns_id,
    },
    Kind {
        name: "ipc",
        number: 3,
        flag: libc::CLONE_NEWIPC as u32,
        id: |ids| ids.ipc_ns_id,
    },
    Kind {
        name: "uts",
        number: 4,
        flag: libc::CLONE_NEWUTS as u32,
        id: |ids| ids.uts_ns_id,
    },
    Kind {
        name: "mnt",
        number: 5,
        flag: libc::CLONE_NEWNS as u32,
        id: |ids| ids.mnt_ns_id,
    },
    Kind {
        name: "user",
        number: 6,
        flag: libc::CLONE_NEWUSER as u32,
        id: |ids| ids.user_ns_id,
    },
    Kind {
        name: "cgroup",
        number: 7,
        flag: libc::CLONE_NEWCGROUP as u32,
        id: |ids| ids.cgroup_ns_id,
    },
    Kind {
        name: "time",
        number: 8,
        flag: 0x80,
        id: |ids| ids.time_ns_id,
    },
];

/// The kind of the namespace behind a link such as `net:[4026531840]`.
fn kind_of(link: &[u8]) -> Option<&'static Kind> {
    KINDS.iter().find(|kind| {
        let rest = link.strip_prefix(kind.name.as_bytes());
        rest.is_some_and(|rest| rest.starts_with(b":["))
    })
}

fn own_path(kind: &Kind) -> String {
    format!("/proc/self/ns/{}", kind.name)
}

impl FdKind for Namespace {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        kind_of(fd.target()).is_some()
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        _: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let kind = kind_of(fd.target()).expect("it was recognised by it");
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
            ns_id: kind.number,
            ns_cflag: kind.flag,
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
        let kind = KINDS.iter().find(|kind| kind.flag == entry.ns_cflag);
        let host = planner.images.inventory.root_ids.as_ref();
        let ours = kind.filter(|kind| host.and_then(kind.id) == Some(entry.ns_id));
        let Some(kind) = ours else {
            return Err(PlanError::Unsupported {
                object: format!("Namespace {} (file {:#x})", entry.ns_id, entry.id),
                remedy: "only the namespaces that the dump ran in can be kept so far",
            });
        };
        let flags = entry.flags;
        let name = format!("open our {} namespace", kind.name);
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

/// Refuses trees that were in other namespaces than the process that dumped them.
pub fn check_namespaces(planner: &Planner<'_>) -> Result<(), PlanError> {
    let images = planner.images;
    let Some(host) = &images.inventory.root_ids else {
        return Ok(()); // Older than namespaces in images.
    };
    for task in &images.tasks {
        let Some(ids) = &task.ids else {
            continue;
        };
        // A cgroup namespace is made together with the groups.
        for kind in KINDS.iter().filter(|kind| kind.name != "cgroup") {
            let own = (kind.id)(ids).filter(|number| *number != 0);
            if own.is_some() && (kind.id)(host).is_some_and(|number| Some(number) != own) {
                return Err(PlanError::Unsupported {
                    object: format!("The {} namespace of task {}", kind.name, task.pid()),
                    remedy: "namespaces are not supported yet; restore it with CRIU",
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::kind_of;

    #[test]
    fn links_tell_the_kind() {
        let name = |link: &[u8]| kind_of(link).map(|kind| kind.name);
        assert_eq!(name(b"net:[4026531840]"), Some("net"));
        assert_eq!(name(b"network:[1]"), None);
        assert_eq!(name(b"/proc/1/ns/net"), None);
    }
}
