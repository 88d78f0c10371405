//! Writing the archive.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;
use tar::{Builder, EntryType, Header};

use super::{CHUNK, ContentError, FILE_TYPE, INSIDE, SOCKET, failed};

/// Unit of `st_blocks`, in bytes.
const BLOCK: i64 = 512;
/// Entries of a map of holes in a header, and in each block behind it.
const MAP_IN_HEADER: usize = 4;
const MAP_IN_BLOCK: usize = 21;
/// The longest name that a header itself has room for.
const NAME: usize = 99;

/// A part of a file with data in it.
type Extent = std::ops::Range<u64>;

struct Packer<'a, W: Write> {
    root: BorrowedFd<'a>,
    archive: Builder<W>,
    /// The first name of files that have several, by inode.
    linked: HashMap<u64, Vec<u8>>,
    buffer: Vec<u8>,
}

/// Writes all files below `root` into `image`; `root` is a mount of its own with nothing mounted below.
pub fn pack(root: BorrowedFd<'_>, image: File) -> Result<(), ContentError> {
    let output = GzEncoder::new(
        io::BufWriter::with_capacity(CHUNK, image),
        Compression::fast(),
    );
    let mut packer = Packer {
        root,
        archive: Builder::new(output),
        linked: HashMap::new(),
        buffer: vec![0; CHUNK],
    };
    let mut directories = vec![Vec::new()];
    while let Some(path) = directories.pop() {
        packer.directory(&path, &mut directories)?;
    }
    let finish = || packer.archive.into_inner()?.finish()?.flush();
    finish().map_err(failed("Ending the archive of", b"the files"))
}

fn open(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { b"." } else { path };
    rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), INSIDE)
}

/// What is not the tree's alone others may remove meanwhile; then it is as if it had never been there.
fn unless_gone<T>(found: Result<T, Errno>) -> Result<Option<T>, Errno> {
    match found {
        Err(Errno::NOENT) => Ok(None),
        found => found.map(Some),
    }
}

impl<W: Write> Packer<'_, W> {
    fn directory(&mut self, path: &[u8], more: &mut Vec<Vec<u8>>) -> Result<(), ContentError> {
        let opened = open(self.root, path, OFlags::RDONLY | OFlags::DIRECTORY);
        let Some(opened) = unless_gone(opened).map_err(failed("Opening", path))? else {
            return Ok(());
        };
        let stat = rustix::fs::fstat(&opened).map_err(failed("Looking at", path))?;
        self.entry(path, &stat, EntryType::Directory, attributes(&opened)?, b"")?;
        self.data(path, io::empty())?;
        let mut inside = Vec::new();
        let listed = Dir::read_from(&opened).map_err(failed("Listing", path))?;
        for name in listed {
            let name = name.map_err(failed("Listing", path))?;
            let name = name.file_name().to_bytes();
            if !matches!(name, b"." | b"..") {
                inside.push(name.to_vec());
            }
        }
        for name in inside {
            let path = [path, if path.is_empty() { b"" } else { b"/" }, &name].concat();
            let stat = rustix::fs::statat(&opened, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW);
            let Some(stat) = unless_gone(stat).map_err(failed("Looking at", &path))? else {
                continue;
            };
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                more.push(path);
            } else {
                self.file((&opened, &name), &path, &stat)?;
            }
        }
        Ok(())
    }

    fn file(
        &mut self,
        (directory, name): (&OwnedFd, &[u8]),
        path: &[u8],
        stat: &Stat,
    ) -> Result<(), ContentError> {
        if stat.st_nlink > 1
            && let Some(first) = self.linked.get(&stat.st_ino).cloned()
        {
            self.entry(path, stat, EntryType::Link, Vec::new(), &first)?;
            return self.data(path, io::empty());
        }
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => EntryType::Regular,
            FileType::Symlink => EntryType::Symlink,
            FileType::Fifo => EntryType::Fifo,
            FileType::CharacterDevice => EntryType::Char,
            FileType::BlockDevice => EntryType::Block,
            // Archives have no type for them, but a record that says it.
            FileType::Socket => EntryType::Regular,
            _ => return Ok(()),
        };
        let is_socket = FileType::from_raw_mode(stat.st_mode) == FileType::Socket;
        let mut attributes = match kind {
            EntryType::Regular if !is_socket => return self.regular(path, stat),
            _ => attributes_at(directory, name)?,
        };
        self.note_links(path, stat);
        match kind {
            EntryType::Symlink => {
                let target = rustix::fs::readlinkat(directory, name, Vec::new())
                    .map_err(failed("Reading the link", path))?;
                self.entry(path, stat, kind, attributes, target.as_bytes())?;
                self.data(path, io::empty())
            }
            _ => {
                if is_socket {
                    attributes.push((FILE_TYPE.to_string(), SOCKET.to_vec()));
                }
                self.entry(path, stat, kind, attributes, b"")?;
                self.data(path, io::empty())
            }
        }
    }

    /// Other names of the file will be links to this one.
    fn note_links(&mut self, path: &[u8], stat: &Stat) {
        if stat.st_nlink > 1 {
            self.linked.insert(stat.st_ino, path.to_vec());
        }
    }

    fn regular(&mut self, path: &[u8], stat: &Stat) -> Result<(), ContentError> {
        let opened = open(self.root, path, OFlags::RDONLY | OFlags::NOFOLLOW);
        let Some(opened) = unless_gone(opened).map_err(failed("Opening", path))? else {
            return Ok(());
        };
        self.note_links(path, stat);
        let attributes = attributes(&opened)?;
        let file = File::from(opened);
        if stat.st_blocks * BLOCK < stat.st_size {
            return self.sparse(path, stat, &file, attributes);
        }
        self.entry(path, stat, EntryType::Regular, attributes, b"")?;
        let size = stat.st_size.cast_unsigned();
        self.copy(path, &file, std::slice::from_ref(&(0..size)))
    }

    fn sparse(
        &mut self,
        path: &[u8],
        stat: &Stat,
        file: &File,
        attributes: Vec<Attribute>,
    ) -> Result<(), ContentError> {
        let size = stat.st_size.cast_unsigned();
        let mut extents = extents(file, size).map_err(failed("Looking for holes of", path))?;
        let stored: u64 = extents.iter().map(|extent| extent.end - extent.start).sum();
        self.records(path, stat, attributes, b"")?;
        let mut header = self.header(path, stat, EntryType::GNUSparse, b"");
        header.set_size(stored);
        // An empty extent at the end says how long the file is.
        extents.push(size..size);
        let later = extents.split_off(extents.len().min(MAP_IN_HEADER));
        let gnu = header.as_gnu_mut().expect("it was made as one");
        for (slot, extent) in gnu.sparse.iter_mut().zip(&extents) {
            set_slot(&mut slot.offset, &mut slot.numbytes, extent);
        }
        number(&mut gnu.realsize, size);
        gnu.isextended[0] = u8::from(!later.is_empty());
        header.set_cksum();
        let mut blocks = Vec::new();
        for (index, some) in later.chunks(MAP_IN_BLOCK).enumerate() {
            let mut block = tar::GnuExtSparseHeader::new();
            for (slot, extent) in block.sparse.iter_mut().zip(some) {
                set_slot(&mut slot.offset, &mut slot.numbytes, extent);
            }
            block.isextended[0] = u8::from(later.len() > (index + 1) * MAP_IN_BLOCK);
            blocks.extend_from_slice(block.as_bytes());
        }
        let output = self.archive.get_mut();
        let written = output
            .write_all(header.as_bytes())
            .and_then(|()| output.write_all(&blocks));
        written.map_err(failed("Archiving", path))?;
        extents.extend(later);
        self.copy(path, file, &extents)
    }

    /// Copies the data of a file, and fills up the last block.
    fn copy(&mut self, path: &[u8], file: &File, extents: &[Extent]) -> Result<(), ContentError> {
        let mut total = 0;
        for extent in extents {
            let mut at = extent.start;
            while at < extent.end {
                let piece = &mut self.buffer[..CHUNK.min((extent.end - at) as usize)];
                match file.read_at(piece, at).map_err(failed("Reading", path))? {
                    // Cut short meanwhile by somebody who is not dumped.
                    0 => piece.fill(0),
                    read if read < piece.len() => piece[read..].fill(0),
                    _ => {}
                }
                let written = self.archive.get_mut().write_all(piece);
                written.map_err(failed("Archiving", path))?;
                at += piece.len() as u64;
            }
            total += extent.end - extent.start;
        }
        self.pad(path, total)
    }

    fn data(&mut self, path: &[u8], mut content: impl Read) -> Result<(), ContentError> {
        let copied = io::copy(&mut content, self.archive.get_mut());
        let size = copied.map_err(failed("Archiving", path))?;
        self.pad(path, size)
    }

    fn pad(&mut self, path: &[u8], size: u64) -> Result<(), ContentError> {
        let rest = (size % BLOCK as u64) as usize;
        let zeros = [0; BLOCK as usize];
        let padding = if rest == 0 { &[][..] } else { &zeros[rest..] };
        let written = self.archive.get_mut().write_all(padding);
        written.map_err(failed("Archiving", path))
    }

    /// Writes the header of a file, and before it what the header has no room for.
    fn entry(
        &mut self,
        path: &[u8],
        stat: &Stat,
        kind: EntryType,
        attributes: Vec<Attribute>,
        link: &[u8],
    ) -> Result<(), ContentError> {
        self.records(path, stat, attributes, link)?;
        let mut header = self.header(path, stat, kind, link);
        header.set_cksum();
        let written = self.archive.get_mut().write_all(header.as_bytes());
        written.map_err(failed("Archiving", path))
    }

    fn records(
        &mut self,
        path: &[u8],
        stat: &Stat,
        attributes: Vec<Attribute>,
        link: &[u8],
    ) -> Result<(), ContentError> {
        let mut records = attributes;
        if stat.st_mtime_nsec != 0 {
            let time = format!("{}.{:09}", stat.st_mtime, stat.st_mtime_nsec);
            records.push(("mtime".to_string(), time.into_bytes()));
        }
        if path.len() + 2 > NAME {
            records.push(("path".to_string(), [b"./", path].concat()));
        }
        if link.len() + 2 > NAME {
            records.push(("linkpath".to_string(), link.to_vec()));
        }
        let records = records
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_slice()));
        let written = self.archive.append_pax_extensions(records);
        written.map_err(failed("Archiving", path))
    }

    fn header(&self, path: &[u8], stat: &Stat, kind: EntryType, link: &[u8]) -> Header {
        let mut header = Header::new_gnu();
        let name = [b"./", path].concat();
        let link = match kind {
            EntryType::Link => [b"./", link].concat(),
            _ => link.to_vec(),
        };
        let gnu = header.as_gnu_mut().expect("it was made as one");
        cut(&mut gnu.name, &name);
        cut(&mut gnu.linkname, &link);
        header.set_entry_type(kind);
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(u64::from(stat.st_uid));
        header.set_gid(u64::from(stat.st_gid));
        header.set_mtime(stat.st_mtime.max(0).cast_unsigned());
        let size = match kind {
            EntryType::Regular => stat.st_size.cast_unsigned(),
            _ => 0,
        };
        header.set_size(size);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            let device = (
                rustix::fs::major(stat.st_rdev),
                rustix::fs::minor(stat.st_rdev),
            );
            let set = header
                .set_device_major(device.0)
                .and_then(|()| header.set_device_minor(device.1));
            set.expect("a header of this format has devices");
        }
        header
    }
}

fn cut(field: &mut [u8], text: &[u8]) {
    let length = text.len().min(NAME);
    field[..length].copy_from_slice(&text[..length]);
}

fn set_slot(offset: &mut [u8; 12], length: &mut [u8; 12], extent: &Extent) {
    number(offset, extent.start);
    number(length, extent.end - extent.start);
}

/// A number as headers have it: octal digits, or binary with the highest bit set.
fn number(field: &mut [u8; 12], value: u64) {
    if value < 1 << 33 {
        field.copy_from_slice(format!("{value:011o}\0").as_bytes());
    } else {
        *field = [0; 12];
        field[0] = 0x80;
        field[4..].copy_from_slice(&value.to_be_bytes());
    }
}

fn extents(file: &File, size: u64) -> io::Result<Vec<Extent>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            other => other?,
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(size);
        if start >= end {
            break;
        }
        found.push(start..end);
        at = end;
    }
    Ok(found)
}

/// A record before a header.
type Attribute = (String, Vec<u8>);

/// Extended attributes of an open file, as records.
fn attributes(file: &OwnedFd) -> Result<Vec<Attribute>, ContentError> {
    records_of(
        |names| rustix::fs::flistxattr(file.as_fd(), names),
        |name, value| rustix::fs::fgetxattr(file.as_fd(), name, value),
    )
}

/// As [`attributes`], of what cannot be opened: links, devices, sockets.
fn attributes_at(directory: &OwnedFd, name: &[u8]) -> Result<Vec<Attribute>, ContentError> {
    let path = super::path_at(directory, name);
    records_of(
        |names| rustix::fs::llistxattr(&path, names),
        |name, value| rustix::fs::lgetxattr(&path, name, value),
    )
}

fn records_of(
    list: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    get: impl Fn(&str, &mut [u8]) -> Result<usize, Errno>,
) -> Result<Vec<Attribute>, ContentError> {
    let mut names = vec![0; 1 << 16];
    let length = match list(&mut names) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => 0,
        Err(errno) => return Err(failed("Listing attributes of", b"a file")(errno)),
    };
    let mut found = Vec::new();
    for name in names[..length]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty())
    {
        let Ok(text) = std::str::from_utf8(name) else {
            continue;
        };
        let mut value = vec![0; 1 << 16];
        let size = get(text, &mut value).map_err(failed("Reading an attribute of", name))?;
        value.truncate(size);
        found.push((format!("SCHILY.xattr.{text}"), value));
    }
    Ok(found)
}
