//! A dump that failed leaves no images.

use std::sync::atomic::Ordering;

use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::{ImageWriter, WriteError};
use crate::dir::PARENT_LINK;
use crate::manifest::{MANIFEST_NAME, MANIFEST_TEMPORARY};

impl ImageWriter {
    /// Removes all that this writer has made; by now nobody may write any more. The first failure is
    /// returned, and the rest removed still.
    pub fn remove_made(&self) -> Result<(), WriteError> {
        let made: Vec<String> = self.files().keys().cloned().collect();
        let link = self.inner.linked.load(Ordering::Relaxed);
        // Without the manifest, what is left should this be cut short does not pass for a dump.
        let names = [MANIFEST_NAME, MANIFEST_TEMPORARY].into_iter();
        let names = names.chain(made.iter().map(String::as_str));
        let mut result = Ok(());
        for name in names.chain(link.then_some(PARENT_LINK)) {
            match rustix::fs::unlinkat(self.as_fd(), name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => {
                    result = result.and(Err(WriteError::Remove {
                        path: self.file_path(name),
                        source: errno.into(),
                    }));
                }
            }
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ImageKind, Sync};

    #[test]
    fn what_was_made_is_removed_and_nothing_else() {
        let place = tempfile::tempdir().expect("a directory");
        let names = || {
            let entries = std::fs::read_dir(place.path()).expect("readable");
            let name = |entry: std::io::Result<std::fs::DirEntry>| {
                entry
                    .expect("readable")
                    .file_name()
                    .into_string()
                    .expect("UTF-8")
            };
            let mut names: Vec<_> = entries.map(name).collect();
            names.sort();
            names
        };
        std::fs::write(place.path().join("dump.log"), "x").expect("writable");
        std::fs::write(place.path().join("core-7.img"), "of another").expect("writable");
        let writer = ImageWriter::create(place.path(), Sync::None).expect("writable");
        writer.link_parent("../before".as_ref()).expect("a link");
        writer.create_raw(ImageKind::Pages, 1).expect("a file");
        assert_eq!(names().len(), 4);
        writer.remove_made().expect("removed");
        assert_eq!(names(), ["core-7.img", "dump.log"]);
    }

    #[test]
    fn a_writer_to_nowhere_takes_entries_and_makes_no_file() {
        let writer = ImageWriter::nowhere().expect("opened");
        let entry = crate::messages::InventoryEntry::default();
        writer
            .write_one(ImageKind::Inventory, 0, &entry)
            .expect("taken");
        assert!(writer.create_raw(ImageKind::Pages, 1).is_err());
    }
}
