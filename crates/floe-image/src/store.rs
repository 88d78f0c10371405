//! Where images can lie but in a directory.

use std::fs::File;
use std::io;

use crate::{ImageDir, PagesReader};

/// Images that are no files of a directory, such as those in an archive.
pub trait ImageStore: std::fmt::Debug + Send + Sync {
    /// Names of all files.
    fn names(&self) -> Vec<String>;
    /// A file other than one of pages, to be read from its beginning; `None` when it is absent.
    fn open(&self, name: &str) -> io::Result<Option<File>>;
    /// The content of any file where it lies; `None` when it is absent.
    fn pages(&self, name: &str) -> io::Result<Option<PagesReader>>;
    /// Length of a file in bytes; `None` when it is absent.
    fn size(&self, name: &str) -> Option<u64>;
    /// What these images build on.
    fn parent(&self) -> Option<ImageDir>;
    /// Whether pages come by once, in their order: here or in what these images build on.
    fn passes_by(&self) -> bool;
    /// Reads what is left of images that pass by, and checks what could not be checked before.
    fn check_rest(&self) -> io::Result<()>;
}
