//! Where a file that is not in its place seems to be.

use std::path::{Path, PathBuf};

use floe_image::dir::PARENT_LINK;

/// Directories that are looked into, and how deep.
const MOST: usize = 2000;
const DEEPEST: usize = 4;
/// The image that tells a checkpoint of tasks from a pre-dump.
const TASKS: &str = "pstree.img";

/// The directory below, above or beside `start` that holds a file of this name. A pre-dump has some of the
/// same names and cannot be restored, so one with tasks comes first.
pub fn find(start: &Path, name: &str) -> Option<PathBuf> {
    let holds = |directory: &Path| directory.join(name).is_file();
    let with_tasks = |directory: &Path| holds(directory) && directory.join(TASKS).is_file();
    search(start, with_tasks).or_else(|| search(start, holds))
}

/// A directory of this name below, above or beside `start`.
pub fn directory(start: &Path, name: &str) -> Option<PathBuf> {
    if name.is_empty() {
        return None;
    }
    search(start, |directory| {
        directory.file_name().is_some_and(|own| own == name)
    })
}

/// The checkpoint whose link `parent` leads to `start`.
pub fn child_of(start: &Path) -> Option<PathBuf> {
    let start = start.canonicalize().ok()?;
    search(&start, |directory| {
        directory
            .join(PARENT_LINK)
            .canonicalize()
            .is_ok_and(|parent| parent == start)
            && directory.join(TASKS).is_file()
    })
}

/// The nearest directory that fits: first below, then the one above and what is below that.
fn search(start: &Path, fits: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let start = start.canonicalize().ok()?;
    let mut left = MOST;
    if let Some(found) = below(&start, &fits, &mut left) {
        return Some(found);
    }
    let above = start.parent()?;
    above.parent()?;
    if fits(above) {
        return Some(above.to_path_buf());
    }
    below(above, &fits, &mut left).filter(|found| *found != start)
}

/// Breadth first, so that the nearest is found.
fn below(start: &Path, fits: &impl Fn(&Path) -> bool, left: &mut usize) -> Option<PathBuf> {
    let mut level = vec![start.to_path_buf()];
    for _ in 0..DEEPEST {
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
    fn a_checkpoint_of_tasks_is_named_before_a_pre_dump() {
        let place = tempfile::tempdir().expect("a directory");
        let start = place.path().canonicalize().expect("it is there");
        for (directory, names) in [("0", &["i.img"][..]), ("1", &["i.img", TASKS])] {
            std::fs::create_dir(start.join(directory)).expect("writable");
            for name in names {
                std::fs::write(start.join(directory).join(name), "").expect("writable");
            }
        }
        assert_eq!(find(&start, "i.img"), Some(start.join("1")));
        std::fs::remove_file(start.join("1").join("i.img")).expect("it is there");
        assert_eq!(find(&start, "i.img"), Some(start.join("0")));
    }
}
