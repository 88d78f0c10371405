//! Finding the layers of an overlay whose names lead nowhere: they were moved, or named from a directory that
//! nobody knows any more.
//!
//! The kernel shows layers by the names that they were mounted by. A file of an overlay has a handle with that
//! of the real file in it (`OVL_FILEID_V1`, Linux 6.6), which can be opened in the file system of the layer:
//! what is before the file's name in the overlay is the path of the layer.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use floe_kernel::namespace::own_fd_path;
use floe_kernel::proc::Mount;
use floe_kernel::watch::{FileHandle, handle_of, open_by_handle};
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags};

use super::overlay;

/// `OVL_FILEID_V1`: the type of a handle that has another one in it.
const LAYERED: u32 = 0xf8;
/// Where in it are the length, the type of the inner handle, and the inner handle itself.
const LENGTH: usize = 5;
const TYPE: usize = 7;
const INNER: usize = 24;
/// What comes before that of which the length is told.
const PADDING: usize = 3;
/// Files looked at before the search is given up.
const MOST: usize = 200_000;

/// The options with layers under the names that they have now; `None` where one is not found. To be called in
/// the namespace of the overlay, whose mounts these are.
pub fn locate(options: &str, point: &str, mounts: &[Mount]) -> Option<String> {
    let search = Search::begin(point, mounts)?;
    let missing = |known: &BTreeMap<String, PathBuf>| -> Vec<String> {
        let all = overlay::directories(options).into_iter();
        all.filter(|layer| !is_absolute_directory(layer) && !known.contains_key(layer))
            .collect()
    };
    let mut known = BTreeMap::new();
    // The root is that of the upper layer, or of the first.
    let top = overlay::upper(options).or_else(|| overlay::directories(options).into_iter().next());
    if let (Some(top), Some(path)) = (top, search.real(&search.root, c"", Path::new(""))) {
        guess(&top, &path, &missing(&known), &mut known);
    }
    let left = missing(&known);
    if let [last] = &left[..] {
        let taken: Vec<PathBuf> = overlay::directories(options)
            .into_iter()
            .map(|layer| known.get(&layer).cloned().unwrap_or(layer.into()))
            .collect();
        let found = search.other_than(&taken)?;
        known.insert(last.clone(), found);
    }
    if !missing(&known).is_empty() || known.values().any(|path| path.to_str().is_none()) {
        return None;
    }
    Some(overlay::with_directories(options, |layer| {
        known
            .get(layer)
            .and_then(|path| path.to_str())
            .unwrap_or(layer)
            .to_string()
    }))
}

fn is_absolute_directory(path: &str) -> bool {
    path.starts_with('/') && Path::new(path).is_dir()
}

/// One layer was found: others that were beside it may have moved with it.
fn guess(name: &str, path: &Path, missing: &[String], known: &mut BTreeMap<String, PathBuf>) {
    let name = Path::new(name);
    let common = name
        .iter()
        .rev()
        .zip(path.iter().rev())
        .take_while(|(one, other)| one == other)
        .count();
    let ancestor = |path: &Path| path.ancestors().nth(common).map(Path::to_path_buf);
    let bases = ancestor(name).zip(ancestor(path));
    for layer in missing {
        if Path::new(layer) == name {
            known.insert(layer.clone(), path.to_path_buf());
        } else if let Some((old, new)) = &bases
            && let Ok(rest) = Path::new(layer).strip_prefix(old)
            && new.join(rest).is_dir()
        {
            known.insert(layer.clone(), new.join(rest));
        }
    }
}

struct Search {
    root: OwnedFd,
    /// One mount of each other file system.
    mounts: Vec<OwnedFd>,
}

fn open_directory(at: impl AsFd, path: &Path) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, path, flags, Mode::empty()).ok()
}

impl Search {
    fn begin(point: &str, mounts: &[Mount]) -> Option<Search> {
        use std::os::unix::ffi::OsStrExt;
        let root = open_directory(CWD, Path::new(point))?;
        let opened = mounts.iter().filter_map(|mount| {
            let path = Path::new(std::ffi::OsStr::from_bytes(&mount.point));
            open_directory(CWD, path)
        });
        Some(Search {
            root,
            mounts: opened.collect(),
        })
    }

    /// The layer that a file is of: the path of the real file without that of the file in the overlay.
    fn real(&self, directory: &OwnedFd, name: &std::ffi::CStr, path: &Path) -> Option<PathBuf> {
        let (outer, _) = handle_of(directory.as_fd(), name).ok()?;
        let end = PADDING + usize::from(*outer.bytes.get(LENGTH)?);
        let inner = FileHandle {
            kind: u32::from(*outer.bytes.get(TYPE)?),
            bytes: outer.bytes.get(INNER..end)?.to_vec(),
        };
        if outer.kind != LAYERED {
            return None;
        }
        self.mounts.iter().find_map(|mount| {
            let file = open_by_handle(mount.as_fd(), &inner).ok()?;
            let real = std::fs::read_link(own_fd_path(&file)).ok()?;
            let there = rustix::fs::lstat(&real).ok()?;
            let here = rustix::fs::fstat(&file).ok()?;
            let same = (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino);
            let mut layer = real.as_path();
            for name in path.iter().rev() {
                layer = layer.parent().filter(|_| layer.file_name() == Some(name))?;
            }
            (same && layer.is_dir()).then(|| layer.to_path_buf())
        })
    }

    /// The first layer that a file of the overlay is of and that is none of these.
    fn other_than(&self, known: &[PathBuf]) -> Option<PathBuf> {
        let mut left = MOST;
        let mut waiting = vec![(self.root.try_clone().ok()?, PathBuf::new())];
        while let Some((directory, path)) = waiting.pop() {
            for entry in Dir::read_from(&directory).ok()?.flatten() {
                use std::os::unix::ffi::OsStrExt;
                let name = entry.file_name().to_bytes();
                left = left.checked_sub(1)?;
                if matches!(name, b"." | b"..") {
                    continue;
                }
                let path = path.join(std::ffi::OsStr::from_bytes(name));
                let text = CString::new(name).ok()?;
                let layer = self.real(&directory, &text, &path);
                if let Some(layer) = layer.filter(|layer| !known.contains(layer)) {
                    return Some(layer);
                }
                if entry.file_type() == FileType::Directory {
                    let below = open_directory(&directory, Path::new(path.file_name()?));
                    waiting.extend(below.map(|below| (below, path)));
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_move_with_those_beside_them() {
        let top = tempfile::tempdir().expect("a directory");
        for name in ["upper", "work", "lower"] {
            std::fs::create_dir(top.path().join(name)).expect("made");
        }
        let missing = ["upper".to_string(), "work".into(), "other".into()];
        let mut known = BTreeMap::new();
        guess("upper", &top.path().join("upper"), &missing, &mut known);
        let names: Vec<&str> = known.keys().map(String::as_str).collect();
        assert_eq!(names, ["upper", "work"]);
        assert_eq!(known["work"], top.path().join("work"));
        let moved = ["/old/lower".to_string(), "/older/lower".into()];
        known.clear();
        guess("/old/upper", &top.path().join("upper"), &moved, &mut known);
        assert_eq!(known["/old/lower"], top.path().join("lower"));
        assert_eq!(known.len(), 1);
    }
}
