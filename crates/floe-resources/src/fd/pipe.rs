//! Anonymous pipes (`pipe(2)`).
//!
//! Saved:    flags and owner of each end; size and unread bytes once for each pipe.
//! Rebuilt:  created with the first end, then size and bytes, further ends are reopened. Needs: nothing.
//! Not kept: boundaries between packets of `O_DIRECT` pipes whose packets are unread.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use floe_image::ImageKind;
use floe_image::messages::{FdTypes, FileEntry, PipeDataEntry, PipeEntry};
use rustix::fs::OFlags;
use rustix::pipe::SpliceFlags;

use super::{FdKind, file_entry};
use crate::collect::{CollectError, Collector, FdProbe, FileId};

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
    let bytes = peek(fd.file(), size).map_err(failed("Copying the bytes"))?;
    let entry = PipeDataEntry {
        pipe_id,
        bytes: bytes.len() as u32,
        size: Some(size as u32),
    };
    collector.side(kind, 0)?.append_with_extra(&entry, &bytes)?;
    Ok(())
}

/// The unread bytes, left where they are: `tee` copies references from pipe to pipe.
fn peek(pipe: BorrowedFd<'_>, size: usize) -> io::Result<Vec<u8>> {
    let unread = rustix::io::ioctl_fionread(pipe)?;
    if unread == 0 {
        return Ok(Vec::new());
    }
    let (out, into) = rustix::pipe::pipe_with(
        rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK,
    )?;
    // A pipe holds buffers, not bytes, and `tee` takes whole buffers: ours must have as many.
    rustix::pipe::fcntl_setpipe_size(&into, size)?;
    let copied = rustix::pipe::tee(pipe, into.as_fd(), size, SpliceFlags::NONBLOCK)?;
    let mut bytes = vec![0u8; copied];
    let mut done = 0;
    while done < copied {
        match rustix::io::read(&out, &mut bytes[done..])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => done += read,
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peeking_leaves_the_bytes_in_the_pipe() {
        let (out, into) = rustix::pipe::pipe().expect("a pipe");
        rustix::io::write(&into, b"some").expect("room");
        rustix::io::write(&into, &[7; 5000]).expect("room");
        let size = rustix::pipe::fcntl_getpipe_size(&out).expect("a pipe");
        let bytes = peek(out.as_fd(), size).expect("readable");
        assert_eq!((bytes.len(), &bytes[..5]), (5004, &b"some\x07"[..]));
        assert_eq!(rustix::io::ioctl_fionread(&out).expect("a pipe"), 5004);
        assert!(
            peek(rustix::pipe::pipe().expect("a pipe").0.as_fd(), 4096)
                .expect("readable")
                .is_empty()
        );
    }
}
