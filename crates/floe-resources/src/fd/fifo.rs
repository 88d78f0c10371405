//! Named pipes (`mkfifo(3)`).
//!
//! Saved:    flags and owner of each end, the name as a regular file entry; size and unread bytes once.
//! Rebuilt:  opened by name, then size and bytes. Needs: the file at its path.
//! Not kept: nothing.

use floe_image::ImageKind;
use floe_image::messages::{FdTypes, FifoEntry, FileEntry};
use rustix::fs::FileType;

use std::os::fd::AsFd;

use floe_image::messages::RegFileEntry;
use floe_plan::Handle;
use rustix::fs::OFlags;

use super::pipe::{Queued, fill, queued};
use super::regular::{NamedFile, collect_named};
use super::{FdKind, FdRestore, file_entry, payload, pipe, regular, remap};
use crate::collect::{CollectError, Collector, FdProbe, FileId};
use crate::restore::{ExecuteError, PlanError, Planner, TreeImages, World, plan_owner, set_flags};

/// See the module.
pub struct Fifo;

impl FdKind for Fifo {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.file_type() == FileType::Fifo && fd.target().starts_with(b"/") && !fd.is_path()
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let pipe_id = pipe::pipe_id(fd);
        pipe::save_data(ImageKind::FifoData, pipe_id, fd, collector)?;
        let name_id = collector.ids().fresh();
        let name = collect_named(name_id, NamedFile::of(fd)?, collector)?;
        collector.add_file(name);
        let entry = FifoEntry {
            id: id.0,
            pipe_id,
            regf_id: Some(name_id.0),
        };
        Ok(FileEntry {
            fifo: Some(entry),
            ..file_entry(FdTypes::Fifo, id)
        })
    }
}

/// One end of a fifo, and the name under which it was opened.
type End<'i> = (&'i FifoEntry, &'i RegFileEntry);

impl FdRestore for Fifo {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Fifo
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.fifo)?;
        let images = planner.images;
        let fifos = images.of_type(FdTypes::Fifo);
        let fifos = fifos.filter_map(|file| file.fifo.as_ref());
        let same: Vec<&FifoEntry> = fifos.filter(|end| end.pipe_id == entry.pipe_id).collect();
        if same[0].id != entry.id {
            return Ok(()); // The first end brings the others along.
        }
        let mut ends: Vec<End<'i>> = Vec::new();
        let (mut needs, mut makes) = (Vec::new(), Vec::new());
        for end in same {
            let name = name_of(images, end)?;
            needs.extend(remap::needs_of_name(images, name));
            makes.push(Handle::File(end.id));
            planner.consume("files.img", u64::from(end.id));
            plan_owner(planner, end.id, &name.fown);
            ends.push((end, name));
        }
        let data = queued(planner, ImageKind::FifoData, entry.pipe_id)?;
        planner.step(
            format!("open fifo {} with {} ends", ends[0].1.name, ends.len()),
            (&needs, &makes),
            move |world| open_ends(world, &ends, data),
        );
        Ok(())
    }
}

/// Older images give name and fifo the same id.
fn name_of<'i>(images: &'i TreeImages, end: &FifoEntry) -> Result<&'i RegFileEntry, PlanError> {
    let name = images.files.get(&end.regf_id.unwrap_or(end.id));
    name.and_then(|file| file.reg.as_ref())
        .ok_or_else(|| PlanError::damaged("files.img", format!("fifo {:#x} has no name", end.id)))
}

/// No end blocks, as each is opened first for reading and writing.
fn open_ends(world: &mut World<'_>, ends: &[End<'_>], data: Queued) -> Result<(), ExecuteError> {
    let mut openers = Vec::with_capacity(ends.len());
    for (end, name) in ends {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opener = regular::open(world, name, flags)?;
        let access = OFlags::from_bits_retain(name.flags) & OFlags::ACCMODE;
        let file = pipe::reopen(opener.as_fd(), access)?;
        set_flags(file.as_fd(), name.flags)?;
        world.keep_file(end.id, file)?;
        openers.push(opener);
    }
    fill(openers[0].as_fd(), data, ends[0].0.pipe_id)
}
