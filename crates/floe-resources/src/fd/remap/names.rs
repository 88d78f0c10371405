//! Temporary names: links, directories and nodes that are gone when the restore is done.

use std::cell::RefCell;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use floe_kernel::janitor::{Janitor, NameKind};
use rustix::fs::Mode;
use rustix::io::Errno;

use crate::mount::Place;

/// Names that were made, last one last. Clones are the same list.
#[derive(Clone, Debug, Default)]
pub struct TemporaryNames {
    made: Rc<RefCell<Vec<(NameKind, PathBuf)>>>,
    /// Removes them should we be killed.
    janitor: Option<Rc<Janitor>>,
}

/// Names that a dump has given, taken back when it is dropped.
#[derive(Debug, Default)]
pub struct HeldNames(Vec<(Place, PathBuf)>);

impl HeldNames {
    /// Takes over a name.
    pub(super) fn adopt(&mut self, path: &Path, place: &Place) {
        self.0.push((place.clone(), path.to_path_buf()));
    }

    /// Leaves the names for restore to find.
    pub fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for HeldNames {
    fn drop(&mut self) {
        while let Some((place, path)) = self.0.pop() {
            let removed = place
                .visit()
                .and_then(|_visit| Ok(rustix::fs::unlink(&path)?));
            if let Err(error) = removed {
                tracing::warn!(%error, path = %path.display(), "a temporary name could not be removed");
            }
        }
    }
}

/// How many other names are tried when one is taken.
const ATTEMPTS: u32 = 100;

impl TemporaryNames {
    /// A list whose names go as well when this process is killed.
    pub fn watched(janitor: Option<Rc<Janitor>>) -> Self {
        TemporaryNames {
            janitor,
            ..TemporaryNames::default()
        }
    }

    /// An empty list that the same janitor watches.
    pub fn another(&self) -> Self {
        TemporaryNames::watched(self.janitor.clone())
    }

    /// Takes over a name that exists already.
    pub fn adopt(&self, path: &Path) {
        self.note(NameKind::File, path);
    }

    /// Runs `make` on `path`, or where that is taken on `path` with something added; missing parents
    /// are made for the time being. Returns the name.
    pub fn make_file(
        &self,
        path: &Path,
        make: impl Fn(&Path) -> Result<(), Errno>,
    ) -> Result<PathBuf, Errno> {
        let name = self.make(path, make)?;
        self.note(NameKind::File, &name);
        Ok(name)
    }

    /// As [`TemporaryNames::make_file`], for a directory.
    pub fn make_directory(&self, path: &Path, mode: Mode) -> Result<PathBuf, Errno> {
        let name = self.make(path, |path| rustix::fs::mkdir(path, mode))?;
        self.note(NameKind::Directory, &name);
        Ok(name)
    }

    /// Removes all names, last made first; the first failure is returned, and the rest removed still.
    pub fn remove(&self) -> Result<(), Errno> {
        let mut result = Ok(());
        while let Some((kind, path)) = self.made.borrow_mut().pop() {
            let removed = match kind {
                NameKind::File => rustix::fs::unlink(path),
                NameKind::Directory | NameKind::SharedMemory => rustix::fs::rmdir(path),
            };
            match removed {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => result = result.and(Err(errno)),
            }
        }
        result
    }

    /// As [`TemporaryNames::remove`], where nobody is left to tell but the log.
    pub fn remove_quietly(&self) {
        if let Err(errno) = self.remove() {
            tracing::warn!(%errno, "a temporary name could not be removed");
        }
    }

    fn note(&self, kind: NameKind, path: &Path) {
        if let Some(janitor) = &self.janitor
            && let Err(error) = janitor.note(kind, path)
        {
            tracing::warn!(%error, path = %path.display(), "the janitor does not know of a name");
        }
        self.made.borrow_mut().push((kind, path.to_path_buf()));
    }

    fn make(
        &self,
        path: &Path,
        make: impl Fn(&Path) -> Result<(), Errno>,
    ) -> Result<PathBuf, Errno> {
        let mut name = path.to_path_buf();
        for attempt in 0..ATTEMPTS {
            match make(&name) {
                Ok(()) => return Ok(name),
                Err(Errno::NOENT) => self.make_parents(path)?,
                Err(Errno::EXIST) => name = with_suffix(path, attempt),
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::EXIST)
    }

    fn make_parents(&self, path: &Path) -> Result<(), Errno> {
        let missing: Vec<&Path> = path
            .ancestors()
            .skip(1)
            .take_while(|parent| rustix::fs::stat(*parent).err() == Some(Errno::NOENT))
            .collect();
        if missing.is_empty() {
            return Err(Errno::NOENT);
        }
        for parent in missing.into_iter().rev() {
            rustix::fs::mkdir(parent, Mode::from_raw_mode(0o700))?;
            self.note(NameKind::Directory, parent);
        }
        Ok(())
    }
}

fn with_suffix(path: &Path, attempt: u32) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".cr_link");
    if attempt > 0 {
        name.push(attempt.to_string());
    }
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_parents_come_and_go() {
        let dir = std::env::temp_dir().join(format!("floe-names-{}", std::process::id()));
        std::fs::create_dir(&dir).expect("a directory");
        let names = TemporaryNames::default();
        let make = |path: &Path| {
            rustix::fs::mkdir(path, Mode::RWXU)?;
            rustix::fs::rmdir(path)?;
            rustix::fs::symlink("nowhere", path)
        };
        let wanted = dir.join("a/b/c");
        assert_eq!(names.make_file(&wanted, make), Ok(wanted.clone()));
        let second = names.make_file(&wanted, make).expect("another name");
        assert_eq!(second, dir.join("a/b/c.cr_link"));
        names.remove().expect("removed");
        assert!(!dir.join("a").exists());
        std::fs::remove_dir(&dir).expect("empty again");
    }
}
