//! What inotify and fanotify watch: named in fdinfo by a file handle, found again by path.
//!
//! A path is preferred, because inodes of memory file systems change between mounts, and all do with a
//! copy of a file system. A deleted file that is watched has none: it is found through its descriptor.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use floe_image::messages::{FhEntry, RemapType};
use floe_kernel::namespace::{NsKind, own_fd_path, own_proc_path};
use floe_kernel::proc::{Mount, parse_mountinfo};
use floe_kernel::watch::{FileHandle, MAX_HANDLE_BYTES, open_by_handle};
use floe_plan::Handle;
use rustix::fs::{CWD, Dir, Mode, OFlags};

use super::remap::{self, kernel_device};
use crate::collect::{CollectError, Collector, FdProbe, Obstacle};
use crate::namespace::TreeNamespace;
use crate::restore::{Attempt, ExecuteError, PlanError, TreeImages, World};

/// Words that a handle takes in the images.
const HANDLE_WORDS: usize = MAX_HANDLE_BYTES / 8;
/// Where watched files are searched for when neither handle nor the user says more.
const SCANNED: &[&str] = &[
    "/etc",
    "/var/spool",
    "/var/log",
    "/usr/share/dbus-1",
    "/lib/udev",
];
/// Directory entries looked at before a search is given up.
const MOST_SCANNED: usize = 2_000_000;

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

/// What was found by searching, over all watches of a dump.
#[derive(Default)]
struct Searched {
    found: HashMap<Watched, PathBuf>,
    done: bool,
}

/// Puts the path of a watched file into its handle, where it has one.
pub(super) fn find_path(
    watched: Watched,
    handle: &mut FhEntry,
    fd: &FdProbe<'_>,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let proc = fd.proc();
    let mounts = parse_mountinfo(&proc.read("mountinfo")?).map_err(|error| proc.bad(error))?;
    // Paths are those that the tree sees.
    let inside = collector.namespaces().of_root(NsKind::Mnt).cloned();
    let inside: Vec<&TreeNamespace> = inside.iter().map(|namespace| &**namespace).collect();
    let visit = collector.namespaces().visit(&inside)?;
    let opened = open(watched.dev, handle, &mounts);
    let path = opened.as_ref().and_then(|file| path_of(file, watched));
    let path = match path {
        None if opened.is_none() || collector.options.force_irmap => search(watched, collector),
        path => path,
    };
    drop(visit);
    if let Some(path) = path {
        let path = path.into_os_string().into_string();
        handle.path = Some(path.map_err(|_| fd.garbled("the path of a watched file"))?);
        return Ok(());
    }
    let in_memory = mounts.iter().any(|mount| {
        kernel_number(mount) == watched.dev && matches!(&*mount.fs_type, b"tmpfs" | b"devtmpfs")
    });
    if opened.is_none() || in_memory {
        let (pid, number) = (fd.pid(), fd.fd());
        let what = format!("a watch on inode {} that has no path", watched.ino);
        let remedy = "use --irmap-scan-path with a directory above the watched file";
        collector.defer(move |collector| {
            // A deleted file that is open too is found through that.
            if !remap::is_saved_ghost(watched.dev, watched.ino, collector) {
                collector.obstacle(Obstacle::fd(pid, number, what, remedy));
            }
            Ok(())
        });
    }
    Ok(())
}

fn kernel_number(mount: &Mount) -> u32 {
    mount.dev_major << 20 | mount.dev_minor
}

/// Opens a handle in any mount of its file system.
fn open(dev: u32, handle: &FhEntry, mounts: &[Mount]) -> Option<OwnedFd> {
    let bytes: Vec<u8> = handle
        .handle
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .take(handle.bytes as usize)
        .collect();
    let handle = FileHandle {
        kind: handle.r#type,
        bytes,
    };
    if handle.bytes.is_empty() {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    mounts
        .iter()
        .filter(|mount| kernel_number(mount) == dev)
        .filter_map(|mount| rustix::fs::open(&*mount.point, flags, Mode::empty()).ok())
        .find_map(|mount| open_by_handle(mount.as_fd(), &handle).ok())
}

/// The path of an opened file, if it still leads there.
fn path_of(file: &OwnedFd, watched: Watched) -> Option<PathBuf> {
    let path = std::fs::read_link(own_fd_path(file)).ok()?;
    let stat = rustix::fs::lstat(&path).ok()?;
    (stat.st_ino == watched.ino).then_some(path)
}

/// Searches the directories where such files are to be expected.
fn search(watched: Watched, collector: &mut Collector<'_>) -> Option<PathBuf> {
    let given = collector.options.irmap_scan_paths.clone();
    let searched = collector.cache(Searched::default);
    if !searched.done {
        searched.done = true;
        let mut left = MOST_SCANNED;
        let known = given.into_iter().chain(SCANNED.iter().map(PathBuf::from));
        for start in known {
            scan(&start, &mut searched.found, &mut left);
        }
    }
    searched.found.get(&watched).cloned()
}

fn scan(start: &Path, found: &mut HashMap<Watched, PathBuf>, left: &mut usize) {
    let mut waiting = vec![start.to_path_buf()];
    while let Some(path) = waiting.pop() {
        if *left == 0 {
            tracing::warn!("the search for watched files was given up: too many files");
            return;
        }
        *left -= 1;
        let Ok(stat) = rustix::fs::lstat(&path) else {
            continue;
        };
        let key = Watched {
            dev: kernel_device(stat.st_dev),
            ino: stat.st_ino,
        };
        let is_directory =
            rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory;
        if is_directory && !found.contains_key(&key) {
            waiting.extend(children(&path));
        }
        found.entry(key).or_insert(path);
    }
}

fn children(directory: &Path) -> Vec<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(opened) = rustix::fs::openat(CWD, directory, flags, Mode::empty()) else {
        return Vec::new();
    };
    let Ok(entries) = Dir::new(opened) else {
        return Vec::new();
    };
    let names = entries.filter_map(Result::ok);
    names
        .filter(|entry| !matches!(entry.file_name().to_bytes(), b"." | b".."))
        .map(|entry| directory.join(std::ffi::OsStr::from_bytes(entry.file_name().to_bytes())))
        .collect()
}

/// How restore finds a watched file.
pub(super) enum Target {
    /// It is deleted, but open as this file.
    Open(u32),
    Path(PathBuf),
    Handle(u32, FhEntry),
}

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
            Some(path) => Target::Path(PathBuf::from(path)),
            None => Target::Handle(watched.dev, handle.clone()),
        })
    }

    /// A path that leads to the file, whatever its name; it holds while the descriptor is open.
    pub fn find(&self, world: &World<'_>) -> Result<(PathBuf, Option<OwnedFd>), ExecuteError> {
        let link = |fd: BorrowedFd<'_>| PathBuf::from(own_fd_path(fd));
        let file = match self {
            Target::Open(id) => return Ok((link(world.file(*id)?), None)),
            Target::Path(path) => {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                rustix::fs::open(path, flags, Mode::empty())
                    .during("Opening the watched", || path.display().to_string())?
            }
            Target::Handle(dev, handle) => open_handle(*dev, handle)
                .during("Opening the watched file on device", || format!("{dev:#x}"))?,
        };
        Ok((link(file.as_fd()), Some(file)))
    }
}

fn open_handle(dev: u32, handle: &FhEntry) -> io::Result<OwnedFd> {
    let text = std::fs::read(own_proc_path("thread-self/mountinfo"))?;
    let mounts = parse_mountinfo(&text)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    open(dev, handle, &mounts).ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
}

/// What must be done before watching begins: everything that would be seen.
pub(super) fn needs(images: &TreeImages) -> Vec<Handle> {
    let mut needs = vec![remap::NAMES_GONE];
    let regular = images.files.values().filter_map(|file| file.reg.as_ref());
    let opened = regular.filter(|file| {
        !remap::is_link(images, file.id)
            && images.named_by(file.id).is_empty()
            && !file.name.starts_with("/proc/")
    });
    needs.extend(opened.map(|file| Handle::File(file.id)));
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

    #[test]
    fn a_file_is_found_by_searching() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a");
        std::fs::write(&path, "x").expect("written");
        let stat = rustix::fs::lstat(&path).expect("there");
        let mut found = HashMap::new();
        scan(dir.path(), &mut found, &mut 10);
        let key = Watched {
            dev: kernel_device(stat.st_dev),
            ino: stat.st_ino,
        };
        assert_eq!(found.get(&key), Some(&path));
    }
}
