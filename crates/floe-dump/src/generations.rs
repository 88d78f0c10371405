//! The directories of rounds, `generations/N` in the images directory.
//!
//! There may be some of an earlier dump into the same directory, which stays good until this one is: new
//! rounds are numbered on. If this dump fails, its own go again; if not, those that it replaces do.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use floe_image::dir::{GENERATIONS, PARENT_LINK};
use floe_image::manifest::MANIFEST_NAME;

use crate::dir_lock::DirLock;
use crate::error::DumpError;

/// The rounds of one dump.
#[derive(Debug)]
pub struct Generations {
    images: PathBuf,
    /// Number of the directory of the first round.
    first: u32,
    made: u32,
    /// From the first round on.
    lock: Option<DirLock>,
}

impl Generations {
    /// Those of a dump into `images` that has made none yet.
    pub fn begin(images: &Path) -> Self {
        let highest = numbers(images).into_iter().max();
        Generations {
            images: images.to_path_buf(),
            first: highest.map_or(0, |number| number.saturating_add(1)),
            made: 0,
            lock: None,
        }
    }

    /// Makes the directory of the next round.
    pub fn make(&mut self) -> Result<PathBuf, DumpError> {
        let path = self.path(self.first.saturating_add(self.made));
        if self.lock.is_none() {
            self.lock = Some(DirLock::take(&self.images.join(GENERATIONS))?);
        }
        let made = fs::create_dir_all(&path);
        made.map_err(|source| DumpError::Generation {
            path: path.clone(),
            source,
        })?;
        self.made += 1;
        Ok(path)
    }

    /// The newest round, as seen from the images directory.
    pub fn newest(&self) -> Option<PathBuf> {
        let number = self.first + self.made.checked_sub(1)?;
        Some(Path::new(GENERATIONS).join(number.to_string()))
    }

    /// The round before the newest, as seen from that.
    pub fn before_newest(&self) -> Option<PathBuf> {
        let number = self.first + self.made.checked_sub(2)?;
        Some(Path::new("..").join(number.to_string()))
    }

    /// Whether the images that build on the rounds are whole.
    pub fn are_used(&self) -> bool {
        self.images.join(MANIFEST_NAME).exists() && self.linked().is_some()
    }

    /// The number of the round that the images link to, if it is of this dump.
    fn linked(&self) -> Option<u32> {
        let link = fs::read_link(self.images.join(PARENT_LINK)).ok()?;
        let name = link.strip_prefix(GENERATIONS).ok()?;
        let number = name.to_str()?.parse().ok()?;
        (number >= self.first).then_some(number)
    }

    /// Removes the rounds of this dump, and a link that leads to them.
    pub fn remove(&self) {
        if self.linked().is_some() {
            // It leads nowhere in a moment.
            let _ = fs::remove_file(self.images.join(PARENT_LINK));
        }
        self.remove_all(|number| number >= self.first);
    }

    /// Removes the rounds of earlier dumps.
    pub fn remove_earlier(&self) {
        self.remove_all(|number| number < self.first);
    }

    /// A dump that builds on none is whole: removes the rounds that others have left.
    pub fn remove_unused(images: &Path) {
        if fs::read_link(images.join(PARENT_LINK)).is_err() {
            Generations::begin(images).remove_earlier();
        }
    }

    /// Removes rounds, unless a dump is at work that they may belong to.
    fn remove_all(&self, which: impl Fn(u32) -> bool) {
        let rounds = self.images.join(GENERATIONS);
        let taken = self.lock.is_none() && rounds.is_dir();
        let Ok(_ours) = taken.then(|| DirLock::take(&rounds)).transpose() else {
            return;
        };
        for number in numbers(&self.images).into_iter().filter(|n| which(*n)) {
            let path = self.path(number);
            if let Err(error) = fs::remove_dir_all(&path) {
                tracing::warn!(%error, path = %path.display(), "a round that nobody needs stays");
            }
        }
        match fs::remove_dir(rounds) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // There are others.
            Err(error) => tracing::debug!(%error, "the directory of rounds stays"),
        }
    }

    fn path(&self, number: u32) -> PathBuf {
        self.images.join(GENERATIONS).join(number.to_string())
    }
}

/// Numbers of the rounds that are there.
fn numbers(images: &Path) -> Vec<u32> {
    let entries = fs::read_dir(images.join(GENERATIONS)).into_iter();
    let names = entries.flatten().flatten().map(|entry| entry.file_name());
    names
        .filter_map(|name| name.to_str()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_numbered_on_and_only_those_of_one_side_are_removed() {
        let place = tempfile::tempdir().expect("a directory");
        let mut earlier = Generations::begin(place.path());
        assert_eq!(earlier.newest(), None);
        earlier.make().expect("made");
        let other = Generations::begin(place.path()).make();
        assert!(other.is_err(), "both would make the same round");
        drop(earlier);
        let mut now = Generations::begin(place.path());
        for _ in 0..2 {
            now.make().expect("made");
        }
        assert_eq!(now.newest(), Some("generations/2".into()));
        assert_eq!(now.before_newest(), Some("../1".into()));
        now.remove();
        assert_eq!(numbers(place.path()), [0]);
        drop(now);
        Generations::begin(place.path()).remove_earlier();
        assert!(!place.path().join(GENERATIONS).exists());
    }
}
