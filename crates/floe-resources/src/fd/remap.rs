//! Files that cannot be found under the name that `/proc` shows: deleted ones, and those of dead processes.
//!
//! Saved:    content, owner, mode and times of a file without any name; an extra name (`--link-remap`) for
//!           one that lives on under a name that nobody knows; the pid for files of `/proc/<pid>`.
//! Rebuilt:  brought back under a temporary name, given its old name, opened, and deleted again. Needs:
//!           the directory to be writable.
//! Not kept: access control lists and extended attributes; that two deleted directories were nested.

mod ended;
mod ghost;
mod names;
mod rebuild;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use floe_image::ImageKind;
use floe_image::messages::{FdTypes, FileEntry, RegFileEntry, RemapFilePathEntry, RemapType};
use floe_kernel::acting::Acting;
use floe_kernel::namespace::Visit;
use rustix::fs::{AtFlags, CWD, FileType, Stat};
use rustix::io::Errno;

pub(super) use ghost::kernel_device;
pub use names::HeldNames;
pub use rebuild::{NAMES_GONE, is_link, needs_of_name, open_by_name, plan_names};

use super::file_entry;
use super::memfd::reopen;
use super::regular::NamedFile;
use crate::collect::{CollectError, Collector, FileId, no_owner};
use crate::mount::{KnownMounts, NamedProcess, Place};

/// How the name begins that a dump gives to a file without one (`--link-remap`).
const LINK_NAME: &str = "link_remap.";

/// What the kernel adds to the name of a file without one.
const DELETED: &[u8] = b" (deleted)";

/// `statfs(2)`.
const PROC_SUPER_MAGIC: i64 = 0x9fa0;
const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;
const NFS_SUPER_MAGIC: i64 = 0x6969;
const OVERLAYFS_SUPER_MAGIC: i64 = 0x794c_7630;

/// Numbers of the deleted files saved so far, by device and inode.
#[derive(Default)]
struct Ghosts(HashMap<(u64, u64), u32>);

/// Extra names given so far, by device and inode.
#[derive(Default)]
struct Links(HashMap<(u64, u64), u32>);

/// Dead processes noted so far: one entry is enough for all files of a process.
#[derive(Default)]
struct Dead(HashSet<NamedProcess>);

/// Files that were found by their name, with device, inode and mount: many descriptions may be of one.
#[derive(Default)]
struct Seen(HashSet<(u64, u64, Option<u32>, Vec<u8>)>);

/// The name under which restore will find the file of entry `id`; where there is none, what it needs to
/// bring the name back is saved.
pub fn reachable_name(
    id: FileId,
    (file, place): (&NamedFile<'_>, &Place),
    collector: &mut Collector<'_>,
) -> Result<Vec<u8>, CollectError> {
    if !file.target.starts_with(b"/") {
        return Err(file.obstacle("", "close it: it has no path"));
    }
    let seen = (
        file.stat.st_dev,
        file.stat.st_ino,
        place.mount,
        file.target.to_vec(),
    );
    if collector.cache(Seen::default).0.contains(&seen) {
        return Ok(seen.3);
    }
    let name = file.target.strip_suffix(DELETED).unwrap_or(file.target);
    let file_system = file_system(file)?;
    match file_system {
        PROC_SUPER_MAGIC => return name_in_proc(id, (file, place), collector),
        DEVPTS_SUPER_MAGIC => return Ok(name.to_vec()),
        NFS_SUPER_MAGIC if is_silly_name(name) => {
            // It goes with the last descriptor, that is, when the dumped tasks end.
            save_link(id, name, (file, place), collector)?;
            return Ok(name.to_vec());
        }
        _ => {}
    }
    if file.stat.st_nlink == 0 {
        save_ghost(id, name, file, collector)?;
        return Ok(name.to_vec());
    }
    match at(file, place, file.target)? {
        Found::Itself => {
            collector.cache(Seen::default).0.insert(seen);
            return Ok(file.target.to_vec());
        }
        Found::Other(rdev) if collector.options.evasive_devices && is_device(file, rdev) => {
            return Ok(file.target.to_vec());
        }
        Found::Other(_) => {
            let what = ", hidden by another file of that name";
            let remedy = "close it, or move the other file away: it cannot be opened by its name";
            return Err(file.obstacle(what, remedy));
        }
        Found::Nothing => {}
    }
    let is_stale =
        name.len() == file.target.len() || !matches!(at(file, place, name)?, Found::Itself);
    // Overlays show the number of names that a file has in its lower layer, where it is not deleted.
    if is_stale && file_system == OVERLAYFS_SUPER_MAGIC && file.stat.st_nlink == 1 {
        save_ghost(id, name, file, collector)?;
    } else if is_stale {
        save_link(id, name, (file, place), collector)?;
    }
    Ok(name.to_vec())
}

fn file_system(file: &NamedFile<'_>) -> Result<i64, CollectError> {
    let stat = rustix::fs::fstatfs(file.file);
    stat.map(|stat| stat.f_type)
        .map_err(|errno| failed(file, "Asking for the file system of an open file", errno))
}

fn failed(file: &NamedFile<'_>, action: &'static str, errno: Errno) -> CollectError {
    CollectError::Task {
        pid: file.pid,
        action,
        source: errno.into(),
    }
}

/// Goes to where the file's name leads to it, until the visit is dropped.
fn enter(file: &NamedFile<'_>, place: &Place) -> Result<Option<Visit>, CollectError> {
    place.visit().map_err(|source| CollectError::Task {
        pid: file.pid,
        action: "Entering the mount namespace",
        source,
    })
}

/// What a name leads to.
enum Found {
    Itself,
    /// Another file, which may be this device.
    Other(Option<u64>),
    Nothing,
}

fn at(file: &NamedFile<'_>, place: &Place, name: &[u8]) -> Result<Found, CollectError> {
    let _visit = enter(file, place)?;
    let same = |stat: &Stat| (stat.st_dev, stat.st_ino) == (file.stat.st_dev, file.stat.st_ino);
    match rustix::fs::lstat(name) {
        Ok(stat) if same(&stat) => Ok(Found::Itself),
        Ok(stat) => {
            let kind = FileType::from_raw_mode(stat.st_mode);
            let device = kind == FileType::from_raw_mode(file.stat.st_mode)
                && matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
            Ok(Found::Other(device.then_some(stat.st_rdev)))
        }
        Err(Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG) => Ok(Found::Nothing),
        Err(errno) => Err(failed(file, "Looking for an open file", errno)),
    }
}

fn is_device(file: &NamedFile<'_>, rdev: Option<u64>) -> bool {
    rdev == Some(file.stat.st_rdev)
}

/// How NFS calls files that are deleted while they are open: `.nfs` and 24 hexadecimal digits.
fn is_silly_name(name: &[u8]) -> bool {
    let last = name.rsplit(|b| *b == b'/').next().unwrap_or_default();
    last.strip_prefix(b".nfs")
        .is_some_and(|digits| digits.len() >= 24 && digits.iter().all(u8::is_ascii_hexdigit))
}

/// Files of a process that has ended are opened on a process that takes its pid for that moment.
fn name_in_proc(
    id: FileId,
    (file, place): (&NamedFile<'_>, &Place),
    collector: &mut Collector<'_>,
) -> Result<Vec<u8>, CollectError> {
    let name = file.target.strip_suffix(DELETED).unwrap_or(file.target);
    let mounts = collector.cache(KnownMounts::default);
    let mount = place.mount.and_then(|number| mounts.find(number));
    let text = std::str::from_utf8(name).ok();
    let Some(process) = text.and_then(|name| NamedProcess::of(mount, name)) else {
        return Ok(file.target.to_vec());
    };
    let proc = mount.map_or("/proc", |proc| &proc.mountpoint);
    let directory = Path::new(proc).join(process.pid.to_string());
    // Only the directory of the process itself is shown as deleted, not what was in it.
    let exists = {
        let _visit = enter(file, place)?;
        directory.exists()
    };
    let gone = name.len() < file.target.len() || !exists;
    if gone && collector.cache(Dead::default).0.insert(process) {
        save_remap(id, process.pid, RemapType::Procfs, collector)?;
    }
    Ok(name.to_vec())
}

fn save_remap(
    id: FileId,
    remap_id: u32,
    kind: RemapType,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let entry = RemapFilePathEntry {
        orig_id: id.0,
        remap_id,
        remap_type: Some(kind as i32),
    };
    collector.append_side(ImageKind::RemapFpath, &entry)
}

/// Whether a deleted file was saved; the device as the kernel keeps it.
pub(super) fn is_saved_ghost(dev: u32, ino: u64, collector: &mut Collector<'_>) -> bool {
    let ghosts = &collector.cache(Ghosts::default).0;
    ghosts
        .keys()
        .any(|known| (kernel_device(known.0), known.1) == (dev, ino))
}

fn save_ghost(
    id: FileId,
    name: &[u8],
    file: &NamedFile<'_>,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let ghosts = &mut collector.cache(Ghosts::default).0;
    let next = ghosts.len() as u32 + 1;
    let number = *ghosts
        .entry((file.stat.st_dev, file.stat.st_ino))
        .or_insert(next);
    if number == next {
        let limit = collector.options.ghost_limit.0;
        let size = ghost::stored_bytes(file.stat);
        if size > limit {
            let what = format!(", deleted, with {size} bytes of content");
            let remedy = format!("raise --ghost-limit above {size}, or close the file");
            return Err(file.obstacle(&what, remedy));
        }
        if !collector.only_looks() {
            ghost::save(u64::from(number), file, collector)?;
            tracing::debug!(
                name = %String::from_utf8_lossy(name),
                number,
                "saved a deleted file"
            );
        }
    }
    save_remap(id, number, RemapType::Ghost, collector)
}

/// Gives the file a name beside the one that it lost; restore removes it again.
fn save_link(
    id: FileId,
    name: &[u8],
    (file, place): (&NamedFile<'_>, &Place),
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let key = (file.stat.st_dev, file.stat.st_ino);
    if let Some(number) = collector.cache(Links::default).0.get(&key).copied() {
        return save_remap(id, number, RemapType::Linked, collector);
    }
    if !collector.options.link_remap {
        let what = ", deleted under this name but not under another";
        let remedy = "use --link-remap, which gives it a temporary name beside the old one";
        return Err(file.obstacle(what, remedy));
    }
    if collector.only_looks() {
        return Ok(());
    }
    let number = collector.ids().fresh();
    let visit = enter(file, place)?;
    let made = make_link(name, number, file);
    drop(visit);
    let Some(link) = made? else {
        // Overlay file systems cannot link what came from a lower layer.
        return save_ghost(id, name, file, collector);
    };
    collector.cache(HeldNames::default).adopt(&link, place);
    let link = link.into_os_string().into_encoded_bytes();
    let entry = RegFileEntry {
        id: number.0,
        fown: no_owner(),
        mnt_id: place.mount.map(u32::cast_signed),
        name: String::from_utf8(link)
            .map_err(|_| file.obstacle("", "rename it: its name is not UTF-8"))?,
        ..RegFileEntry::default()
    };
    collector.add_file(FileEntry {
        reg: Some(entry),
        ..file_entry(FdTypes::Reg, number)
    });
    collector.cache(Links::default).0.insert(key, number.0);
    save_remap(id, number.0, RemapType::Linked, collector)
}

/// Gives the file a name, as its owner where our own user has no number in its file system.
fn link_as_owner(link: &Path, file: &NamedFile<'_>) -> rustix::io::Result<()> {
    let link_it = || rustix::fs::linkat(file.file, "", CWD, link, AtFlags::EMPTY_PATH);
    match link_it() {
        Err(Errno::OVERFLOW) => {
            let acting = Acting::as_owner(file.stat.st_uid, file.stat.st_gid);
            let _acting = acting.map_err(|_| Errno::OVERFLOW)?;
            link_it()
        }
        linked => linked,
    }
}

/// Links the file where its directory was, or in the nearest one above that still exists; `None` when it
/// cannot be linked although the directory is there.
fn make_link(
    name: &[u8],
    number: FileId,
    file: &NamedFile<'_>,
) -> Result<Option<PathBuf>, CollectError> {
    use std::os::unix::ffi::OsStrExt;
    let name = Path::new(std::ffi::OsStr::from_bytes(name));
    for directory in name.ancestors().skip(1) {
        let link = directory.join(format!("{LINK_NAME}{}", number.0));
        match link_as_owner(&link, file) {
            Ok(()) => return Ok(Some(link)),
            Err(Errno::NOENT) if directory.exists() => return Ok(None),
            Err(Errno::NOENT) => {}
            Err(Errno::XDEV) => break,
            Err(errno) => return Err(failed(file, "Giving an extra name to a file", errno)),
        }
    }
    let remedy = "close it: no directory of its file system is left to give it a name in";
    Err(file.obstacle(", deleted with its directory", remedy))
}
