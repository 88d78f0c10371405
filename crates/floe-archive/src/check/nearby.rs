//! Where a file that is not in its place seems to be.

use std::path::{Path, PathBuf};

use floe_image::dir::PARENT_LINK;
use floe_image::manifest::{Manifest, ManifestFile};
use floe_image::messages::InventoryEntry;
use floe_image::{ImageDir, ImageKind};

/// Directories that are looked into, and how deep.
const MOST: usize = 2000;
const DEEPEST: usize = 4;
/// The image that tells a checkpoint of tasks from a pre-dump.
const TASKS: &str = "pstree.img";

/// A checkpoint of tasks below, above or just beside `start`: what is further away is somebody else's.
pub fn checkpoint(start: &Path) -> Option<PathBuf> {
    search(start, 1, is_checkpoint)
}

fn is_checkpoint(directory: &Path) -> bool {
    let inventory = ImageDir::open(directory)
        .and_then(|dir| dir.read_one::<InventoryEntry>(ImageKind::Inventory, 0));
    inventory.is_ok() && directory.join(TASKS).is_file()
}

/// The directory below, above or beside `start` that holds this very file: images of another checkpoint have
/// the same names.
pub fn holder(start: &Path, name: &str, listed: &ManifestFile) -> Option<PathBuf> {
    search(start, DEEPEST, |directory| {
        is_same(&directory.join(name), listed)
    })
}

fn is_same(path: &Path, listed: &ManifestFile) -> bool {
    let found = std::fs::metadata(path);
    if !found.is_ok_and(|found| found.is_file() && found.len() == listed.size) {
        return false;
    }
    let Some(wanted) = &listed.blake3 else {
        return true;
    };
    let mut hasher = blake3::Hasher::new();
    let hashed = std::fs::File::open(path).and_then(|file| {
        hasher.update_reader(file)?;
        Ok(())
    });
    hashed.is_ok() && hasher.finalize().to_hex().as_str() == wanted
}

/// A generation with this number and a checkpoint's index of pages below, above or beside `start`, under the
/// name that it had.
pub fn generation(start: &Path, name: &str, number: u32) -> Option<PathBuf> {
    search(start, DEEPEST, |directory| {
        let named = directory.file_name().is_some_and(|own| own == name);
        let manifest = || Manifest::read(&ImageDir::open(directory).ok()?).ok()?;
        named && manifest().is_some_and(|manifest| manifest.generation == number)
    })
}

/// The checkpoint whose link `parent` leads to `start`.
pub fn child_of(start: &Path) -> Option<PathBuf> {
    let start = start.canonicalize().ok()?;
    search(&start, DEEPEST, |directory| {
        directory
            .join(PARENT_LINK)
            .canonicalize()
            .is_ok_and(|parent| parent == start)
            && directory.join(TASKS).is_file()
    })
}

/// The nearest directory that fits: first below, then the one above and what is below that, so many levels deep.
fn search(start: &Path, beside: usize, fits: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let start = start.canonicalize().ok()?;
    let mut left = MOST;
    if let Some(found) = below(&start, DEEPEST, (&fits, &mut left)) {
        return Some(found);
    }
    let above = start.parent()?;
    above.parent()?;
    if fits(above) {
        return Some(above.to_path_buf());
    }
    below(above, beside, (&fits, &mut left)).filter(|found| *found != start)
}

/// Breadth first, so that the nearest is found.
fn below(
    start: &Path,
    levels: usize,
    (fits, left): (&impl Fn(&Path) -> bool, &mut usize),
) -> Option<PathBuf> {
    let mut level = vec![start.to_path_buf()];
    for _ in 0..levels {
        let mut next = Vec::new();
        for directory in level {
            let entries = std::fs::read_dir(&directory)
                .into_iter()
                .flatten()
                .flatten();
            // Links are not followed: `parent` would lead around the chain.
            let inside = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            for entry in inside {
                if *left == 0 {
                    return None;
                }
                *left -= 1;
                next.push(entry.path());
            }
        }
        next.sort();
        if let Some(found) = next.iter().find(|directory| fits(directory)) {
            return Some(found.clone());
        }
        level = next;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_found_by_its_content() {
        let place = tempfile::tempdir().expect("a directory");
        let start = place.path().canonicalize().expect("it is there");
        for (directory, content) in [("0", "other"), ("1", "saved")] {
            std::fs::create_dir(start.join(directory)).expect("writable");
            std::fs::write(start.join(directory).join("mm-7.img"), content).expect("writable");
        }
        let listed = ManifestFile {
            size: 5,
            blake3: Some(blake3::hash(b"saved").to_hex().to_string()),
        };
        assert_eq!(holder(&start, "mm-7.img", &listed), Some(start.join("1")));
        std::fs::remove_file(start.join("1/mm-7.img")).expect("it is there");
        assert_eq!(holder(&start, "mm-7.img", &listed), None);
    }

    #[test]
    fn a_directory_with_the_name_of_an_inventory_is_no_checkpoint() {
        let place = tempfile::tempdir().expect("a directory");
        let start = place.path().join("one");
        std::fs::create_dir_all(start.join("0")).expect("writable");
        for name in ["inventory.img", TASKS] {
            std::fs::write(start.join("0").join(name), "").expect("writable");
        }
        assert_eq!(checkpoint(&start), None);
    }
}
