//! A checkpoint that a new one is to replace stays until that is whole, and comes back if it never is.
//!
//! It lies in a directory beside the new images. Whoever has the lock of their directory may finish what a killed
//! dump has begun: nothing is lost at any step.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use floe_image::dir::PARENT_LINK;
use floe_image::manifest::MANIFEST_NAME;
use floe_image::{ImageKind, is_image_name};

use crate::dir_lock::DirLock;
use crate::error::DumpError;

/// Where the earlier checkpoint lies while the new one is made.
const BEFORE: &str = ".floe-before";
/// The same, when what was begun is gone and it is on its way back.
const BACK: &str = ".floe-back";

/// An earlier checkpoint in the directory of a new one; dropping it settles which of both stays.
#[derive(Debug)]
pub struct Aside<'a> {
    images: &'a Path,
}

impl<'a> Aside<'a> {
    /// Sets aside what is whole, or looks so, in a directory that is ours.
    pub fn set(images: &'a Path) -> Result<Self, DumpError> {
        let failed = |source| DumpError::Aside {
            path: images.to_path_buf(),
            source,
        };
        settle(images).map_err(failed)?;
        let aside = Aside { images };
        let inventory = ImageKind::Inventory.file_name(0);
        let is_whole = |name: &str| images.join(name).exists();
        if is_whole(MANIFEST_NAME) || is_whole(&inventory) {
            set_aside(images, &images.join(BEFORE)).map_err(failed)?;
        }
        Ok(aside)
    }
}

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        if let Err(error) = settle(self.images) {
            let path = self.images.join(BEFORE);
            tracing::warn!(%error, "the earlier checkpoint is in {}", path.display());
        }
    }
}

/// What makes a checkpoint whole, to be moved first when it goes and last when it comes.
fn is_seal(name: &str) -> bool {
    name == MANIFEST_NAME || name == ImageKind::Inventory.file_name(0)
}

fn names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(directory)?.collect::<Result<Vec<_>, _>>()?;
    let names = entries
        .into_iter()
        .map(|entry| entry.file_name().into_string());
    Ok(names.filter_map(Result::ok).collect())
}

fn set_aside(images: &Path, before: &Path) -> io::Result<()> {
    fs::create_dir(before)?;
    let mut names = names(images)?;
    names.retain(|name| is_image_name(name) || is_seal(name) || name == PARENT_LINK);
    names.sort_by_key(|name| !is_seal(name));
    for name in names {
        fs::rename(images.join(&name), before.join(&name))?;
    }
    // It may be of the earlier one, or made for the new one by a command of its own.
    let cpu = ImageKind::Cpuinfo.file_name(0);
    match fs::copy(images.join(&cpu), before.join(&cpu)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// After the end of an engine that was killed, which left neither the one nor the other.
pub fn settle_after_kill(images: &Path) {
    let is_left = [BEFORE, BACK].iter().any(|name| images.join(name).exists());
    if !is_left {
        return;
    }
    let settled = match DirLock::take(images) {
        Ok(_ours) => settle(images),
        // The next dump is at it.
        Err(_) => Ok(()),
    };
    if let Err(error) = settled {
        tracing::warn!(%error, "the earlier checkpoint is in {}", images.join(BEFORE).display());
    }
}

/// Where a checkpoint is aside: removes it if the new one is whole, or the rest of the new one and brings it back.
fn settle(images: &Path) -> io::Result<()> {
    let (before, back): (PathBuf, PathBuf) = (images.join(BEFORE), images.join(BACK));
    if before.exists() {
        if images.join(MANIFEST_NAME).exists() {
            return fs::remove_dir_all(before);
        }
        for name in names(images)? {
            if is_image_name(&name) || name == PARENT_LINK {
                fs::remove_file(images.join(name))?;
            }
        }
        fs::rename(&before, &back)?;
    }
    if !back.exists() {
        return Ok(());
    }
    let mut names = names(&back)?;
    names.sort_by_key(|name| is_seal(name));
    for name in names {
        fs::rename(back.join(&name), images.join(&name))?;
    }
    fs::remove_dir(back)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(images: &Path, names: &[&str]) {
        for name in names {
            fs::write(images.join(name), name).expect("writable");
        }
    }

    fn found(images: &Path) -> Vec<String> {
        let mut found = names(images).expect("readable");
        found.sort();
        found
    }

    const EARLIER: [&str; 3] = ["core-7.img", "floe.json", "inventory.img"];

    #[test]
    fn what_was_there_comes_back_unless_the_new_one_is_whole() {
        let place = tempfile::tempdir().expect("a directory");
        let images = place.path();
        write(images, &["dump.log", "cpuinfo.img"]);
        for whole in [false, true] {
            write(images, &EARLIER);
            let aside = Aside::set(images).expect("set aside");
            assert_eq!(found(images), [BEFORE, "cpuinfo.img", "dump.log"]);
            write(images, &["core-8.img", "inventory.img"]);
            if whole {
                write(images, &["floe.json"]);
            }
            drop(aside);
            let own = if whole { "core-8.img" } else { "core-7.img" };
            let wanted = [own, "cpuinfo.img", "dump.log", "floe.json", "inventory.img"];
            assert_eq!(found(images), wanted, "{whole}");
        }
    }

    #[test]
    fn a_return_that_was_cut_short_is_finished() {
        let place = tempfile::tempdir().expect("a directory");
        let images = place.path();
        fs::create_dir(images.join(BACK)).expect("made");
        write(images, &["core-7.img"]);
        write(&images.join(BACK), &["floe.json", "inventory.img"]);
        settle(images).expect("settled");
        assert_eq!(found(images), EARLIER);
    }
}
