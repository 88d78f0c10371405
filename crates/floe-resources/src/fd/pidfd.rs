//! Handles on processes (`pidfd_open(2)`).
//!
//! Saved:    the process's pid, and the inode by which handles on dead processes are told apart; owner.
//! Rebuilt:  opened on the restored process. Needs: the process.
//! Not kept: nothing.

use floe_image::messages::{FdTypes, FileEntry, PidfdEntry};
use rustix::fs::OFlags;

use super::{FdKind, file_entry};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};

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
        _: &mut Collector<'_>,
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
        let entry = PidfdEntry {
            id: id.0,
            ino: fd.stat().st_ino as u32,
            flags: fd.flags() & !OFlags::RDWR.bits(),
            nspid: ns_pid(fd)?,
            fown: fd.owner()?,
        };
        Ok(FileEntry {
            pidfd: Some(entry),
            ..file_entry(FdTypes::Pidfd, id)
        })
    }
}

/// The pid in the innermost namespace; -1 when the process is gone.
fn ns_pid(fd: &FdProbe<'_>) -> Result<i32, CollectError> {
    let text = |key| {
        fd.info()
            .value(key)
            .map(|value| String::from_utf8_lossy(value).into_owned())
    };
    let last = text("NSpid").or_else(|| text("Pid")).unwrap_or_default();
    last.split_whitespace()
        .last()
        .and_then(|pid| pid.parse().ok())
        .ok_or_else(|| fd.garbled("Pid"))
}
