//! Userfaultfd: filling the missing pages of another address space, and noticing writes to it.
//!
//! Contract relied on: a descriptor acts on the address space of the task that made it, whoever holds
//! it; the ioctls read and write only their own argument, and `UFFDIO_COPY` reads the source range that
//! it names (userfaultfd(2), `linux/userfaultfd.h`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::ids::TaskAddr;

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const WRITEPROTECT_MODE_WP: u64 = 1;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;

/// `UFFD_FEATURE_*` by which writes are noticed without anybody waiting for them (Linux 6.7+):
/// PAGEFAULT_FLAG_WP, WP_HUGETLBFS_SHMEM, WP_UNPOPULATED, WP_ASYNC.
pub const TRACKING_FEATURES: u64 = 1 | 1 << 12 | 1 << 13 | 1 << 15;
/// Flag of `userfaultfd(2)`: only faults from user mode wait, so no privilege is needed. Asynchronous
/// write protection makes nobody wait at all.
pub const USER_MODE_ONLY: i32 = 1;

/// Nobody waits for the page: the task is stopped.
const COPY_MODE_DONTWAKE: u64 = 1;

/// A userfaultfd, made by this or by another task.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Takes a new descriptor and agrees on the interface with these `UFFD_FEATURE_*` bits.
    pub fn new(fd: OwnedFd, features: u64) -> io::Result<Uffd> {
        let uffd = Uffd(fd);
        uffd.ioctl(UFFDIO_API, &mut [UFFD_API, features, 0])?;
        Ok(uffd)
    }

    /// Takes a descriptor whose interface was agreed on before.
    pub fn adopt(fd: OwnedFd) -> Uffd {
        Uffd(fd)
    }

    /// The descriptor, to be handed on.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Has writes to a range noticed, once its pages are protected; nothing changes where this
    /// descriptor has the range already. `EBUSY` where another one has it, `ESRCH` once the address
    /// space is gone (its program ended or became another).
    pub fn register_write_protect(&self, start: TaskAddr, len: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_REGISTER, &mut [start.0, len, REGISTER_MODE_WP, 0])
    }

    /// Write-protects all pages of a registered range; those that are not there get a marker.
    /// `EAGAIN` while the address space changes.
    pub fn write_protect(&self, start: TaskAddr, len: u64) -> io::Result<()> {
        self.ioctl(
            UFFDIO_WRITEPROTECT,
            &mut [start.0, len, WRITEPROTECT_MODE_WP],
        )
    }

    /// Makes missing pages of a range wait for us instead of becoming zero.
    pub fn register_missing(&self, start: TaskAddr, len: u64) -> io::Result<()> {
        self.ioctl(
            UFFDIO_REGISTER,
            &mut [start.0, len, REGISTER_MODE_MISSING, 0],
        )
    }

    /// Puts `bytes`, whole pages, where none are yet; returns the bytes done, which may be fewer.
    /// `EEXIST` when the first page is there already, `EAGAIN` while the address space changes.
    pub fn copy(&self, start: TaskAddr, bytes: &[u8]) -> io::Result<usize> {
        let mut argument = [
            start.0,
            bytes.as_ptr() as u64,
            bytes.len() as u64,
            COPY_MODE_DONTWAKE,
            0,
        ];
        match self.ioctl(UFFDIO_COPY, &mut argument) {
            Ok(()) => Ok(bytes.len()),
            // The last word is the number of bytes copied, or a negative errno.
            Err(_) if argument[4].cast_signed() > 0 => Ok(argument[4] as usize),
            Err(error) => Err(error),
        }
    }

    fn ioctl<const WORDS: usize>(
        &self,
        request: libc::c_ulong,
        argument: &mut [u64; WORDS],
    ) -> io::Result<()> {
        // SAFETY: each request above names in its number the size of its structure of u64 words, which
        // is that of the array its caller passes; a source range in it spans a live slice.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument.as_mut_ptr()) };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
