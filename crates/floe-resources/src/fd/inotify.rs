//! Watches on files (`inotify(7)`).
//!
//! Saved:    flags and owner, number and mask of each watch, and what it is on as handle and path
//!           (`/proc/<pid>/fdinfo/<fd>`).
//! Rebuilt:  created, then each watch under its number. Needs: all files, whose opening would be seen.
//! Not kept: events that were not read yet.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use floe_image::messages::{FdTypes, FileEntry, InotifyFileEntry, InotifyWdEntry};
use floe_kernel::watch::{inotify_add, inotify_remove, inotify_set_next};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::inotify::CreateFlags;

use super::watch::{self, Fields, Target, Watched};
use super::{FdKind, FdRestore, file_entry, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, World, plan_owner, set_flags};

/// See the module.
pub struct Inotify;

/// `IN_ALL_EVENTS`, `IN_EXCL_UNLINK` and `IN_ONESHOT`; the kernel shows bits of its own beside them.
const SETTABLE: u32 = 0xfff | 1 << 26 | 1 << 31;

impl FdKind for Inotify {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.target() == b"anon_inode:inotify"
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        if has_events(fd.file()).map_err(|source| fd.failed("Polling", source))? {
            tracing::warn!(pid = %fd.pid(), fd = %fd.fd(), "unread events of inotify are lost");
        }
        let mut watches = Vec::new();
        for line in fd.info().values("inotify wd") {
            let mut watch = parse(id, line).ok_or_else(|| fd.garbled("inotify"))?;
            let watched = watched(&watch);
            let named = watch::find_path(watched, &mut watch.f_handle, fd, collector)?;
            (watch.s_dev, watch.i_ino) = (named.dev, named.ino);
            watches.push(watch);
        }
        let entry = InotifyFileEntry {
            id: id.0,
            flags: fd.flags(),
            fown: fd.owner()?,
            wd: watches,
        };
        Ok(FileEntry {
            ify: Some(entry),
            ..file_entry(FdTypes::Inotify, id)
        })
    }
}

fn parse(id: FileId, line: &[u8]) -> Option<InotifyWdEntry> {
    let fields = Fields::of("wd", line)?;
    Some(InotifyWdEntry {
        id: id.0,
        i_ino: fields.number("ino")?,
        mask: fields.short("mask")?,
        ignored_mask: fields.short("ignored_mask")?,
        s_dev: fields.short("sdev")?,
        wd: fields.short("wd")?,
        f_handle: fields.handle()?,
    })
}

fn watched(watch: &InotifyWdEntry) -> Watched {
    Watched {
        dev: watch.s_dev,
        ino: watch.i_ino,
    }
}

impl FdRestore for Inotify {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Inotify
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.ify)?;
        let mut watches = Vec::new();
        for watch in &entry.wd {
            let target = Target::of(watched(watch), &watch.f_handle, planner.images)?;
            watches.push((watch, target));
        }
        // Numbers only grow.
        watches.sort_by_key(|(watch, _)| watch.wd);
        let name = format!("make an inotify with {} watches", watches.len());
        let targets = watches.iter().map(|(_, target)| target);
        let needs = watch::needs(planner.images, targets);
        planner.open(entry.id, name, &needs, move |world| {
            let inotify = make(world, entry, &watches)?;
            // Whatever the restore itself did is none of the program's business.
            let again = inotify
                .try_clone()
                .during("Duplicating", || "an inotify".into())?;
            world.before_release(move || drain(&again));
            Ok(inotify)
        });
        plan_owner(planner, entry.id, &entry.fown);
        Ok(())
    }
}

fn make(
    world: &mut World<'_>,
    entry: &InotifyFileEntry,
    watches: &[(&InotifyWdEntry, Target)],
) -> Result<OwnedFd, ExecuteError> {
    let inotify =
        rustix::fs::inotify::init(CreateFlags::CLOEXEC).during("Making", || "an inotify".into())?;
    set_flags(inotify.as_fd(), entry.flags)?;
    for (watch, target) in watches {
        let (path, _held) = target.find(world)?;
        let mask = watch.mask & SETTABLE;
        add(inotify.as_fd(), &path, (watch.wd.cast_signed(), mask))
            .during("Making inotify watch", || watch.wd.to_string())?;
    }
    Ok(inotify)
}

/// Watches under a number. Kernels without a way to choose it give the next one each time.
fn add(inotify: BorrowedFd<'_>, path: &Path, (wanted, mask): (i32, u32)) -> io::Result<()> {
    let chosen = inotify_set_next(inotify, wanted).is_ok();
    loop {
        let number = inotify_add(inotify, path, mask)?;
        if number == wanted {
            return Ok(());
        }
        if chosen || number > wanted {
            let what = format!("the kernel numbered it {number}");
            return Err(io::Error::other(what));
        }
        inotify_remove(inotify, number)?;
    }
}

fn has_events(inotify: BorrowedFd<'_>) -> io::Result<bool> {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut poll = [PollFd::from_borrowed_fd(inotify, PollFlags::IN)];
    Ok(rustix::event::poll(&mut poll, Some(&now))? > 0)
}

fn drain(inotify: &OwnedFd) {
    let mut events = [0; 4096];
    while has_events(inotify.as_fd()).is_ok_and(|some| some) {
        if rustix::io::read(inotify, &mut events).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_get_their_numbers() {
        let dir = tempfile::tempdir().expect("a directory");
        let inotify = rustix::fs::inotify::init(CreateFlags::CLOEXEC).expect("an inotify");
        add(inotify.as_fd(), dir.path(), (5, 0x100)).expect("watched");
        add(inotify.as_fd(), Path::new("/"), (9, 0x100)).expect("watched");
        std::fs::write(dir.path().join("x"), "").expect("written");
        assert!(has_events(inotify.as_fd()).expect("polled"));
        drain(&inotify);
        assert!(!has_events(inotify.as_fd()).expect("polled"));
    }
}
