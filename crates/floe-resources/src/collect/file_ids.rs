//! Which descriptors share an open file description.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::io;

use floe_kernel::ids::{HostPid, TaskFd};
use floe_kernel::kcmp::compare_files;

/// The number of a file in the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// Where a description was seen first, and what it was taken for.
#[derive(Clone, Copy, Debug)]
struct Known {
    at: (HostPid, TaskFd),
    id: FileId,
    kind: i32,
}

/// What cannot differ between descriptors of one description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DescriptionKey {
    pub dev: u64,
    pub ino: u64,
    pub flags: u32,
}

/// Gives every open file description one number.
#[derive(Debug, Default)]
pub struct FileIds {
    last: u32,
    /// Each bucket is sorted by the order of kcmp, so that many opens of one file stay cheap.
    descriptions: HashMap<DescriptionKey, Vec<Known>>,
    /// Files that tasks refer to without a descriptor, by device, inode and mount.
    paths: HashMap<(u64, u64, u64), FileId>,
}

/// What is known of a description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// Never seen.
    New(FileId),
    /// Seen, with the type (`fd_types`) of its entry.
    Shared(FileId, i32),
}

impl FileIds {
    /// A number that nothing else has.
    pub fn fresh(&mut self) -> FileId {
        self.last += 1;
        FileId(self.last)
    }

    /// The number of the description behind a descriptor.
    ///
    /// # Errors
    /// Those of `kcmp(2)`.
    pub fn identify(&mut self, key: DescriptionKey, at: (HostPid, TaskFd)) -> io::Result<Identity> {
        let bucket = self.descriptions.entry(key).or_default();
        let (mut low, mut high) = (0, bucket.len());
        while low < high {
            let middle = low.midpoint(high);
            match compare_files(bucket[middle].at, at)? {
                Ordering::Equal => {
                    return Ok(Identity::Shared(bucket[middle].id, bucket[middle].kind));
                }
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        self.last += 1;
        let id = FileId(self.last);
        bucket.insert(low, Known { at, id, kind: 0 });
        Ok(Identity::New(id))
    }

    /// Remembers what a new description was taken for.
    pub fn set_kind(&mut self, key: DescriptionKey, id: FileId, kind: i32) {
        let known = self
            .descriptions
            .get_mut(&key)
            .and_then(|bucket| bucket.iter_mut().find(|known| known.id == id));
        if let Some(known) = known {
            known.kind = kind;
        }
    }

    /// The number of a file that is known by device, inode and mount; true when it is new.
    pub fn of_path(&mut self, dev: u64, ino: u64, mount: u64) -> (FileId, bool) {
        let next = FileId(self.last + 1);
        let id = *self.paths.entry((dev, ino, mount)).or_insert(next);
        self.last = self.last.max(id.0);
        (id, id == next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn duplicates_share_a_number_and_separate_opens_do_not() {
        let me = HostPid(std::process::id().cast_signed());
        let files: Vec<_> = (0..5)
            .map(|_| std::fs::File::open("/dev/null").expect("opens"))
            .collect();
        let copies: Vec<_> = files
            .iter()
            .map(|file| file.try_clone().expect("dup"))
            .collect();
        let key = DescriptionKey {
            dev: 1,
            ino: 1,
            flags: 0,
        };
        let mut ids = FileIds::default();
        let mut seen = Vec::new();
        for file in &files {
            match ids
                .identify(key, (me, TaskFd(file.as_raw_fd())))
                .expect("kcmp")
            {
                Identity::New(id) => {
                    ids.set_kind(key, id, 7);
                    seen.push(id);
                }
                Identity::Shared(..) => panic!("opened separately"),
            }
        }
        for (copy, id) in copies.iter().zip(&seen) {
            assert_eq!(
                ids.identify(key, (me, TaskFd(copy.as_raw_fd())))
                    .expect("kcmp"),
                Identity::Shared(*id, 7)
            );
        }
    }

    #[test]
    fn a_path_keeps_its_number() {
        let mut ids = FileIds::default();
        let (first, new) = ids.of_path(1, 2, 3);
        assert!(new);
        assert_eq!(ids.of_path(1, 2, 3), (first, false));
        assert_ne!(ids.of_path(1, 2, 4).0, first);
        assert_ne!(ids.fresh(), first);
    }
}
