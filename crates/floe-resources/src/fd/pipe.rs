//! Anonymous pipes (`pipe(2)`).
//!
//! Saved:    flags and owner of each end; size and unread bytes once for each pipe, of a pipe in packet
//!           mode (`O_DIRECT`) one entry a packet: CRIU refuses such a pipe.
//! Rebuilt:  created with the first end, then size and bytes, further ends are reopened. Needs: nothing.
//! Not kept: whether bytes from before a change of the mode were a packet.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use floe_image::ImageKind;
use floe_image::messages::{FdTypes, FileEntry, PipeDataEntry, PipeEntry};
use floe_kernel::namespace::own_fd_path;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;

use super::{FdKind, file_entry};
use super::{FdRestore, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId};
use crate::restore::{
    Attempt, ExecuteError, PlanError, Planner, TreeImages, World, plan_owner, set_flags,
};
use floe_plan::Handle;
use rustix::fs::Mode;
use std::os::fd::OwnedFd;

/// See the module.
pub struct Pipe;

/// Pipes whose bytes are saved already, by the image that has them.
#[derive(Default)]
struct Saved(HashSet<(ImageKind, u32)>);

impl FdKind for Pipe {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.target().starts_with(b"pipe:[")
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let pipe_id = pipe_id(fd);
        save_data(ImageKind::PipesData, pipe_id, fd, collector)?;
        let entry = PipeEntry {
            id: id.0,
            pipe_id,
            flags: fd.flags(),
            fown: fd.owner()?,
        };
        Ok(FileEntry {
            pipe: Some(entry),
            ..file_entry(FdTypes::Pipe, id)
        })
    }
}

/// The number that all ends of a pipe share in the images: its inode's.
pub(super) fn pipe_id(fd: &FdProbe<'_>) -> u32 {
    // Inode numbers of pipefs are 32 bits wide in the kernel.
    fd.stat().st_ino as u32
}

/// Saves size and unread bytes of a pipe or fifo, once, through an end that can be read.
pub(super) fn save_data(
    kind: ImageKind,
    pipe_id: u32,
    fd: &FdProbe<'_>,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let readable = !fd.is_path() && fd.flags() & OFlags::ACCMODE.bits() != OFlags::WRONLY.bits();
    if !readable || !collector.cache(Saved::default).0.insert((kind, pipe_id)) {
        return Ok(());
    }
    let failed = |action| move |error: io::Error| fd.failed(action, error);
    let size = rustix::pipe::fcntl_getpipe_size(fd.file())
        .map_err(|errno| fd.failed("Asking for the size", errno))?;
    let packets = peek(fd.file(), size).map_err(failed("Copying the bytes"))?;
    for bytes in packets {
        let entry = PipeDataEntry {
            pipe_id,
            bytes: bytes.len() as u32,
            size: Some(size as u32),
        };
        collector.side(kind, 0)?.append_with_extra(&entry, &bytes)?;
    }
    Ok(())
}

/// The unread bytes, left where they are: `tee` copies references from pipe to pipe. Bytes without
/// boundaries are one piece, even if there are none; a packet ends its piece, as it ends a read.
fn peek(pipe: BorrowedFd<'_>, size: usize) -> io::Result<Vec<Vec<u8>>> {
    let unread = rustix::io::ioctl_fionread(pipe)?;
    if unread == 0 {
        return Ok(vec![Vec::new()]);
    }
    let (out, into) = rustix::pipe::pipe_with(
        rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK,
    )?;
    // A pipe holds buffers, not bytes, and `tee` takes whole buffers: ours must have as many.
    rustix::pipe::fcntl_setpipe_size(&into, size)?;
    let mut left = rustix::pipe::tee(pipe, into.as_fd(), size, SpliceFlags::NONBLOCK)?;
    let mut pieces = Vec::new();
    while left > 0 {
        let mut piece = vec![0; left];
        let read = rustix::io::read(&out, &mut piece[..])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        piece.truncate(read);
        pieces.push(piece);
        left -= read;
    }
    Ok(pieces)
}

impl FdRestore for Pipe {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Pipe
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.pipe)?;
        let images = planner.images;
        let ends = planner.try_cache(|images| Ok(Ends::of(images)))?;
        let Some(ends) = ends.0.remove(&entry.id) else {
            return Ok(()); // The first end brings the others along.
        };
        let ends = ends.iter().map(|id| &images.files[id]);
        let ends: Vec<&PipeEntry> = ends.filter_map(|file| file.pipe.as_ref()).collect();
        let data = queued(planner, ImageKind::PipesData, entry.pipe_id)?;
        let makes: Vec<Handle> = ends.iter().map(|end| Handle::File(end.id)).collect();
        for end in &ends {
            planner.consume("files.img", u64::from(end.id));
            plan_owner(planner, end.id, &end.fown);
        }
        planner.step(
            format!("make pipe {:#x} with {} ends", entry.pipe_id, ends.len()),
            (&[], &makes),
            move |world| make(world, &ends, data),
        );
        Ok(())
    }
}

/// The size of a pipe and its unread bytes, in order; more than one piece if they are packets.
pub(super) type Queued = Vec<(PipeDataEntry, Vec<u8>)>;

/// The files that are the ends of a pipe, for every pipe by its first one.
struct Ends(HashMap<u32, Vec<u32>>);

impl Ends {
    fn of(images: &TreeImages) -> Self {
        let mut ends: HashMap<u32, Vec<u32>> = HashMap::new();
        for file in images.of_type(FdTypes::Pipe) {
            if let Some(pipe) = &file.pipe {
                ends.entry(pipe.pipe_id).or_default().push(file.id);
            }
        }
        Ends(ends.into_values().map(|ends| (ends[0], ends)).collect())
    }
}

/// What is queued in pipes and fifos that are not planned yet, by the image that has it.
struct AllQueued(HashMap<(ImageKind, u32), Queued>);

impl AllQueued {
    fn read(images: &TreeImages) -> Result<Self, PlanError> {
        let mut all: HashMap<_, Queued> = HashMap::new();
        for kind in [ImageKind::PipesData, ImageKind::FifoData] {
            for (entry, bytes) in images.dir.read_with_extra::<PipeDataEntry>(kind, 0)? {
                let pieces = all.entry((kind, entry.pipe_id)).or_default();
                pieces.push((entry, bytes));
            }
        }
        Ok(AllQueued(all))
    }
}

/// Takes the data of a pipe or fifo.
pub(super) fn queued(
    planner: &mut Planner<'_>,
    kind: ImageKind,
    pipe_id: u32,
) -> Result<Queued, PlanError> {
    let all = planner.try_cache(AllQueued::read)?;
    Ok(all.0.remove(&(kind, pipe_id)).unwrap_or_default())
}

fn make(world: &mut World<'_>, ends: &[&PipeEntry], data: Queued) -> Result<(), ExecuteError> {
    let what = || format!("{:#x}", ends[0].pipe_id);
    let (out, into) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).during("Making pipe", what)?;
    let packets = ends
        .iter()
        .any(|end| OFlags::from_bits_retain(end.flags).contains(OFlags::DIRECT));
    if packets {
        rustix::fs::fcntl_setfl(&into, OFlags::DIRECT)
            .during("Setting packet mode of pipe", what)?;
    }
    fill(into.as_fd(), data, ends[0].pipe_id)?;
    let mut fresh = [
        Some(out.try_clone().during("Copying pipe", what)?),
        Some(into.try_clone().during("Copying pipe", what)?),
    ];
    for end in ends {
        let access = OFlags::from_bits_retain(end.flags) & OFlags::ACCMODE;
        let index = usize::from(access != OFlags::RDONLY);
        let file = match (access, fresh[index].take()) {
            (OFlags::RDONLY | OFlags::WRONLY, Some(file)) => file,
            (_, given) => {
                fresh[index] = given;
                reopen(out.as_fd(), access)?
            }
        };
        set_flags(file.as_fd(), end.flags)?;
        world.keep_file(end.id, file)?;
    }
    Ok(())
}

/// Another open file description of a pipe.
pub(super) fn reopen(pipe: BorrowedFd<'_>, access: OFlags) -> Result<OwnedFd, ExecuteError> {
    let path = own_fd_path(pipe);
    rustix::fs::open(
        &path,
        access | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .during("Opening again", || path.clone())
}

/// Sets the size of a pipe and puts its unread bytes in, one write a piece: in packet mode each is a
/// packet.
pub(super) fn fill(into: BorrowedFd<'_>, data: Queued, pipe_id: u32) -> Result<(), ExecuteError> {
    let what = || format!("{pipe_id:#x}");
    let size = data.iter().find_map(|(entry, _)| entry.size);
    if let Some(size) = size.filter(|size| *size > 0) {
        rustix::pipe::fcntl_setpipe_size(into, size as usize).during("Sizing pipe", what)?;
    }
    // Nobody reads yet: what does not fit would be waited for without end.
    let flags = rustix::fs::fcntl_getfl(into).during("Asking for the flags of pipe", what)?;
    set_flags_of(into, flags | OFlags::NONBLOCK, pipe_id)?;
    for (_, bytes) in data {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let done = match rustix::io::write(into, rest) {
                Err(Errno::AGAIN) => {
                    let what = format!("pipe {pipe_id:#x} has more bytes than it has room for");
                    let damaged = PlanError::damaged("pipes-data.img or fifo-data.img", what);
                    return Err(ExecuteError::from_plan(damaged));
                }
                done => done.during("Filling pipe", what)?,
            };
            rest = &rest[done..];
        }
    }
    set_flags_of(into, flags, pipe_id)
}

fn set_flags_of(pipe: BorrowedFd<'_>, flags: OFlags, pipe_id: u32) -> Result<(), ExecuteError> {
    let what = || format!("{pipe_id:#x}");
    rustix::fs::fcntl_setfl(pipe, flags).during("Setting the flags of pipe", what)
}

#[cfg(test)]
mod tests {
    use rustix::pipe::PipeFlags;

    use super::*;

    #[test]
    fn peeking_leaves_the_bytes_in_the_pipe() {
        let (out, into) = rustix::pipe::pipe().expect("a pipe");
        rustix::io::write(&into, b"some").expect("room");
        rustix::io::write(&into, &[7; 5000]).expect("room");
        let size = rustix::pipe::fcntl_getpipe_size(&out).expect("a pipe");
        let pieces = peek(out.as_fd(), size).expect("readable");
        assert_eq!(pieces.len(), 1);
        assert_eq!((pieces[0].len(), &pieces[0][..5]), (5004, &b"some\x07"[..]));
        assert_eq!(rustix::io::ioctl_fionread(&out).expect("a pipe"), 5004);
        let (empty, _writer) = rustix::pipe::pipe().expect("a pipe");
        let pieces = peek(empty.as_fd(), 4096).expect("readable");
        assert_eq!(pieces, [Vec::<u8>::new()]);
    }

    #[test]
    fn packets_are_pieces() {
        let (out, into) = rustix::pipe::pipe_with(PipeFlags::DIRECT).expect("a pipe");
        rustix::io::write(&into, b"one").expect("room");
        rustix::io::write(&into, b"more").expect("room");
        let pieces = peek(out.as_fd(), 1 << 16).expect("readable");
        assert_eq!(pieces, [&b"one"[..], b"more"]);
    }
}
