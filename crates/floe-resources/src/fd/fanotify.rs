//! Groups of fanotify marks (`fanotify(7)`).
//!
//! Saved:    flags and owner, masks of each mark on a file, mount or file system, and what it is on as handle and path
//!           (`/proc/<pid>/fdinfo/<fd>`).
//! Rebuilt:  created, then each mark. Needs: all files, whose opening would be seen.
//! Not kept: events that were not read yet, permissions that were not given yet.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use floe_image::messages::{
    FanotifyFileEntry, FanotifyInodeMarkEntry, FanotifyMarkEntry, FanotifyMountMarkEntry, FdTypes,
    FileEntry, MarkType,
};
use floe_kernel::proc::parse_mountinfo;
use floe_kernel::watch::{fanotify_init, fanotify_mark};
use rustix::fs::OFlags;

use super::watch::{self, Fields, Target, Watched};
use super::{FdKind, FdRestore, file_entry, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::mount::KnownMounts;
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, World, plan_owner};

/// See the module.
pub struct Fanotify;

/// The type of a mark on a whole file system, which it shows by one of its mounts. CRIU has none.
const ON_FILE_SYSTEM: i32 = 3;

/// `linux/fanotify.h`.
mod flag {
    pub const NONBLOCK: u32 = 2;
    pub const MARK_ADD: u32 = 1;
    pub const MARK_MOUNT: u32 = 0x10;
    pub const MARK_IGNORED_MASK: u32 = 0x20;
    pub const MARK_FILESYSTEM: u32 = 0x100;
    pub const MARK_IGNORE: u32 = 0x400;
}

impl FdKind for Fanotify {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.is_anon("[fanotify]")
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let garbled = || fd.garbled("fanotify");
        let mut entry = FanotifyFileEntry {
            id: id.0,
            flags: fd.flags(),
            fown: fd.owner()?,
            ..FanotifyFileEntry::default()
        };
        for line in fd.info().values("fanotify flags") {
            let fields = Fields::of("flags", line).ok_or_else(garbled)?;
            entry.faflags = fields.short("flags").ok_or_else(garbled)?;
            entry.evflags = fields.short("event-flags").ok_or_else(garbled)?;
        }
        for line in fd.info().values("fanotify ino") {
            let fields = Fields::of("ino", line).ok_or_else(garbled)?;
            let mut mark = mark_of(id, &fields, MarkType::Inode).ok_or_else(garbled)?;
            let ino = fields.number("ino").ok_or_else(garbled)?;
            mark.s_dev = fields.short("sdev").ok_or_else(garbled)?;
            let mut f_handle = fields.handle().ok_or_else(garbled)?;
            let watched = Watched {
                dev: mark.s_dev,
                ino,
            };
            let named = watch::find_path(watched, &mut f_handle, fd, collector)?;
            mark.s_dev = named.dev;
            let ie = FanotifyInodeMarkEntry {
                i_ino: named.ino,
                f_handle,
            };
            mark.ie = Some(ie);
            entry.mark.push(mark);
        }
        for line in fd.info().values("fanotify mnt_id") {
            let fields = Fields::of("mnt_id", line).ok_or_else(garbled)?;
            let mark = mark_of(id, &fields, MarkType::Mount).ok_or_else(garbled)?;
            let number = fields.short("mnt_id").ok_or_else(garbled)?;
            entry.mark.push(on_mount(mark, number, (fd, collector))?);
        }
        for line in fd.info().values("fanotify sdev") {
            let fields = Fields::of("sdev", line).ok_or_else(garbled)?;
            let mut mark = mark_of(id, &fields, MarkType::Mount).ok_or_else(garbled)?;
            mark.r#type = ON_FILE_SYSTEM;
            let device = fields.short("sdev").ok_or_else(garbled)?;
            let number = a_mount_of(device, (fd, collector))?;
            entry.mark.push(on_mount(mark, number, (fd, collector))?);
        }
        Ok(FileEntry {
            ffy: Some(entry),
            ..file_entry(FdTypes::Fanotify, id)
        })
    }
}

fn mark_of(id: FileId, fields: &Fields<'_>, kind: MarkType) -> Option<FanotifyMarkEntry> {
    Some(FanotifyMarkEntry {
        id: id.0,
        r#type: kind as i32,
        mflags: fields.short("mflags")?,
        mask: fields.short("mask")?,
        ignored_mask: fields.short("ignored_mask")?,
        ..FanotifyMarkEntry::default()
    })
}

/// A mount of a file system.
fn a_mount_of(
    device: u32,
    (fd, collector): (&FdProbe<'_>, &mut Collector<'_>),
) -> Result<u32, CollectError> {
    let mut known = collector.cache(KnownMounts::default).of_device(device);
    if let Some((_, entry)) = known.next() {
        return Ok(entry.mnt_id);
    }
    let proc = fd.proc();
    let mounts = parse_mountinfo(&proc.read("mountinfo")?).map_err(|error| proc.bad(error))?;
    let mut mounts = mounts.iter();
    let found = mounts.find(|mount| mount.dev_major << 20 | mount.dev_minor == device);
    found.map(|mount| mount.id.cast_unsigned()).ok_or_else(|| {
        let what =
            format!("a fanotify mark on the file system {device:#x}, which is mounted nowhere");
        let remedy = "remove the mark, or mount the file system in the tree";
        CollectError::Unsupported(Obstacle::fd(fd.pid(), fd.fd(), what, remedy))
    })
}

fn on_mount(
    mut mark: FanotifyMarkEntry,
    number: u32,
    (fd, collector): (&FdProbe<'_>, &mut Collector<'_>),
) -> Result<FanotifyMarkEntry, CollectError> {
    let known = collector.cache(KnownMounts::default).find(number);
    let (device, path) = match known {
        Some(entry) => (entry.root_dev, entry.mountpoint.clone()),
        None => {
            let (device, path) = in_own_namespace(number, fd)?;
            let path = String::from_utf8(path);
            (device, path.map_err(|_| fd.garbled("the path of a mount"))?)
        }
    };
    mark.s_dev = device;
    mark.me = Some(FanotifyMountMarkEntry {
        mnt_id: number,
        path: Some(path),
    });
    Ok(mark)
}

/// The device and the point of a mount that the task sees.
fn in_own_namespace(number: u32, fd: &FdProbe<'_>) -> Result<(u32, Vec<u8>), CollectError> {
    let proc = fd.proc();
    let mounts = parse_mountinfo(&proc.read("mountinfo")?).map_err(|error| proc.bad(error))?;
    let mount = mounts
        .into_iter()
        .find(|mount| mount.id.cast_unsigned() == number)
        .ok_or_else(|| {
            let what = format!("a fanotify mark on mount {number} of another namespace");
            let remedy = "remove the mark, or dump the program that is in that namespace";
            CollectError::Unsupported(Obstacle::fd(fd.pid(), fd.fd(), what, remedy))
        })?;
    Ok((mount.dev_major << 20 | mount.dev_minor, mount.point))
}

impl FdRestore for Fanotify {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Fanotify
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.ffy)?;
        let mut marks = Vec::new();
        for mark in &entry.mark {
            marks.push((mark, target_of(mark, planner)?));
        }
        let name = format!("make a fanotify group with {} marks", marks.len());
        let targets = marks.iter().map(|(_, target)| target);
        let needs = watch::needs(planner.images, targets);
        planner.open(entry.id, name, &needs, move |world| {
            make(world, entry, &marks)
        });
        plan_owner(planner, entry.id, &entry.fown);
        Ok(())
    }
}

fn target_of(mark: &FanotifyMarkEntry, planner: &Planner<'_>) -> Result<Target, PlanError> {
    let on_mount = mark.me.as_ref();
    let on_mount = on_mount.and_then(|mount| Some((mount.path.as_ref()?, mount.mnt_id)));
    match (&mark.ie, on_mount) {
        (Some(inode), _) => {
            let watched = Watched {
                dev: mark.s_dev,
                ino: inode.i_ino,
            };
            Target::of(watched, &inode.f_handle, planner.images)
        }
        (None, Some((path, number))) => {
            let path = PathBuf::from("/").join(path);
            Ok(Target::Path(path, Some(number.cast_signed())))
        }
        (None, None) => Err(PlanError::damaged(
            "files.img",
            format!("a mark of fanotify {:#x} is on nothing", mark.id),
        )),
    }
}

fn make(
    world: &mut World<'_>,
    entry: &FanotifyFileEntry,
    marks: &[(&FanotifyMarkEntry, Target)],
) -> Result<OwnedFd, ExecuteError> {
    // The group shows these flags again; the descriptor is made close-on-exec when it is kept.
    let mut flags = entry.faflags;
    if OFlags::from_bits_retain(entry.flags).contains(OFlags::NONBLOCK) {
        flags |= flag::NONBLOCK;
    }
    let group =
        fanotify_init(flags, entry.evflags).during("Making", || "a fanotify group".into())?;
    for (mark, target) in marks {
        let (path, _held) = target.find(world)?;
        let mut flags = flag::MARK_ADD | mark.mflags & !flag::MARK_IGNORE;
        match mark.r#type {
            ON_FILE_SYSTEM => flags |= flag::MARK_FILESYSTEM,
            _ if mark.r#type() == MarkType::Mount => flags |= flag::MARK_MOUNT,
            _ => {}
        }
        // There are two ways of ignoring, of which a mark has one.
        let ignoring = match mark.mflags & flag::MARK_IGNORE {
            0 => flag::MARK_IGNORED_MASK,
            ignore => ignore,
        };
        let masks = [(flags, mark.mask), (flags | ignoring, mark.ignored_mask)];
        for (flags, mask) in masks.into_iter().filter(|(_, mask)| *mask != 0) {
            fanotify_mark(group.as_fd(), flags, u64::from(mask), &path)
                .during("Making a fanotify mark on", || path.display().to_string())?;
        }
    }
    Ok(group)
}
