//! A dump that failed leaves no images, and one that is whole none of an earlier one.

use std::sync::atomic::Ordering;

use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::{ImageWriter, WriteError};
use crate::catalogue::is_image_name;
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

    /// Removes the images of an earlier dump into this directory that this one has none in place of, such as those of
    /// another pid: they would pass for a part of it.
    pub fn remove_earlier(&self) -> Result<(), WriteError> {
        let failed = |name: &str, errno: Errno| WriteError::Remove {
            path: self.file_path(name),
            source: errno.into(),
        };
        let entries =
            rustix::fs::Dir::read_from(self.as_fd()).map_err(|errno| failed("", errno))?;
        for entry in entries {
            let entry = entry.map_err(|errno| failed("", errno))?;
            let Ok(name) = entry.file_name().to_str() else {
                continue;
            };
            if is_image_name(name) && !self.files().contains_key(name) {
                let removed = rustix::fs::unlinkat(self.as_fd(), name, AtFlags::empty());
                removed.map_err(|errno| failed(name, errno))?;
            }
        }
        Ok(())
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
    fn images_of_an_earlier_dump_go_and_nothing_else() {
        let place = tempfile::tempdir().expect("a directory");
        let earlier = ["core-7.img", "pages-9.img.zst", "pagemap-7.img"];
        let others = [
            "cpuinfo.img",
            "dump.log",
            "stats-dump",
            "my.img",
            "pages-1.img",
        ];
        for name in earlier.iter().chain(&others) {
            std::fs::write(place.path().join(name), "x").expect("writable");
        }
        let writer = ImageWriter::create(place.path(), Sync::None).expect("writable");
        writer.create_raw(ImageKind::Pages, 1).expect("a file");
        writer.remove_earlier().expect("removed");
        for (names, there) in [(&earlier[..], false), (&others[..], true)] {
            for name in names {
                assert_eq!(place.path().join(name).exists(), there, "{name}");
            }
        }
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
