//! Bookkeeping for "every image entry is consumed exactly once".

use std::collections::BTreeMap;
use std::fmt;

/// An entry of an image: the image's name and the entry's own id in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryKey {
    /// The image, without its directory: `files.img`.
    pub image: &'static str,
    /// The entry's id.
    pub id: u64,
}

impl fmt::Display for EntryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "entry {:#x} of {}", self.id, self.image)
    }
}

/// Which entries there are, and how often each was consumed.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    entries: BTreeMap<EntryKey, u32>,
}

impl Coverage {
    /// Notes that the images hold this entry.
    pub fn expect(&mut self, entry: EntryKey) {
        self.entries.entry(entry).or_insert(0);
    }

    /// Notes that the plan takes care of this entry.
    pub fn consume(&mut self, entry: EntryKey) {
        *self.entries.entry(entry).or_insert(0) += 1;
    }

    /// Entries that nobody consumed, or more than one did.
    pub fn faults(&self) -> Vec<(EntryKey, u32)> {
        self.entries
            .iter()
            .filter(|(_, times)| **times != 1)
            .map(|(entry, times)| (*entry, *times))
            .collect()
    }
}
