//! Memory of `MAP_SHARED | MAP_ANONYMOUS` with a descriptor, so that several tasks can map it.
//!
//! Contract relied on: `/proc/self/map_files` opens the file behind a mapping (CAP_CHECKPOINT_RESTORE in
//! the initial user namespace), also when that is the kernel's nameless one.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags};

use crate::ids::PAGE_SIZE;
use crate::namespace::own_proc_path;

/// A new segment. It lives as long as its descriptor or a mapping of it.
#[derive(Debug)]
pub struct SharedAnonymous {
    fd: OwnedFd,
    mapping: Mapping,
}

impl SharedAnonymous {
    /// Makes a segment of `len` bytes, rounded up to whole pages and at least one, all zero. `page_flags`
    /// are `MAP_HUGETLB` and a size, or none.
    pub fn new(len: usize, page_flags: i32) -> io::Result<SharedAnonymous> {
        let whole = len.max(1).checked_next_multiple_of(PAGE_SIZE as usize);
        let len = whole.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | page_flags;
        let mapping = Mapping::new(len, flags, -1)?;
        let start = mapping.start as usize;
        let path = own_proc_path(&format!("self/map_files/{:x}-{:x}", start, start + len));
        let fd = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        Ok(SharedAnonymous { fd, mapping })
    }

    /// Takes a file in memory of `len` bytes (memfd), to write to it through a mapping.
    pub fn of_file(fd: OwnedFd, len: usize) -> io::Result<SharedAnonymous> {
        let mapping = Mapping::new(len, libc::MAP_SHARED, fd.as_raw_fd())?;
        Ok(SharedAnonymous { fd, mapping })
    }

    /// Takes a mapping of the whole file `fd` that nobody else knows of; it is unmapped with the value.
    pub(crate) fn of_mapping(fd: OwnedFd, start: *mut libc::c_void, len: usize) -> SharedAnonymous {
        let mapping = Mapping { start, len };
        SharedAnonymous { fd, mapping }
    }

    /// Writes through a mapping: files of huge pages have no `write`.
    ///
    /// # Panics
    /// When the bytes do not lie inside the segment.
    pub fn write_mapped(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset.checked_add(bytes.len());
        assert!(
            end.is_some_and(|end| end <= self.mapping.len),
            "content lies inside its segment"
        );
        // SAFETY: the range lies inside our own writable mapping, as asserted; `&mut self` keeps others
        // of this process away, and nobody else has the segment yet.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.mapping.start.cast::<u8>().add(offset),
                bytes.len(),
            );
        }
    }

    /// Unmaps the segment from this process and keeps the descriptor.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl AsFd for SharedAnonymous {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[derive(Debug)]
struct Mapping {
    start: *mut libc::c_void,
    len: usize,
}

impl Mapping {
    fn new(len: usize, flags: i32, file: RawFd) -> io::Result<Mapping> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, file, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { start, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly the mapping that `new` made; no reference into it exists.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_descriptor_is_the_mapped_memory() {
        let mut segment = match SharedAnonymous::new(8192, 0) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                println!("skipped: map_files needs CAP_CHECKPOINT_RESTORE");
                return;
            }
            segment => segment.expect("a segment"),
        };
        segment.write_mapped(4095, b"ab");
        let fd = segment.into_fd();
        let mut bytes = [0; 4];
        rustix::io::pread(&fd, &mut bytes, 4094).expect("readable");
        assert_eq!(&bytes, b"\0ab\0");
        let stat = rustix::fs::fstat(&fd).expect("a file");
        assert_eq!(stat.st_size, 8192);
    }
}
