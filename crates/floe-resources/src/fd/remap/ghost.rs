//! Deleted files brought back for a moment: content, owner, mode and times under a temporary name.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use floe_image::dir::GhostImage;
use floe_image::messages::{GhostFileEntry, Timeval};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::names::TemporaryNames;
use crate::restore::{Attempt, ExecuteError};

/// Bytes copied at once.
const CHUNK: usize = 1 << 20;

/// Makes the file as `path`, or under a name like it, and returns the name.
pub fn make(
    names: &TemporaryNames,
    path: &Path,
    image: &GhostImage,
) -> Result<PathBuf, ExecuteError> {
    let entry = &image.entry;
    let what = || format!("the deleted {}", path.display());
    let mode = Mode::from_raw_mode(entry.mode);
    let kind = FileType::from_raw_mode(entry.mode);
    let name = match kind {
        FileType::Directory => names.make_directory(path, mode),
        FileType::Symlink => {
            let target = entry.symlnk_target.as_deref().unwrap_or_default();
            names.make_file(path, |path| rustix::fs::symlink(target, path))
        }
        FileType::RegularFile => names.make_file(path, |path| create(path).map(drop)),
        other => {
            let rdev = u64::from(entry.rdev.unwrap_or(0));
            names.make_file(path, |path| {
                rustix::fs::mknodat(CWD, path, other, mode, rdev)
            })
        }
    }
    .during("Making", what)?;
    if kind == FileType::RegularFile {
        write_content(&name, image)?;
    }
    set_metadata(&name, entry).during("Setting owner, mode and times of", what)?;
    Ok(name)
}

fn create(path: &Path) -> Result<std::os::fd::OwnedFd, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
}

fn write_content(path: &Path, image: &GhostImage) -> Result<(), ExecuteError> {
    let what = || format!("the deleted {}", path.display());
    let file = File::options()
        .write(true)
        .open(path)
        .during("Opening", what)?;
    if let Some(size) = image.entry.size {
        file.set_len(size).during("Sizing", what)?;
    }
    let mut buffer = vec![0; CHUNK];
    for extent in &image.extents {
        let mut done = 0;
        while done < extent.length {
            let piece = &mut buffer[..(extent.length - done).min(CHUNK as u64) as usize];
            image
                .file
                .read_exact_at(piece, extent.image_offset + done)
                .during("Reading the image of", what)?;
            file.write_all_at(piece, extent.file_offset + done)
                .during("Writing", what)?;
            done += piece.len() as u64;
        }
    }
    Ok(())
}

fn set_metadata(path: &Path, entry: &GhostFileEntry) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    rustix::fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(entry.mode) != FileType::Symlink {
        rustix::fs::chmod(path, Mode::from_raw_mode(entry.mode))?;
    }
    let (Some(accessed), Some(modified)) = (&entry.atim, &entry.mtim) else {
        return Ok(());
    };
    let times = Timestamps {
        last_access: timespec(accessed),
        last_modification: timespec(modified),
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
}

fn timespec(time: &Timeval) -> Timespec {
    Timespec {
        tv_sec: time.tv_sec as i64,
        tv_nsec: (time.tv_usec * 1000) as i64,
    }
}
