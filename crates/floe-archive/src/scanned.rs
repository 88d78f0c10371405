//! An archive that has come through a pipe: its images are there, of its pages only their hashes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::sync::Arc;

use floe_image::{ImageDir, ImageStore, PagesReader, PassingPages};

use crate::held::HeldFiles;
use crate::stream::EarlyPages;

/// The images of a stream that was read to its end.
#[derive(Debug)]
pub(crate) struct ScannedImages {
    pub(crate) images: HeldFiles,
    /// Names of the files of pages.
    pub(crate) pages: BTreeSet<String>,
    /// Size and hash of every file.
    pub(crate) found: BTreeMap<String, (u64, blake3::Hash)>,
    pub(crate) early: Arc<EarlyPages>,
}

impl ImageStore for ScannedImages {
    fn names(&self) -> Vec<String> {
        self.found.keys().cloned().collect()
    }

    fn open(&self, name: &str) -> io::Result<Option<File>> {
        self.images.open(name)
    }

    fn pages(&self, name: &str) -> io::Result<Option<PagesReader>> {
        let found = self.found.get(name).filter(|_| self.pages.contains(name));
        let Some((size, hash)) = found else {
            return Ok(self.open(name)?.map(PagesReader::Plain));
        };
        Ok(Some(PagesReader::Passing(Arc::new(PassedFile {
            name: name.to_owned(),
            size: *size,
            hash: *hash,
            early: self.early.clone(),
        }))))
    }

    fn size(&self, name: &str) -> Option<u64> {
        Some(self.found.get(name)?.0)
    }

    fn parent(&self) -> Option<ImageDir> {
        None
    }

    fn passes_by(&self) -> bool {
        true
    }

    fn check_rest(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A file of pages that has passed: what is left are its hash and the pages that came first.
#[derive(Debug)]
struct PassedFile {
    name: String,
    size: u64,
    hash: blake3::Hash,
    early: Arc<EarlyPages>,
}

impl PassingPages for PassedFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match self.early.read(&self.name, buffer, offset) {
            true => Ok(()),
            false => Err(io::Error::other("the pages of a stream are not kept")),
        }
    }

    fn known_hash(&self) -> Option<blake3::Hash> {
        Some(self.hash)
    }
}
