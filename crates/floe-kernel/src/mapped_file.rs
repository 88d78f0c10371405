//! Files and shared memory that are read through a mapping: comparing them copies nothing.
//!
//! Contract relied on: a shared mapping shows the pages that the file has now, whoever writes them
//! (mmap(2)); touching one past the end of the file is SIGBUS, so callers map what does not get shorter.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use crate::ids::PAGE_SIZE;

/// A file, mapped for reading from its beginning.
#[derive(Debug)]
pub struct MappedFile {
    start: *mut libc::c_void,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only read.
unsafe impl Send for MappedFile {}
// SAFETY: as above; no method hands out a reference into it.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// Maps `len` bytes, rounded up to whole pages; `EINVAL` for none.
    pub fn of(file: impl AsFd, len: u64) -> io::Result<MappedFile> {
        let len = len.next_multiple_of(PAGE_SIZE) as usize;
        let fd = file.as_fd().as_raw_fd();
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(MappedFile { start, len })
    }

    /// Bytes that are mapped.
    pub fn size(&self) -> u64 {
        self.len as u64
    }

    /// Has the page tables filled, so that reading this does not fault later (`MADV_POPULATE_READ`, Linux
    /// 5.14+). `range` is of whole pages; what lies outside of the mapping is left out.
    pub fn populate(&self, range: Range<u64>) -> io::Result<()> {
        let end = range.end.min(self.size());
        if range.start >= end {
            return Ok(());
        }
        // SAFETY: the range lies inside our mapping, and the advice changes no content.
        let done = unsafe {
            libc::madvise(
                self.start.byte_add(range.start as usize),
                (end - range.start) as usize,
                libc::MADV_POPULATE_READ,
            )
        };
        match done {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Whether `len` bytes at `at` are those of another mapping at `other_at`.
    ///
    /// # Panics
    /// When a range does not lie inside its mapping.
    pub fn same(&self, at: u64, (other, other_at): (&MappedFile, u64), len: u64) -> bool {
        let inside = |map: &MappedFile, at: u64| {
            let end = at.checked_add(len);
            end.is_some_and(|end| end <= map.size())
        };
        assert!(
            inside(self, at) && inside(other, other_at),
            "compares what is mapped"
        );
        // SAFETY: both ranges lie inside live mappings, as asserted. Others may write them meanwhile:
        // memcmp reads bytes through pointers, and any answer is one that the caller counts with.
        let order = unsafe {
            libc::memcmp(
                self.start.byte_add(at as usize),
                other.start.byte_add(other_at as usize),
                len as usize,
            )
        };
        order == 0
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly the mapping that `of` made; no reference into it exists.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn mapped_bytes_are_compared_as_they_are_now() {
        let memory = |fill: &[u8]| {
            let fd =
                rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
            rustix::io::pwrite(&fd, fill, 0).expect("room");
            File::from(fd)
        };
        let (one, other) = (memory(&[1; 8192]), memory(&[1; 5000]));
        let mapped = [
            MappedFile::of(&one, 8192).expect("mapped"),
            MappedFile::of(&other, 5000).expect("mapped"),
        ];
        assert_eq!(mapped[1].size(), 8192);
        mapped[0].populate(0..u64::MAX).expect("populated");
        assert!(mapped[0].same(4096, (&mapped[1], 0), 4096));
        assert!(!mapped[0].same(4096, (&mapped[1], 4096), 4096));
        rustix::io::pwrite(&other, &[2], 77).expect("room");
        assert!(!mapped[0].same(0, (&mapped[1], 0), 4096));
        assert!(MappedFile::of(&one, 0).is_err());
    }
}
