//! Searching for watched files whose handle cannot be opened.

use std::collections::HashMap;
use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use floe_kernel::watch::{FileHandle, handle_of};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};

use super::Watched;
use super::find::Sight;
use crate::collect::Collector;
use crate::fd::remap::kernel_device;

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

/// What was found in likely places, over all watches of a dump.
#[derive(Default)]
struct Searched {
    found: HashMap<Watched, PathBuf>,
    done: bool,
}

/// Searches the directories where such files are to be expected.
pub(super) fn search(watched: Watched, collector: &mut Collector<'_>) -> Option<PathBuf> {
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
        if !has_more(left) {
            return;
        }
        let Ok(stat) = rustix::fs::lstat(&path) else {
            continue;
        };
        let key = Watched {
            dev: kernel_device(stat.st_dev),
            ino: stat.st_ino,
        };
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if is_directory && !found.contains_key(&key) {
            let opened = open_directory(CWD, &path);
            let names = opened.map(names).unwrap_or_default();
            waiting.extend(names.iter().map(|(name, _)| path.join(name)));
        }
        found.entry(key).or_insert(path);
    }
}

fn has_more(left: &mut usize) -> bool {
    if *left == 0 {
        tracing::warn!("the search for watched files was given up: too many files");
        return false;
    }
    *left -= 1;
    true
}

/// All files of a mount, by what the kernel shows of a watched one.
#[derive(Default)]
struct Contents {
    by_handle: HashMap<FileHandle, PathBuf>,
    /// Of those without a handle.
    by_number: HashMap<u64, PathBuf>,
}

/// The mounts that were searched.
#[derive(Default)]
struct SearchedMounts(HashMap<(Option<u32>, PathBuf), Contents>);

/// Searches a whole mount, once for all watches; the caller is in its namespace.
pub(super) fn search_mount(
    (watched, handle): (Watched, Option<&FileHandle>),
    sight: &Sight,
    collector: &mut Collector<'_>,
) -> Option<PathBuf> {
    let known = &mut collector.cache(SearchedMounts::default).0;
    let key = (sight.mount, sight.point.clone());
    let contents = known.entry(key).or_insert_with(|| {
        let mount = sight.open(watched.dev);
        mount.map_or_else(Contents::default, |mount| {
            Contents::of(mount, &sight.point, MOST_SCANNED)
        })
    });
    let by_handle = handle.and_then(|handle| contents.by_handle.get(handle));
    by_handle.or(contents.by_number.get(&watched.ino)).cloned()
}

impl Contents {
    fn of(mount: OwnedFd, point: &Path, mut left: usize) -> Contents {
        let mut contents = Contents::default();
        let own = handle_of(mount.as_fd(), c"").ok();
        let number = own.as_ref().map(|(_, number)| *number);
        contents.add((mount.as_fd(), c""), point, own);
        let mut waiting = vec![(
            open_directory(mount.as_fd(), Path::new(".")),
            point.to_path_buf(),
        )];
        while let Some((directory, path)) = waiting.pop() {
            let Some(directory) = directory else { continue };
            let Ok(listed) = directory.try_clone() else {
                continue;
            };
            for (name, kind) in names(listed) {
                if !has_more(&mut left) {
                    return contents;
                }
                let Ok(text) = std::ffi::CString::new(name.as_bytes()) else {
                    continue;
                };
                let handle = handle_of(directory.as_fd(), &text).ok();
                // What is mounted there is another sight.
                if handle
                    .as_ref()
                    .is_some_and(|(_, there)| Some(*there) != number)
                {
                    continue;
                }
                let path = path.join(&name);
                contents.add((directory.as_fd(), &text), &path, handle);
                if kind == FileType::Directory {
                    waiting.push((open_directory(directory.as_fd(), Path::new(&name)), path));
                }
            }
        }
        contents
    }

    fn add(
        &mut self,
        (directory, name): (BorrowedFd<'_>, &CStr),
        path: &Path,
        handle: Option<(FileHandle, i32)>,
    ) {
        if let Some((handle, _)) = handle {
            self.by_handle.entry(handle).or_insert(path.to_path_buf());
            return;
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH;
        if let Ok(stat) = rustix::fs::statat(directory, name, flags) {
            let known = self.by_number.entry(stat.st_ino);
            known.or_insert(path.to_path_buf());
        }
    }
}

fn open_directory(at: BorrowedFd<'_>, path: &Path) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, path, flags, Mode::empty()).ok()
}

/// The names in a directory, with their types.
fn names(directory: OwnedFd) -> Vec<(std::ffi::OsString, FileType)> {
    let Ok(entries) = Dir::new(directory) else {
        return Vec::new();
    };
    entries
        .filter_map(Result::ok)
        .filter(|entry| !matches!(entry.file_name().to_bytes(), b"." | b".."))
        .map(|entry| {
            let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
            (name, entry.file_type())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn all_files_of_a_mount_are_found() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a/b");
        std::fs::create_dir(dir.path().join("a")).expect("made");
        std::fs::write(&path, "x").expect("written");
        let root = open_directory(CWD, dir.path()).expect("opened");
        let contents = Contents::of(root, dir.path(), 10);
        let all = contents
            .by_handle
            .values()
            .chain(contents.by_number.values());
        let mut all: Vec<&Path> = all.map(PathBuf::as_path).collect();
        all.sort();
        assert_eq!(all, [dir.path(), &dir.path().join("a"), &path]);
    }
}
