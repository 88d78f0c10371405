//! Reading the archive.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use flate2::read::MultiGzDecoder;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags,
};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};

use super::records::{self, RecordReader, Records};
use super::{CHUNK, ContentError, FILE_TYPE, INSIDE, SOCKET, failed};

/// Owner, mode and time of a file.
#[derive(Clone, Debug)]
struct Metadata {
    uid: u32,
    gid: u32,
    mode: Mode,
    changed: Timespec,
    attributes: Vec<(String, Vec<u8>)>,
    is_socket: bool,
}

/// Makes all files of `image` below `root`, which is empty so far.
pub fn unpack(root: BorrowedFd<'_>, image: File) -> Result<(), ContentError> {
    let input = MultiGzDecoder::new(io::BufReader::with_capacity(CHUNK, image));
    let records = Records::default();
    let mut archive = Archive::new(RecordReader::new(input, records.clone()));
    let mut directories: Vec<(Vec<u8>, Metadata)> = Vec::new();
    let entries = archive
        .entries()
        .map_err(failed("Reading", b"the archive"))?;
    for entry in entries {
        let mut entry = entry.map_err(failed("Reading", b"the archive"))?;
        let path = inside(&entry.path_bytes())?;
        let metadata = metadata(&entry, &records.take(), &path)?;
        if entry.header().entry_type() == EntryType::Directory {
            make_directory(root, &path)?;
            directories.push((path, metadata));
        } else {
            make_file(root, &path, &mut entry, &metadata)?;
        }
    }
    // Files that are made in a directory change its time, and may not be allowed by its mode.
    for (path, metadata) in directories.iter().rev() {
        let opened = open(root, path, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(failed("Opening", path))?;
        set_metadata(&opened, metadata).map_err(failed("Setting mode and owner of", path))?;
    }
    Ok(())
}

fn open(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { b"." } else { path };
    rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), INSIDE)
}

/// The path of an entry from the root, of plain names only.
fn inside(path: &[u8]) -> Result<Vec<u8>, ContentError> {
    let names: Vec<&[u8]> = path
        .split(|b| *b == b'/')
        .filter(|name| !matches!(*name, b"" | b"."))
        .collect();
    if path.starts_with(b"/") || names.contains(&&b".."[..]) {
        let escape = io::Error::new(io::ErrorKind::InvalidData, "it leads out of the archive");
        return Err(failed("Unpacking", path)(escape));
    }
    Ok(names.join(&b'/'))
}

fn metadata(
    entry: &Entry<'_, impl Read>,
    records: &[u8],
    path: &[u8],
) -> Result<Metadata, ContentError> {
    let read = || -> io::Result<Metadata> {
        let mut attributes = Vec::new();
        let mut is_socket = false;
        let mut changed = Timespec {
            tv_sec: entry.header().mtime()?.cast_signed(),
            tv_nsec: 0,
        };
        for (key, value) in records::parse(records)? {
            let (Ok(key), value) = (std::str::from_utf8(key), &records[value]) else {
                continue;
            };
            if let Some(name) = key.strip_prefix("SCHILY.xattr.") {
                attributes.push((name.to_string(), value.to_vec()));
            } else if key == FILE_TYPE {
                is_socket = value == SOCKET;
            } else if key == "mtime" {
                let text = std::str::from_utf8(value);
                changed = text.ok().and_then(timespec).unwrap_or(changed);
            }
        }
        let header = entry.header();
        let id = |id: u64| {
            u32::try_from(id).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "an id"))
        };
        Ok(Metadata {
            uid: id(header.uid()?)?,
            gid: id(header.gid()?)?,
            mode: Mode::from_raw_mode(header.mode()? & 0o7777),
            changed,
            attributes,
            is_socket,
        })
    };
    read().map_err(failed("Reading the entry of", path))
}

/// Seconds and nanoseconds of `SECONDS.FRACTION`.
fn timespec(text: &str) -> Option<Timespec> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    Some(Timespec {
        tv_sec: seconds.parse().ok()?,
        tv_nsec: digits.parse().ok()?,
    })
}

fn make_directory(root: BorrowedFd<'_>, path: &[u8]) -> Result<(), ContentError> {
    if path.is_empty() {
        return Ok(());
    }
    let (directory, name) = parent(root, path)?;
    match rustix::fs::mkdirat(&directory, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(failed("Making", path)(errno)),
    }
}

/// The directory of a file, and its name there.
fn parent<'p>(root: BorrowedFd<'_>, path: &'p [u8]) -> Result<(OwnedFd, &'p [u8]), ContentError> {
    let (directory, name) = match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&b""[..], path),
    };
    let opened = open(root, directory, OFlags::PATH | OFlags::DIRECTORY)
        .map_err(failed("Opening the directory of", path))?;
    Ok((opened, name))
}

fn make_file(
    root: BorrowedFd<'_>,
    path: &[u8],
    entry: &mut Entry<'_, impl Read>,
    metadata: &Metadata,
) -> Result<(), ContentError> {
    let (directory, name) = parent(root, path)?;
    let link = entry
        .link_name_bytes()
        .map(std::borrow::Cow::into_owned)
        .unwrap_or_default();
    let header = entry.header();
    let node = |kind| {
        let device = match kind {
            FileType::Fifo | FileType::Socket => None,
            _ => header.device_major()?.zip(header.device_minor()?),
        };
        let device = device.map_or(0, |(major, minor)| rustix::fs::makedev(major, minor));
        Ok::<_, io::Error>(rustix::fs::mknodat(
            &directory,
            name,
            kind,
            metadata.mode,
            device,
        )?)
    };
    match header.entry_type() {
        EntryType::Symlink => {
            let made = rustix::fs::symlinkat(link.as_slice(), &directory, name);
            made.map_err(failed("Making", path))?;
        }
        EntryType::Link => {
            let link = inside(&link)?;
            let (source, first) = parent(root, &link)?;
            let made = rustix::fs::linkat(source, first, &directory, name, AtFlags::empty());
            return made.map_err(failed("Linking", path));
        }
        EntryType::Fifo => node(FileType::Fifo).map_err(failed("Making", path))?,
        EntryType::Char => node(FileType::CharacterDevice).map_err(failed("Making", path))?,
        EntryType::Block => node(FileType::BlockDevice).map_err(failed("Making", path))?,
        EntryType::Regular if metadata.is_socket => {
            node(FileType::Socket).map_err(failed("Making", path))?;
        }
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            return make_regular((&directory, name), path, entry, metadata);
        }
        other => {
            let unknown = io::Error::new(io::ErrorKind::InvalidData, format!("type {other:?}"));
            return Err(failed("Unpacking", path)(unknown));
        }
    }
    let set = set_metadata_at(&directory, name, metadata);
    set.map_err(failed("Setting mode and owner of", path))
}

fn make_regular(
    (directory, name): (&OwnedFd, &[u8]),
    path: &[u8],
    entry: &mut Entry<'_, impl Read>,
    metadata: &Metadata,
) -> Result<(), ContentError> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR)
        .map_err(failed("Making", path))?;
    let mut file = File::from(opened);
    copy(entry, &mut file).map_err(failed("Writing", path))?;
    set_metadata(&OwnedFd::from(file), metadata).map_err(failed("Setting mode and owner of", path))
}

/// Copies content; whole pages of zeros stay holes.
fn copy(content: &mut impl Read, file: &mut File) -> io::Result<()> {
    const PIECE: usize = 1 << 16;
    const PAGE: usize = 1 << 12;
    let is_hole = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut buffer = vec![0; PIECE];
    let mut size = 0;
    loop {
        let mut filled = 0;
        while filled < PIECE {
            match content.read(&mut buffer[filled..])? {
                0 => break,
                read => filled += read,
            }
        }
        if filled == 0 {
            break;
        }
        let pages = buffer[..filled].chunks(PAGE).map(is_hole);
        let pages: Vec<bool> = pages.collect();
        let mut at = 0;
        for same in pages.chunk_by(|one, other| one == other) {
            let end = filled.min(at + same.len() * PAGE);
            match same[0] {
                true => drop(file.seek(SeekFrom::Current((end - at) as i64))?),
                false => file.write_all(&buffer[at..end])?,
            }
            at = end;
        }
        size += filled as u64;
    }
    file.set_len(size)
}

fn times(metadata: &Metadata) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: metadata.changed,
    }
}

/// Nobody (-1) leaves a file to us.
fn owner(metadata: &Metadata) -> (Option<Uid>, Option<Gid>) {
    let known = |id: u32| (id != u32::MAX).then_some(id);
    (
        known(metadata.uid).map(Uid::from_raw),
        known(metadata.gid).map(Gid::from_raw),
    )
}

/// The owner first: changing it takes away the bits that make a program run as its owner.
fn set_metadata(file: &OwnedFd, metadata: &Metadata) -> Result<(), Errno> {
    let (uid, gid) = owner(metadata);
    rustix::fs::fchown(file, uid, gid)?;
    rustix::fs::fchmod(file, metadata.mode)?;
    set_attributes(metadata, |name, value| {
        rustix::fs::fsetxattr(file.as_fd(), name, value, XattrFlags::empty())
    })?;
    rustix::fs::futimens(file, &times(metadata))
}

fn set_metadata_at(directory: &OwnedFd, name: &[u8], metadata: &Metadata) -> Result<(), Errno> {
    let (uid, gid) = owner(metadata);
    let here = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(directory, name, uid, gid, here)?;
    let stat = rustix::fs::statat(directory, name, here)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        rustix::fs::chmodat(directory, name, metadata.mode, AtFlags::empty())?;
    }
    let path = super::path_at(directory, name);
    set_attributes(metadata, |name, value| {
        rustix::fs::lsetxattr(&path, name, value, XattrFlags::empty())
    })?;
    rustix::fs::utimensat(directory, name, &times(metadata), here)
}

fn set_attributes(
    metadata: &Metadata,
    set: impl Fn(&str, &[u8]) -> Result<(), Errno>,
) -> Result<(), Errno> {
    for (name, value) in &metadata.attributes {
        match set(name, value) {
            // Labels of a security module that is not active here.
            Err(Errno::OPNOTSUPP) if name.starts_with("security.") => {}
            other => other?,
        }
    }
    Ok(())
}
