//! Reading and writing the memory of another process.
//!
//! Contract relied on: `process_vm_readv` writes only to the local ranges that it is given,
//! `process_vm_writev` only reads them; both fail or stop short at the first remote page that the task
//! itself could not access.

use std::io;

use crate::ids::{HostPid, TaskAddr};

/// The most ranges that one call takes (`UIO_MAXIOV`).
pub const MAX_RANGES: usize = 1024;

/// A range of a foreign address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteRange {
    pub start: TaskAddr,
    /// Length in bytes.
    pub len: usize,
}

/// Reads `ranges` one after another into `buffer`; returns the bytes read, which may be fewer. `EFAULT`
/// when the first page cannot be read at all.
pub fn read_ranges(pid: HostPid, ranges: &[RemoteRange], buffer: &mut [u8]) -> io::Result<usize> {
    let remote: Vec<libc::iovec> = ranges
        .iter()
        .map(|range| libc::iovec {
            iov_base: range.start.0 as *mut libc::c_void,
            iov_len: range.len,
        })
        .collect();
    let local = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: `local` spans exactly the caller's exclusive buffer; remote addresses are only
    // interpreted in the other process.
    let read = unsafe {
        libc::process_vm_readv(
            pid.0,
            &raw const local,
            1,
            remote.as_ptr(),
            remote.len() as libc::c_ulong,
            0,
        )
    };
    if read < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(read as usize)
    }
}

/// Bytes for an address of another process.
#[derive(Clone, Copy, Debug)]
pub struct RemoteWrite<'a> {
    pub start: TaskAddr,
    pub bytes: &'a [u8],
}

/// Makes at most [`MAX_RANGES`] writes one after another; returns the bytes written, which may be fewer.
/// `EFAULT` when the first page is not writable.
pub fn write_scattered(pid: HostPid, writes: &[RemoteWrite<'_>]) -> io::Result<usize> {
    let local: Vec<libc::iovec> = writes
        .iter()
        .map(|write| libc::iovec {
            iov_base: write.bytes.as_ptr().cast_mut().cast(),
            iov_len: write.bytes.len(),
        })
        .collect();
    let remote: Vec<libc::iovec> = writes
        .iter()
        .map(|write| libc::iovec {
            iov_base: write.start.0 as *mut libc::c_void,
            iov_len: write.bytes.len(),
        })
        .collect();
    // SAFETY: the kernel only reads the local ranges, each of which spans exactly a live slice; remote
    // addresses are only interpreted in the other process.
    let written = unsafe {
        libc::process_vm_writev(
            pid.0,
            local.as_ptr(),
            local.len() as libc::c_ulong,
            remote.as_ptr(),
            remote.len() as libc::c_ulong,
            0,
        )
    };
    if written < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(written as usize)
    }
}

/// Reads exactly `buffer.len()` bytes at `start`.
pub fn read_exact(pid: HostPid, start: TaskAddr, buffer: &mut [u8]) -> io::Result<()> {
    let len = buffer.len();
    match read_ranges(pid, &[RemoteRange { start, len }], buffer)? {
        read if read == len => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}

/// Writes all of `bytes` at `start`.
pub fn write_exact(pid: HostPid, start: TaskAddr, bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    match write_scattered(pid, &[RemoteWrite { start, bytes }])? {
        written if written == bytes.len() => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_ranges_arrive_in_order() {
        let me = HostPid(std::process::id().cast_signed());
        let (one, two) = ([1u8; 3], [2u8; 2]);
        let range = |bytes: &[u8]| RemoteRange {
            start: TaskAddr(bytes.as_ptr() as u64),
            len: bytes.len(),
        };
        let mut buffer = [0u8; 5];
        assert_eq!(
            read_ranges(me, &[range(&one), range(&two)], &mut buffer).expect("own memory"),
            5
        );
        assert_eq!(buffer, [1, 1, 1, 2, 2]);
        assert!(read_exact(me, TaskAddr(8), &mut buffer).is_err());
    }
}
