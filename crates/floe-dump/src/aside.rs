//! Images that are there when a new dump begins stay until that is whole, and come back if it never is.
//!
//! They lie in a directory beside the new ones. Whoever has the lock of their directory may finish what a killed
//! dump has begun: nothing is lost at any step.

use std::fs;
use std::io;
use std::path::Path;

use floe_image::dir::PARENT_LINK;
use floe_image::manifest::MANIFEST_NAME;
use floe_image::{ImageKind, is_image_name};

use crate::dir_lock::DirLock;
use crate::error::DumpError;

/// Where the earlier images lie while new ones are made.
const BEFORE: &str = ".floe-before";
/// Where they lie while they move, there or back: what is in it goes to where it was, and nothing is removed.
const MOVING: &str = ".floe-moving";

/// Earlier images in the directory of a new dump; dropping it settles which of both stay.
#[derive(Debug)]
pub struct Aside<'a> {
    images: &'a Path,
}

impl<'a> Aside<'a> {
    /// Sets aside what images there are in a directory that is ours.
    pub fn set(images: &'a Path) -> Result<Self, DumpError> {
        let moved = settle(images).and_then(|()| set_aside(images));
        moved.map_err(|source| DumpError::Aside {
            path: images.to_path_buf(),
            source,
        })?;
        Ok(Aside { images })
    }
}

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        if let Err(error) = settle(self.images) {
            tracing::warn!(%error, "earlier images are aside in {}", self.images.display());
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

fn set_aside(images: &Path) -> io::Result<()> {
    let mut names = names(images)?;
    names.retain(|name| is_image_name(name) || is_seal(name) || name == PARENT_LINK);
    if names.is_empty() {
        return Ok(());
    }
    names.sort_by_key(|name| !is_seal(name));
    let moving = images.join(MOVING);
    fs::create_dir(&moving)?;
    for name in names {
        fs::rename(images.join(&name), moving.join(&name))?;
    }
    // It may be of the earlier dump, or made for the new one by a command of its own.
    let cpu = ImageKind::Cpuinfo.file_name(0);
    if images.join(&cpu).exists() {
        fs::rename(images.join(&cpu), moving.join(&cpu))?;
        fs::copy(moving.join(&cpu), images.join(&cpu))?;
    }
    fs::rename(moving, images.join(BEFORE))
}

/// After the end of an engine that was killed, which left neither the one nor the other.
pub fn settle_after_kill(images: &Path) {
    let is_left = [BEFORE, MOVING]
        .iter()
        .any(|name| images.join(name).exists());
    if !is_left {
        return;
    }
    let settled = match DirLock::take(images) {
        Ok(_ours) => settle(images),
        // The next dump is at it.
        Err(_) => Ok(()),
    };
    if let Err(error) = settled {
        tracing::warn!(%error, "earlier images are aside in {}", images.display());
    }
}

/// Where images are aside: removes them if the new ones are whole, or the rest of those, and brings them back.
fn settle(images: &Path) -> io::Result<()> {
    let [before, moving] = [BEFORE, MOVING].map(|name| images.join(name));
    if before.exists() {
        if images.join(MANIFEST_NAME).exists() {
            return fs::remove_dir_all(before);
        }
        for name in names(images)? {
            if is_image_name(&name) || name == PARENT_LINK {
                fs::remove_file(images.join(name))?;
            }
        }
        fs::rename(&before, &moving)?;
    }
    if !moving.exists() {
        return Ok(());
    }
    let mut names = names(&moving)?;
    names.sort_by_key(|name| is_seal(name));
    for name in names {
        fs::rename(moving.join(&name), images.join(&name))?;
    }
    fs::remove_dir(moving)
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
    fn a_move_that_was_cut_short_is_taken_back() {
        // There and back look the same: of five files any may have moved.
        let all = [
            "core-7.img",
            "cpuinfo.img",
            "floe.json",
            "inventory.img",
            "pages-1.img",
        ];
        for moved in 0..=all.len() {
            let place = tempfile::tempdir().expect("a directory");
            let images = place.path();
            fs::create_dir(images.join(MOVING)).expect("made");
            write(&images.join(MOVING), &all[..moved]);
            write(images, &all[moved..]);
            settle(images).expect("settled");
            assert_eq!(found(images), all, "{moved}");
        }
    }

    #[test]
    fn images_of_a_dump_that_was_never_whole_go_with_the_next() {
        let place = tempfile::tempdir().expect("a directory");
        let images = place.path();
        write(
            images,
            &["core-7.img", "pages-9.img.zst", "my.img", "stats-dump"],
        );
        let aside = Aside::set(images).expect("set aside");
        write(images, &["core-8.img", "floe.json"]);
        drop(aside);
        assert_eq!(
            found(images),
            ["core-8.img", "floe.json", "my.img", "stats-dump"]
        );
    }
}
