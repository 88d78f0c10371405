//! Writers of memory that page tables do not show, or that take its faults.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::check;
use super::memory::Mapping;

/// An io_uring that has `memory` registered as a buffer, so that its pages are pinned.
pub fn io_uring_with_buffer(memory: &Mapping) -> io::Result<OwnedFd> {
    const ENTRIES: libc::c_uint = 4;
    const REGISTER_BUFFERS: libc::c_uint = 0;
    let mut parameters = [0_u64; 15];
    // SAFETY: `parameters` spans a `struct io_uring_params` (120 bytes), which the kernel fills.
    let ring = check(unsafe {
        libc::syscall(libc::SYS_io_uring_setup, ENTRIES, parameters.as_mut_ptr())
    })?;
    // SAFETY: the kernel has just made this descriptor for us.
    let ring = unsafe { OwnedFd::from_raw_fd(ring as i32) };
    let buffer = libc::iovec {
        iov_base: memory.address() as *mut libc::c_void,
        iov_len: memory.pages() * super::memory::PAGE,
    };
    // SAFETY: `buffer` spans a mapping of ours; nothing is ever submitted to the ring.
    check(unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            ring.as_raw_fd(),
            REGISTER_BUFFERS,
            &raw const buffer,
            1,
        )
    })?;
    Ok(ring)
}

/// A userfaultfd that has the missing pages of `memory` registered; they must not be touched.
pub fn userfaultfd_over(memory: &Mapping) -> io::Result<OwnedFd> {
    const API: libc::c_ulong = 0xc018_aa3f;
    const REGISTER: libc::c_ulong = 0xc020_aa00;
    const VERSION: u64 = 0xaa;
    const MISSING: u64 = 1;
    // SAFETY: makes a descriptor, which is ours.
    let fd = check(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) })?;
    // SAFETY: as said.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = [VERSION, 0, 0];
    let length = (memory.pages() * super::memory::PAGE) as u64;
    let mut range = [memory.address() as u64, length, MISSING, 0];
    for (request, words) in [(API, api.as_mut_slice()), (REGISTER, range.as_mut_slice())] {
        // SAFETY: `api` spans a `struct uffdio_api` and `range` a `struct uffdio_register`, which the
        // kernel reads and fills; the range is a mapping of ours.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, words.as_mut_ptr()) };
        check(i64::from(result))?;
    }
    Ok(fd)
}

/// Makes a context of asynchronous I/O, which lasts as long as the program.
pub fn aio_context() -> io::Result<u64> {
    const EVENTS: libc::c_long = 16;
    let mut context = 0_u64;
    // SAFETY: the kernel writes the context's address to `context`.
    check(unsafe { libc::syscall(libc::SYS_io_setup, EVENTS, &raw mut context) })?;
    Ok(context)
}
