//! What inotify and fanotify watch: named in fdinfo by a file handle, found again by path.
//!
//! A path is preferred, because inodes of memory file systems change between mounts, and all do with a
//! copy of a file system. A deleted file that is watched has none: it is found through its descriptor.

mod find;
mod search;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use floe_image::messages::{FhEntry, RegFileEntry, RemapType};
use floe_kernel::namespace::{own_fd_path, own_proc_path};
use floe_kernel::proc::parse_mountinfo;
use floe_kernel::watch::{FileHandle, MAX_HANDLE_BYTES, open_by_handle};
use floe_plan::Handle;
use rustix::fs::{Mode, OFlags};

pub(super) use find::find_path;

use super::remap;
use crate::collect::no_owner;
use crate::mount;
use crate::restore::{Attempt, ExecuteError, PlanError, TreeImages, World};

/// Words that a handle takes in the images.
const HANDLE_WORDS: usize = MAX_HANDLE_BYTES / 8;

/// The fields `key:value` of a line of fdinfo, all hexadecimal.
pub(super) struct Fields<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Fields<'a> {
    /// Takes a line apart; words without a colon have the key that comes before the line's value.
    pub fn of(first: &'a str, line: &'a [u8]) -> Option<Self> {
        let line = std::str::from_utf8(line).ok()?;
        let mut words = line.split_ascii_whitespace();
        let mut fields = vec![(first, words.next()?)];
        for word in words {
            fields.push(word.split_once(':')?);
        }
        Some(Fields(fields))
    }

    pub fn text(&self, key: &str) -> Option<&'a str> {
        let found = self.0.iter().find(|(name, _)| *name == key);
        found.map(|(_, value)| *value)
    }

    pub fn number(&self, key: &str) -> Option<u64> {
        u64::from_str_radix(self.text(key)?.trim_start_matches("0x"), 16).ok()
    }

    pub fn short(&self, key: &str) -> Option<u32> {
        u32::try_from(self.number(key)?).ok()
    }

    /// File systems that cannot be exported give no handle.
    pub fn handle(&self) -> Option<FhEntry> {
        let Some(text) = self.text("f_handle") else {
            return Some(FhEntry {
                handle: vec![0; HANDLE_WORDS],
                ..FhEntry::default()
            });
        };
        let mut bytes = [0; MAX_HANDLE_BYTES];
        for (slot, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            *slot = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        let words = bytes.chunks_exact(8);
        Some(FhEntry {
            bytes: self.short("fhandle-bytes")?,
            r#type: self.short("fhandle-type")?,
            handle: words
                .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
                .collect(),
            path: None,
            mnt_id: None,
        })
    }
}

/// A watched file as fdinfo names it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Watched {
    /// As the kernel keeps it.
    pub dev: u32,
    pub ino: u64,
}

/// The handle of an entry; `None` where the kernel showed none.
fn handle_in(entry: &FhEntry) -> Option<FileHandle> {
    let words = entry.handle.iter().flat_map(|word| word.to_le_bytes());
    let bytes: Vec<u8> = words.take(entry.bytes as usize).collect();
    let kind = entry.r#type;
    (!bytes.is_empty()).then_some(FileHandle { kind, bytes })
}

/// How restore finds a watched file.
pub(super) enum Target {
    /// It is deleted, but open as this file.
    Open(u32),
    /// By its name, in the namespace of this mount.
    Path(PathBuf, Option<i32>),
    Handle(u32, FhEntry),
}

/// A path that leads to a watched file, whatever its name; it holds while the descriptor is open.
pub(super) type Found = (PathBuf, Option<OwnedFd>);

impl Target {
    /// Decides by what the images have.
    pub fn of(watched: Watched, handle: &FhEntry, images: &TreeImages) -> Result<Self, PlanError> {
        let ghosts = images
            .remaps
            .values()
            .filter(|remap| remap.remap_type() == RemapType::Ghost);
        for remap in ghosts {
            let ghost = images.dir.open_ghost(u64::from(remap.remap_id))?.entry;
            if (ghost.dev, ghost.ino) == (Some(watched.dev), Some(watched.ino)) {
                let file = images.named_by(remap.orig_id).first();
                return Ok(Target::Open(*file.unwrap_or(&remap.orig_id)));
            }
        }
        Ok(match &handle.path {
            Some(path) => {
                let mount = handle.mnt_id.map(u32::cast_signed);
                Target::Path(PathBuf::from("/").join(path), mount)
            }
            None => Target::Handle(watched.dev, handle.clone()),
        })
    }

    /// What must be mounted before it can be found.
    pub fn needs(&self, images: &TreeImages) -> Vec<Handle> {
        let Target::Path(path, mount) = self else {
            return Vec::new();
        };
        let file = RegFileEntry {
            name: path.display().to_string(),
            mnt_id: *mount,
            fown: no_owner(),
            ..RegFileEntry::default()
        };
        mount::needs_of_file(images, &file)
    }

    /// Finds it.
    pub fn find(&self, world: &mut World<'_>) -> Result<Found, ExecuteError> {
        let link = |fd: BorrowedFd<'_>| PathBuf::from(own_fd_path(fd));
        let file = match self {
            Target::Open(id) => return Ok((link(world.file(*id)?), None)),
            Target::Path(path, mount) => mount::in_place_of(world, *mount, |_| {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                rustix::fs::open(path, flags, Mode::empty())
                    .during("Opening the watched", || path.display().to_string())
            })?,
            Target::Handle(dev, handle) => open_handle(*dev, handle)
                .during("Opening the watched file on device", || format!("{dev:#x}"))?,
        };
        Ok((link(file.as_fd()), Some(file)))
    }
}

/// Opens a handle in any mount of its file system.
fn open_handle(dev: u32, entry: &FhEntry) -> io::Result<OwnedFd> {
    let stale = || io::Error::from_raw_os_error(libc::ESTALE);
    let handle = handle_in(entry).ok_or_else(stale)?;
    let text = std::fs::read(own_proc_path("thread-self/mountinfo"))?;
    let mounts = parse_mountinfo(&text)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    mounts
        .iter()
        .filter(|mount| mount.dev_major << 20 | mount.dev_minor == dev)
        .filter_map(|mount| rustix::fs::open(&*mount.point, flags, Mode::empty()).ok())
        .find_map(|mount| open_by_handle(mount.as_fd(), &handle).ok())
        .ok_or_else(stale)
}

/// What must be done before watching begins: everything that would be seen.
pub(super) fn needs<'t>(
    images: &TreeImages,
    targets: impl IntoIterator<Item = &'t Target>,
) -> Vec<Handle> {
    let mut needs = vec![remap::NAMES_GONE];
    let regular = images.files.values().filter_map(|file| file.reg.as_ref());
    let opened = regular.filter(|file| {
        !remap::is_link(images, file.id)
            && images.named_by(file.id).is_empty()
            && !file.name.starts_with("/proc/")
    });
    needs.extend(opened.map(|file| Handle::File(file.id)));
    needs.extend(targets.into_iter().flat_map(|target| target.needs(images)));
    needs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_fdinfo_is_taken_apart() {
        let line = b"1 ino:2c0b sdev:fe00000 mask:3cc ignored_mask:0 fhandle-bytes:8 \
                     fhandle-type:1 f_handle:0b2c000001020304";
        let fields = Fields::of("wd", line).expect("well formed");
        assert_eq!(fields.short("wd"), Some(1));
        assert_eq!(fields.number("ino"), Some(0x2c0b));
        let handle = fields.handle().expect("a handle");
        assert_eq!((handle.bytes, handle.r#type), (8, 1));
        assert_eq!(handle.handle[0], 0x0403_0201_0000_2c0b);
        assert_eq!(handle.handle.len(), HANDLE_WORDS);
        assert!(Fields::of("wd", b"1 ino").is_none());
    }
}
