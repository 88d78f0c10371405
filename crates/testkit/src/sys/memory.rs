//! Mappings that a test program fills and compares.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

/// Bytes in a page; the programs run on x86-64 only.
pub const PAGE: usize = 4096;

/// A mapping made by us, unmapped when dropped. Reads and writes are volatile and within bounds;
/// touching a page whose protection forbids it ends the program by SIGSEGV, as it should.
#[derive(Debug)]
pub struct Mapping {
    address: usize,
    length: usize,
}

/// How to map.
#[derive(Debug, Clone, Copy)]
pub struct Map<'a> {
    /// Bytes, a multiple of the page size.
    pub length: usize,
    /// `PROT_*`.
    pub protection: i32,
    /// `MAP_*`; without a file `MAP_ANONYMOUS` is added.
    pub flags: i32,
    /// The file and the offset in it.
    pub file: Option<(BorrowedFd<'a>, i64)>,
}

impl Map<'_> {
    /// Private anonymous memory, readable and writable.
    pub fn private(length: usize) -> Self {
        Self {
            length,
            protection: libc::PROT_READ | libc::PROT_WRITE,
            flags: libc::MAP_PRIVATE,
            file: None,
        }
    }

    /// The same, shared.
    pub fn shared(length: usize) -> Self {
        Self {
            flags: libc::MAP_SHARED,
            ..Self::private(length)
        }
    }

    /// Maps; errors are the kernel's.
    pub fn make(self) -> io::Result<Mapping> {
        let (fd, offset, extra) = match self.file {
            Some((fd, offset)) => (fd.as_raw_fd(), offset, 0),
            None => (-1, 0, libc::MAP_ANONYMOUS),
        };
        // SAFETY: the kernel chooses the place (MAP_FIXED is not used by any caller), so that no
        // memory in use is replaced.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                self.length,
                self.protection,
                self.flags | extra,
                fd,
                offset,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping {
            address: address as usize,
            length: self.length,
        })
    }
}

impl Map<'_> {
    /// Maps at a multiple of `align`; errors are the kernel's.
    pub fn aligned(self, align: usize) -> io::Result<Mapping> {
        let wide = Map {
            length: self.length + align,
            ..self
        };
        let wide = wide.make()?;
        let start = wide.address.next_multiple_of(align);
        let (head, tail) = (
            start - wide.address,
            wide.address + wide.length - start - self.length,
        );
        for (at, length) in [(wide.address, head), (start + self.length, tail)] {
            if length > 0 {
                // SAFETY: a part of the mapping above, which nobody has touched.
                check(i64::from(unsafe { libc::munmap(at as *mut _, length) }))?;
            }
        }
        std::mem::forget(wide);
        Ok(Mapping {
            address: start,
            length: self.length,
        })
    }
}

impl Mapping {
    /// Takes a mapping that nobody else has.
    pub(super) fn of(address: usize, pages: usize) -> Self {
        let length = pages * PAGE;
        Self { address, length }
    }

    /// Where it begins.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Pages in it.
    pub fn pages(&self) -> usize {
        self.length / PAGE
    }

    fn word(&self, at: usize) -> *mut u64 {
        assert!(at + 8 <= self.length && at.is_multiple_of(8));
        (self.address + at) as *mut u64
    }

    /// Writes the word at the byte offset `at`.
    pub fn write(&self, at: usize, value: u64) {
        // SAFETY: `word` checked bounds and alignment, and the mapping lives as long as `self`.
        unsafe { self.word(at).write_volatile(value) }
    }

    /// Reads the word at the byte offset `at`.
    pub fn read(&self, at: usize) -> u64 {
        // SAFETY: as in `write`.
        unsafe { self.word(at).read_volatile() }
    }

    /// Fills a page with words that follow from `seed` and the page.
    pub fn fill_page(&self, page: usize, seed: u64) {
        for word in 0..PAGE / 8 {
            self.write(page * PAGE + word * 8, pattern(seed, page, word));
        }
    }

    /// Whether a page holds what [`Mapping::fill_page`] wrote.
    pub fn check_page(&self, page: usize, seed: u64) -> Result<(), String> {
        for word in 0..PAGE / 8 {
            let (found, expected) = (self.read(page * PAGE + word * 8), pattern(seed, page, word));
            if found != expected {
                return Err(format!(
                    "page {page} of the mapping at {:#x}: word {word} is {found:#x}, not {expected:#x}",
                    self.address
                ));
            }
        }
        Ok(())
    }

    /// Fills all pages.
    pub fn fill(&self, seed: u64) {
        (0..self.pages()).for_each(|page| self.fill_page(page, seed));
    }

    /// Checks all pages.
    pub fn check(&self, seed: u64) -> Result<(), String> {
        (0..self.pages()).try_for_each(|page| self.check_page(page, seed))
    }

    /// Sets the protection of `pages` pages from `first`.
    pub fn protect(&self, first: usize, pages: usize, protection: i32) -> io::Result<()> {
        let (start, length) = self.range(first, pages);
        // SAFETY: the range lies in our mapping, to which no references exist.
        check(i64::from(unsafe {
            libc::mprotect(start, length, protection)
        }))
        .map(drop)
    }

    /// Advises the kernel about `pages` pages from `first`.
    pub fn advise(&self, first: usize, pages: usize, advice: i32) -> io::Result<()> {
        let (start, length) = self.range(first, pages);
        // SAFETY: as in `protect`; contents that the advice drops are only read as plain words.
        check(i64::from(unsafe { libc::madvise(start, length, advice) })).map(drop)
    }

    /// Locks `pages` pages from `first` in memory.
    pub fn lock(&self, first: usize, pages: usize) -> io::Result<()> {
        let (start, length) = self.range(first, pages);
        // SAFETY: the range is ours; locking changes no content.
        check(i64::from(unsafe { libc::mlock(start, length) })).map(drop)
    }

    /// Unmaps `pages` pages from `first`; only pages that are not touched any more.
    pub fn punch(&self, first: usize, pages: usize) -> io::Result<()> {
        let (start, length) = self.range(first, pages);
        // SAFETY: the range is ours, and the caller touches it no more.
        check(i64::from(unsafe { libc::munmap(start, length) })).map(drop)
    }

    fn range(&self, first: usize, pages: usize) -> (*mut libc::c_void, usize) {
        assert!((first + pages) * PAGE <= self.length);
        ((self.address + first * PAGE) as *mut _, pages * PAGE)
    }

    /// A second mapping of the same shared memory (`mremap` of nothing).
    pub fn again(&self) -> io::Result<Mapping> {
        // SAFETY: an old length of 0 leaves our mapping as it is; the kernel puts the new one where
        // nothing is.
        let address = unsafe {
            libc::mremap(
                self.address as *mut libc::c_void,
                0,
                self.length,
                libc::MREMAP_MAYMOVE,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping {
            address: address as usize,
            length: self.length,
        })
    }

    /// Makes it so many pages long, moving it where there is no room (`mremap`).
    pub fn resize(&mut self, pages: usize) -> io::Result<()> {
        let length = pages * PAGE;
        // SAFETY: the range is a mapping of ours, to which nobody holds a reference; the kernel moves it
        // only to where nothing is.
        let address = unsafe {
            libc::mremap(
                self.address as *mut libc::c_void,
                self.length,
                length,
                libc::MREMAP_MAYMOVE,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        (self.address, self.length) = (address as usize, length);
        Ok(())
    }

    /// Has two mappings of one length change places (`mremap`).
    pub fn swap(&mut self, other: &mut Mapping) -> io::Result<()> {
        assert_eq!(self.length, other.length);
        let between = Map {
            protection: libc::PROT_NONE,
            ..Map::private(self.length)
        };
        let between = between.aligned(2 << 20)?;
        let ways = [
            (self.address, between.address),
            (other.address, self.address),
            (between.address, other.address),
        ];
        for (from, to) in ways {
            // SAFETY: `from` is a mapping of ours, to which nobody holds a reference; at `to` there is
            // `between`, which nobody touches, or nothing, since it was moved away.
            let address = unsafe {
                libc::mremap(
                    from as *mut libc::c_void,
                    self.length,
                    self.length,
                    libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                    to as *mut libc::c_void,
                )
            };
            if address == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        // Its place is empty since the last way.
        std::mem::forget(between);
        std::mem::swap(&mut self.address, &mut other.address);
        Ok(())
    }

    /// Puts a new private mapping, readable and writable, in place of it.
    pub fn renew(&mut self) -> io::Result<()> {
        // SAFETY: replaces exactly the mapping of ours, to which nobody holds a reference.
        let address = unsafe {
            libc::mmap(
                self.address as *mut libc::c_void,
                self.length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Whether the kernel itself can read the page: false for one without access and for a guard.
    pub fn is_readable(&self, page: usize) -> io::Result<bool> {
        let (start, _) = self.range(page, 1);
        let mut byte = 0_u8;
        let local = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        let remote = libc::iovec {
            iov_base: start,
            iov_len: 1,
        };
        // SAFETY: `local` spans `byte`; `remote` is only read, by the kernel, which checks it.
        let got = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
        match check(got as i64) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Keeps the mapping until the program ends.
    pub fn leak(self) -> &'static Self {
        Box::leak(Box::new(self))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the whole mapping is ours and nobody can touch it any more.
        unsafe { libc::munmap(self.address as *mut _, self.length) };
    }
}

/// What [`Mapping::fill_page`] writes.
pub fn page_bytes(page: usize, seed: u64) -> Vec<u8> {
    let words = (0..PAGE / 8).flat_map(|word| pattern(seed, page, word).to_ne_bytes());
    words.collect()
}

fn pattern(seed: u64, page: usize, word: usize) -> u64 {
    let mixed = seed
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add((page as u64) << 20 | word as u64);
    mixed.rotate_left(23).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1
}

/// The end of the heap.
pub fn program_break() -> usize {
    // SAFETY: asks only.
    unsafe { libc::sbrk(0) as usize }
}
