//! Images that came through a pipe, until they are read: small ones in memory, large ones (deleted files,
//! the content of a tmpfs) in files without a name.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{MemfdFlags, Mode, OFlags};

/// Larger images are not held in memory, in bytes.
const SMALL: u64 = 1 << 20;
/// Where files without a name are made: on a disk before elsewhere.
const PLACES: &[&str] = &["/var/tmp", "/tmp"];

/// Makes files without a name; opened early, as later the names may be those of a container.
#[derive(Debug)]
pub(crate) struct Scratch(Vec<OwnedFd>);

impl Scratch {
    pub(crate) fn open() -> Scratch {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |place: &&str| rustix::fs::open(*place, flags, Mode::empty()).ok();
        Scratch(PLACES.iter().filter_map(open).collect())
    }

    /// A file for `size` bytes, readable by nobody else; in memory if it is small, or there is no place.
    pub(crate) fn file(&self, size: u64) -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let make = |place: &OwnedFd| rustix::fs::openat(place, ".", flags, Mode::RUSR | Mode::WUSR);
        let made = (size > SMALL).then(|| self.0.iter().find_map(|place| make(place).ok()));
        match made.flatten() {
            Some(fd) => Ok(File::from(fd)),
            None => {
                let made = rustix::fs::memfd_create("floe-image", MemfdFlags::CLOEXEC)?;
                Ok(File::from(made))
            }
        }
    }

    /// All that a source has: in memory up to so many bytes, and elsewhere if it is more.
    pub(crate) fn keep(&self, mut source: impl Read, in_memory: u64) -> io::Result<File> {
        let mut file = self.file(0)?;
        let held = io::copy(&mut source.by_ref().take(in_memory), &mut file)?;
        if held < in_memory {
            return Ok(file);
        }
        file.seek(SeekFrom::Start(0))?;
        let mut larger = self.file(u64::MAX)?;
        io::copy(&mut file.chain(source), &mut larger)?;
        Ok(larger)
    }
}

#[derive(Debug)]
enum Place {
    Memory(Range<usize>),
    File(File, u64),
}

/// Files by their names.
#[derive(Debug)]
pub(crate) struct HeldFiles {
    scratch: Scratch,
    small: Vec<u8>,
    places: BTreeMap<String, Place>,
    /// The one that is being written.
    open: Option<String>,
}

impl HeldFiles {
    pub(crate) fn new() -> HeldFiles {
        HeldFiles {
            scratch: Scratch::open(),
            small: Vec::new(),
            places: BTreeMap::new(),
            open: None,
        }
    }

    /// Begins a file of `size` bytes.
    pub(crate) fn begin(&mut self, name: String, size: u64) -> io::Result<()> {
        let end = self.small.len();
        let place = match size <= SMALL {
            true => Place::Memory(end..end),
            false => Place::File(self.scratch.file(size)?, 0),
        };
        self.places.insert(name.clone(), place);
        self.open = Some(name);
        Ok(())
    }

    /// Adds to the file that was begun last.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let place = self
            .open
            .as_ref()
            .and_then(|name| self.places.get_mut(name));
        match place {
            Some(Place::Memory(range)) => {
                self.small.extend_from_slice(bytes);
                range.end = self.small.len();
            }
            Some(Place::File(file, size)) => {
                file.write_all(bytes)?;
                *size += bytes.len() as u64;
            }
            None => {}
        }
        Ok(())
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        self.places.keys()
    }

    pub(crate) fn size(&self, name: &str) -> Option<u64> {
        Some(match self.places.get(name)? {
            Place::Memory(range) => range.len() as u64,
            Place::File(_, size) => *size,
        })
    }

    /// A file with a place of its own, at its beginning.
    pub(crate) fn open(&self, name: &str) -> io::Result<Option<File>> {
        Ok(match self.places.get(name) {
            None => None,
            Some(Place::Memory(range)) => {
                let mut file = self.scratch.file(0)?;
                file.write_all(&self.small[range.clone()])?;
                file.seek(SeekFrom::Start(0))?;
                Some(file)
            }
            // Opened anew, as a duplicate would share its place.
            Some(Place::File(file, _)) => {
                Some(File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_kept_whole_wherever_it_goes() {
        let all: Vec<u8> = (0..3_000_000u32).map(|at| (at % 251) as u8).collect();
        for in_memory in [0, 1_000_000, 3_000_000, 4_000_000] {
            let kept = Scratch::open().keep(all.as_slice(), in_memory);
            let mut kept = kept.expect("there is room");
            let mut bytes = Vec::new();
            kept.seek(SeekFrom::Start(0)).expect("a file");
            kept.read_to_end(&mut bytes).expect("read");
            assert!(bytes == all, "{in_memory}");
        }
    }

    #[test]
    fn files_of_every_size_are_read_as_they_were_written() {
        let mut held = HeldFiles::new();
        let sizes = [0, 5, SMALL, SMALL + 1, 3 * SMALL];
        for (number, size) in sizes.iter().enumerate() {
            held.begin(number.to_string(), *size).expect("begun");
            for part in vec![number as u8; *size as usize].chunks(700_000) {
                held.append(part).expect("appended");
            }
        }
        for (number, size) in sizes.iter().enumerate() {
            let name = number.to_string();
            assert_eq!(held.size(&name), Some(*size));
            for _ in 0..2 {
                let mut bytes = Vec::new();
                let mut file = held.open(&name).expect("opened").expect("there");
                file.read_to_end(&mut bytes).expect("read");
                assert!(bytes == vec![number as u8; *size as usize]);
            }
        }
        assert!(held.open("other").expect("no error").is_none());
    }
}
