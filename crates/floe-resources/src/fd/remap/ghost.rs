//! Deleted files: content, owner, mode and times, saved, and brought back under a temporary name.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use floe_image::ImageKind;
use floe_image::dir::GhostImage;
use floe_image::messages::{GhostChunkEntry, GhostFileEntry, Timeval};
use floe_image::writer::EntryStream;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, SeekFrom, Stat, Timespec, Timestamps};
use rustix::io::Errno;

use super::names::TemporaryNames;
use super::{NamedFile, failed, reopen};
use crate::collect::{CollectError, Collector};
use crate::namespace::OwnerMap;
use crate::restore::{Attempt, ExecuteError};

/// Bytes copied at once.
const CHUNK: usize = 1 << 20;

/// Files from this size on are saved without their holes.
const SPARSE_FROM: i64 = 3 * 4096;
/// Unit of `st_blocks`, in bytes.
const BLOCK: u64 = 512;

/// How many bytes a file takes, without its holes.
pub fn stored_bytes(stat: &Stat) -> u64 {
    stat.st_blocks.cast_unsigned() * BLOCK
}

/// Saves a file as image `number`.
pub fn save(
    number: u64,
    file: &NamedFile<'_>,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let stat = file.stat;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let is_device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
    let sparse = kind == FileType::RegularFile && stat.st_size >= SPARSE_FROM;
    let target = match kind {
        FileType::Symlink => Some(link_target(file)?),
        _ => None,
    };
    let entry = GhostFileEntry {
        uid: collector.owners().uid_inside(stat.st_uid),
        gid: collector.owners().gid_inside(stat.st_gid),
        mode: stat.st_mode,
        dev: Some(kernel_device(stat.st_dev)),
        ino: Some(stat.st_ino),
        rdev: is_device.then_some(stat.st_rdev as u32),
        atim: Some(timeval(stat.st_atime, stat.st_atime_nsec as i64)),
        mtim: Some(timeval(stat.st_mtime, stat.st_mtime_nsec as i64)),
        chunks: sparse.then_some(true),
        size: sparse.then_some(stat.st_size.cast_unsigned()),
        symlnk_target: target,
    };
    let mut image = collector.writer().stream(ImageKind::GhostFile, number)?;
    image.append(&entry)?;
    if kind == FileType::RegularFile {
        let content = reopen(file.file).map_err(|errno| failed(file, REOPENING, errno))?;
        let content = File::from(content);
        if sparse {
            save_sparse(&content, file, &mut image)?;
        } else {
            copy_range(&content, 0..stat.st_size.cast_unsigned(), file, &mut image)?;
        }
    }
    Ok(image.finish()?)
}

const REOPENING: &str = "Opening a deleted file for reading";
const READING: &str = "Reading a deleted file";

/// Device numbers as the kernel keeps them, and CRIU writes them here.
pub(crate) fn kernel_device(dev: u64) -> u32 {
    rustix::fs::major(dev) << 20 | rustix::fs::minor(dev)
}

fn timeval(seconds: i64, nanoseconds: i64) -> Timeval {
    Timeval {
        tv_sec: seconds.cast_unsigned(),
        tv_usec: (nanoseconds / 1000).cast_unsigned(),
    }
}

fn link_target(file: &NamedFile<'_>) -> Result<String, CollectError> {
    let target = rustix::fs::readlinkat(file.file, "", Vec::new())
        .map_err(|errno| failed(file, "Reading a deleted symbolic link", errno))?;
    target
        .into_string()
        .map_err(|_| file.obstacle(", deleted", "its target is not UTF-8"))
}

fn save_sparse(
    content: &File,
    file: &NamedFile<'_>,
    image: &mut EntryStream,
) -> Result<(), CollectError> {
    let size = file.stat.st_size.cast_unsigned();
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(content, SeekFrom::Data(at)) {
            Err(rustix::io::Errno::NXIO) => break,
            other => other.map_err(|errno| failed(file, READING, errno))?,
        };
        let hole = rustix::fs::seek(content, SeekFrom::Hole(data))
            .map_err(|errno| failed(file, READING, errno))?
            .min(size);
        if data >= hole {
            break;
        }
        let chunk = GhostChunkEntry {
            len: hole - data,
            off: data,
        };
        image.append(&chunk)?;
        copy_range(content, data..hole, file, image)?;
        at = hole;
    }
    Ok(())
}

fn copy_range(
    content: &File,
    range: std::ops::Range<u64>,
    file: &NamedFile<'_>,
    image: &mut EntryStream,
) -> Result<(), CollectError> {
    let mut buffer = vec![0; CHUNK.min((range.end - range.start) as usize)];
    let mut at = range.start;
    while at < range.end {
        let piece = &mut buffer[..CHUNK.min((range.end - at) as usize)];
        let read: io::Result<()> = content.read_exact_at(piece, at);
        read.map_err(|source| CollectError::Task {
            pid: file.pid,
            action: READING,
            source,
        })?;
        image.append_raw(piece)?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// Makes the file as `path`, or under a name like it, and returns the name.
pub fn make(
    names: &TemporaryNames,
    path: &Path,
    image: &GhostImage,
    owners: &OwnerMap,
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
    set_metadata(&name, entry, owners).during("Setting owner, mode and times of", what)?;
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

fn set_metadata(path: &Path, entry: &GhostFileEntry, owners: &OwnerMap) -> Result<(), Errno> {
    let uid = owners.uid(entry.uid);
    let gid = owners.gid(entry.gid);
    rustix::fs::chownat(CWD, path, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
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
        tv_nsec: time.tv_usec.min(999_999) as i64 * 1000,
    }
}
