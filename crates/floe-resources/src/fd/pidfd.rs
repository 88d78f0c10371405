//! Handles on processes (`pidfd_open(2)`).
//!
//! Saved:    the process's pid, and the inode by which handles on dead processes are told apart; owner.
//! Rebuilt:  opened on the restored process. Needs: the process.
//! Not kept: nothing.

use floe_image::messages::{FdTypes, FileEntry, PidfdEntry};
use rustix::fs::OFlags;

use std::os::fd::{AsFd, OwnedFd};

use floe_kernel::ids::HostPid;
use floe_kernel::placeholder::Placeholder;
use floe_plan::Handle;
use rustix::process::{Pid, PidfdFlags};

use super::{FdKind, FdRestore, file_entry, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, World, plan_owner, set_flags};

/// See the module.
pub struct PidFd;

/// `PIDFD_THREAD`: the handle is on a thread.
const THREAD: u32 = OFlags::EXCL.bits();

impl FdKind for PidFd {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.is_anon("[pidfd]")
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        if fd.flags() & THREAD != 0 {
            let remedy = "close it: handles on threads are not supported";
            return Err(CollectError::Unsupported(Obstacle::fd(
                fd.pid(),
                fd.fd(),
                "pidfd of a thread",
                remedy,
            )));
        }
        let process = process_of(fd)?;
        if process.0 > 0 && !collector.is_in_tree(process) {
            return Err(CollectError::Unsupported(Obstacle::fd(
                fd.pid(),
                fd.fd(),
                format!("pidfd of task {process}, which is not in the tree"),
                "close it, or dump a tree with both",
            )));
        }
        let entry = PidfdEntry {
            id: id.0,
            ino: fd.stat().st_ino as u32,
            flags: fd.flags() & !OFlags::RDWR.bits(),
            nspid: match process {
                HostPid(GONE) => GONE,
                process => fd.pids().number(process).cast_signed(),
            },
            fown: fd.owner()?,
        };
        Ok(FileEntry {
            pidfd: Some(entry),
            ..file_entry(FdTypes::Pidfd, id)
        })
    }
}

/// The process; -1 when it is gone.
fn process_of(fd: &FdProbe<'_>) -> Result<HostPid, CollectError> {
    let text = fd.info().value("Pid").map(String::from_utf8_lossy);
    text.and_then(|pid| pid.trim().parse().ok())
        .map(HostPid)
        .ok_or_else(|| fd.garbled("Pid"))
}

/// `pidfd_entry.nspid` of a process that is gone.
const GONE: i32 = -1;

impl FdRestore for PidFd {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Pidfd
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.pidfd)?;
        plan_owner(planner, entry.id, &entry.fown);
        if entry.nspid == GONE {
            plan_gone(entry, planner);
            return Ok(());
        }
        let pid = entry.nspid.cast_unsigned();
        if planner.images.task(pid).is_none() {
            return Err(PlanError::Unsupported {
                object: format!("A pidfd of task {pid}, which is not in the tree,"),
                remedy: "dump that task too, or close the pidfd before the dump",
            });
        }
        let needs = [Handle::Born(pid), Handle::Tree];
        planner.open(
            entry.id,
            format!("pidfd of task {pid}"),
            &needs,
            move |world| {
                let pid = world.puppet(pid)?.pid();
                open(pid, entry)
            },
        );
        Ok(())
    }
}

/// Handles on one dead process have the same inode: they are opened on the same process, which then
/// ends.
fn plan_gone<'i>(entry: &'i PidfdEntry, planner: &mut Planner<'i>) {
    let all = planner.images.files.values();
    let same: Vec<&PidfdEntry> = all
        .filter_map(|file| file.pidfd.as_ref())
        .filter(|other| other.nspid == GONE && other.ino == entry.ino)
        .collect();
    if same[0].id != entry.id {
        return; // The first one brings the others along.
    }
    let makes: Vec<Handle> = same.iter().map(|entry| Handle::File(entry.id)).collect();
    for entry in &same {
        planner.consume("files.img", u64::from(entry.id));
    }
    planner.step("pidfds of a dead process", (&[], &makes), move |world| {
        open_gone(world, &same)
    });
}

fn open_gone(world: &mut World<'_>, entries: &[&PidfdEntry]) -> Result<(), ExecuteError> {
    let process = Placeholder::start(None)
        .during("Starting", || "a process to have pidfds of".to_string())?;
    for entry in entries {
        let file = open(process.pid(), entry)?;
        world.keep_file(entry.id, file)?;
    }
    Ok(())
}

fn open(pid: HostPid, entry: &PidfdEntry) -> Result<OwnedFd, ExecuteError> {
    let known = Pid::from_raw(pid.0).expect("processes have pids above zero");
    let file = rustix::process::pidfd_open(known, PidfdFlags::empty())
        .during("Opening a pidfd of", || format!("process {pid}"))?;
    set_flags(file.as_fd(), entry.flags)?;
    Ok(file)
}
