//! The index of an overlay (`index=on`), which names files of lower layers by handles.
//!
//! Saved:    with the files of the layers.
//! Rebuilt:  where layers are on new file systems, handles are stale and the kernel refuses the overlay. The
//!           index goes, and what it held together is linked in the upper layer instead. Needs: the layers.
//! Not kept: the numbers of inodes that the overlay shows.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::model::split_options;
use super::overlay;

/// Where the layers of an overlay are, and its own files.
struct Layers {
    upper: PathBuf,
    index: PathBuf,
    lower: Vec<PathBuf>,
    /// What the names of its extended attributes begin with.
    prefix: &'static str,
}

/// Takes the index away, in the namespace where the names of the layers lead to them. Fails with `ESTALE`
/// where a file would lose one of its names.
pub fn rebuild(options: &str) -> io::Result<()> {
    let layers = Layers::of(options).ok_or(Errno::STALE)?;
    layers.link_names()?;
    for entry in fs::read_dir(&layers.index)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    for (path, name) in [
        (&layers.upper, "origin"),
        (&layers.index, "origin"),
        (&layers.index, "upper"),
    ] {
        match rustix::fs::removexattr(path, format!("{}{name}", layers.prefix)) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

impl Layers {
    fn of(options: &str) -> Option<Layers> {
        let mut words = split_options(options).into_iter();
        let words: Vec<String> = words.by_ref().map(|word| overlay::decoded(&word)).collect();
        let one = |key| {
            let word = words.iter().find(|word| word.starts_with(key))?;
            Some(PathBuf::from(overlay::directories(word).pop()?))
        };
        let (upper, work) = (one("upperdir=")?, one("workdir=")?);
        let all = overlay::directories(options).into_iter().map(PathBuf::from);
        Some(Layers {
            index: work.join("index"),
            lower: all.filter(|path| *path != upper && *path != work).collect(),
            upper,
            prefix: match words.iter().any(|word| word == "userxattr") {
                true => "user.overlay.",
                false => "trusted.overlay.",
            },
        })
    }

    /// Gives every file of the index all names in the upper layer that it has in a lower one.
    fn link_names(&self) -> io::Result<()> {
        let mut indexed = HashMap::new();
        for entry in fs::read_dir(&self.index)? {
            let stat = entry?.metadata()?;
            // Devices stand for files that are deleted.
            if !stat.is_dir() && !stat.file_type().is_char_device() {
                indexed.insert(stat.ino(), Vec::new());
            }
        }
        if indexed.is_empty() {
            return Ok(());
        }
        names_below(&self.upper, &mut |name, stat| {
            if let Some(names) = indexed.get_mut(&stat.ino()) {
                names.push(name);
            }
        })?;
        for names in indexed.values() {
            let found = names.iter().find_map(|name| {
                let mut lower = self.lower.iter();
                lower.find_map(|layer| {
                    Some((layer, name, fs::symlink_metadata(layer.join(name)).ok()?))
                })
            });
            let (layer, name, origin) = found.ok_or(Errno::STALE)?;
            let mut others = Vec::new();
            names_below(layer, &mut |other, stat| {
                if stat.ino() == origin.ino() {
                    others.push(other);
                }
            })?;
            for other in others {
                self.link(layer, name, &other)?;
            }
        }
        Ok(())
    }

    /// Gives `name` of the upper layer the name `other` as well, if that is free there.
    fn link(&self, layer: &Path, name: &Path, other: &Path) -> io::Result<()> {
        let (file, link) = (self.upper.join(name), self.upper.join(other));
        if fs::symlink_metadata(&link).is_ok() {
            return Ok(());
        }
        let parents: Vec<&Path> = other.ancestors().skip(1).collect();
        for parent in parents.into_iter().rev() {
            let (from, to) = (layer.join(parent), self.upper.join(parent));
            if fs::symlink_metadata(&to).is_err() {
                let stat = fs::metadata(&from)?;
                fs::create_dir(&to)?;
                lchown(&to, Some(stat.uid()), Some(stat.gid()))?;
                fs::set_permissions(&to, fs::Permissions::from_mode(stat.mode() & 0o7777))?;
            }
        }
        fs::hard_link(file, link)
    }
}

/// Calls `each` for all files below a directory that are no directories themselves.
fn names_below(top: &Path, each: &mut dyn FnMut(PathBuf, &Metadata)) -> io::Result<()> {
    let mut waiting = vec![PathBuf::new()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(top.join(&directory))? {
            let entry = entry?;
            let (name, stat) = (directory.join(entry.file_name()), entry.metadata()?);
            match stat.is_dir() {
                true => waiting.push(name),
                false => each(name, &stat),
            }
        }
    }
    Ok(())
}
