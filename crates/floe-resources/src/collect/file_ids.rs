//! Which descriptors share an open file description.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use floe_kernel::ids::{HostPid, TaskFd};
use floe_kernel::kcmp::compare_files;

/// The number of a file in the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// A descriptor of a task, and our duplicate of it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub at: (HostPid, TaskFd),
    pub own: Rc<OwnedFd>,
}

/// Where a description was seen first, and what it was taken for.
#[derive(Debug)]
struct Known {
    at: (HostPid, TaskFd),
    /// Our duplicate: to compare our own descriptors the kernel need not ask whether we may.
    own: Option<Rc<OwnedFd>>,
    id: FileId,
    kind: i32,
}

impl Known {
    fn compare(&self, us: HostPid, seen: &Seen) -> io::Result<Ordering> {
        match &self.own {
            Some(own) => {
                let ours = |fd: &OwnedFd| (us, TaskFd(fd.as_raw_fd()));
                compare_files(ours(own), ours(&seen.own))
            }
            None => compare_files(self.at, seen.at),
        }
    }
}

/// What cannot differ between descriptors of one description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DescriptionKey {
    pub dev: u64,
    pub ino: u64,
    pub flags: u32,
    /// The number of an event counter; 0 for others. All counters have one inode.
    pub counter: u64,
}

/// Gives every open file description one number.
#[derive(Debug)]
pub struct FileIds {
    last: u32,
    us: HostPid,
    /// How many more duplicates may be kept open.
    room: usize,
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

impl Default for FileIds {
    fn default() -> Self {
        FileIds {
            last: 0,
            us: HostPid(std::process::id().cast_signed()),
            room: make_room_for_descriptors(),
            descriptions: HashMap::new(),
            paths: HashMap::new(),
        }
    }
}

/// How many descriptors can be open beside what else a dump needs. The soft limit, which is for programs
/// that use `select`, is raised. To be called first while there is one thread only.
pub fn make_room_for_descriptors() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const OTHERS: u64 = 512;
    const MOST: u64 = 1 << 16;
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(MOST, |maximum| maximum.min(MOST));
    let raised = Rlimit {
        current: Some(wanted.max(limit.current.unwrap_or(wanted))),
        maximum: limit.maximum,
    };
    let now = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => wanted,
        Err(_) => limit.current.unwrap_or(MOST),
    };
    widen_table(now);
    now.saturating_sub(OTHERS) as usize
}

/// Makes our table of descriptors large at once: to make it larger step by step, the kernel waits each
/// time until no other thread can be looking at the old one, which takes milliseconds.
fn widen_table(limit: u64) {
    const WIDE: u64 = 8192;
    let high = limit.min(WIDE).saturating_sub(1) as i32;
    let anything = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC);
    // Without it the dump is slower, no more.
    let _ = anything.and_then(|fd| rustix::io::fcntl_dupfd_cloexec(&fd, high));
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
    pub fn identify(&mut self, key: DescriptionKey, seen: &Seen) -> io::Result<Identity> {
        let bucket = self.descriptions.entry(key).or_default();
        let (mut low, mut high) = (0, bucket.len());
        while low < high {
            let middle = low.midpoint(high);
            match bucket[middle].compare(self.us, seen)? {
                Ordering::Equal => {
                    return Ok(Identity::Shared(bucket[middle].id, bucket[middle].kind));
                }
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        self.last += 1;
        let id = FileId(self.last);
        let known = Known {
            at: seen.at,
            own: (self.room > 0).then(|| Rc::clone(&seen.own)),
            id,
            kind: 0,
        };
        self.room = self.room.saturating_sub(1);
        bucket.insert(low, known);
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
        let files: Vec<OwnedFd> = (0..5)
            .map(|_| std::fs::File::open("/dev/null").expect("opens").into())
            .collect();
        let copies = files.iter().map(|file| file.try_clone().expect("dup"));
        let copies: Vec<OwnedFd> = copies.collect();
        let key = DescriptionKey {
            dev: 1,
            ino: 1,
            flags: 0,
            counter: 0,
        };
        let seen = |file: &OwnedFd| Seen {
            at: (me, TaskFd(file.as_raw_fd())),
            own: Rc::new(file.try_clone().expect("dup")),
        };
        for room in [0, 3, 100] {
            let mut ids = FileIds {
                room,
                ..FileIds::default()
            };
            let mut numbers = Vec::new();
            for file in &files {
                match ids.identify(key, &seen(file)).expect("kcmp") {
                    Identity::New(id) => {
                        ids.set_kind(key, id, 7);
                        numbers.push(id);
                    }
                    Identity::Shared(..) => panic!("opened separately"),
                }
            }
            for (copy, id) in copies.iter().zip(&numbers) {
                let found = ids.identify(key, &seen(copy)).expect("kcmp");
                assert_eq!(found, Identity::Shared(*id, 7));
            }
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
