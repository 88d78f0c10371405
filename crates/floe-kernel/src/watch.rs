//! inotify and fanotify beyond rustix, and the file handles by which the kernel names what is watched.
//!
//! Contract relied on: `open_by_handle_at` reads `handle_bytes` bytes after the two words of a handle,
//! `name_to_handle_at` writes as many there at most; the other calls take integers and one path.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `MAX_HANDLE_SZ` of the kernel.
pub const MAX_HANDLE_BYTES: usize = 128;
/// `AT_HANDLE_FID`: a handle that need not be one that can be opened (Linux 6.5).
const AT_HANDLE_FID: i32 = 0x200;
/// `INOTIFY_IOC_SETNEXTWD`: `_IOW('I', 0, __s32)`.
const INOTIFY_IOC_SETNEXTWD: u64 = 0x4004_4900;

/// A file handle as `name_to_handle_at(2)` gives it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileHandle {
    /// Chosen by the file system.
    pub kind: u32,
    /// Opaque; at most [`MAX_HANDLE_BYTES`].
    pub bytes: Vec<u8>,
}

#[repr(C)]
struct RawHandle {
    bytes: u32,
    kind: i32,
    data: [u8; MAX_HANDLE_BYTES],
}

fn check(result: i64) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Opens (`O_PATH`) the file that a handle names in the file system that `mount` is on.
pub fn open_by_handle(mount: BorrowedFd<'_>, handle: &FileHandle) -> io::Result<OwnedFd> {
    let length = handle.bytes.len();
    if length > MAX_HANDLE_BYTES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut raw = RawHandle {
        bytes: length as u32,
        kind: handle.kind.cast_signed(),
        data: [0; MAX_HANDLE_BYTES],
    };
    raw.data[..length].copy_from_slice(&handle.bytes);
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: `raw` is live and has room for the bytes that its first word announces.
    let result = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &raw const raw,
            flags,
        )
    };
    let fd = check(result)?;
    // SAFETY: the descriptor is new and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The handle that the kernel shows for the file `name` in `directory`, or for `directory` itself where the
/// name is empty, and the number of the mount that it is on. Links are not followed.
///
/// # Errors
/// `EOPNOTSUPP` or `EINVAL` where the file system, or a kernel before 6.5, has none; those of
/// `name_to_handle_at(2)`.
pub fn handle_of(directory: BorrowedFd<'_>, name: &CStr) -> io::Result<(FileHandle, i32)> {
    let mut raw = RawHandle {
        bytes: MAX_HANDLE_BYTES as u32,
        kind: 0,
        data: [0; MAX_HANDLE_BYTES],
    };
    let mut mount = 0_i32;
    let flags = AT_HANDLE_FID | libc::AT_EMPTY_PATH;
    // SAFETY: `name` is a live C string; `raw` and `mount` are live and writable, and `raw` has room for as
    // many bytes as its first word says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            directory.as_raw_fd(),
            name.as_ptr(),
            &raw mut raw,
            &raw mut mount,
            flags,
        )
    };
    check(result)?;
    let length = (raw.bytes as usize).min(MAX_HANDLE_BYTES);
    let handle = FileHandle {
        kind: raw.kind.cast_unsigned(),
        bytes: raw.data[..length].to_vec(),
    };
    Ok((handle, mount))
}

/// Watches a path, following it if it is a link of `/proc/self/fd`; returns the number of the watch.
pub fn inotify_add(inotify: BorrowedFd<'_>, path: &Path, mask: u32) -> io::Result<i32> {
    let path = c_path(path)?;
    // SAFETY: `path` is a live C string.
    check(i64::from(unsafe {
        libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), mask)
    }))
}

/// Ends a watch.
pub fn inotify_remove(inotify: BorrowedFd<'_>, watch: i32) -> io::Result<()> {
    // SAFETY: integers only.
    check(i64::from(unsafe {
        libc::inotify_rm_watch(inotify.as_raw_fd(), watch)
    }))
    .map(drop)
}

/// Sets the number of the next watch; `ENOTTY` without `CONFIG_CHECKPOINT_RESTORE`.
pub fn inotify_set_next(inotify: BorrowedFd<'_>, watch: i32) -> io::Result<()> {
    // SAFETY: the request takes an integer.
    check(i64::from(unsafe {
        libc::ioctl(
            inotify.as_raw_fd(),
            INOTIFY_IOC_SETNEXTWD as libc::Ioctl,
            watch,
        )
    }))
    .map(drop)
}

/// Makes a fanotify group.
pub fn fanotify_init(flags: u32, event_flags: u32) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    let result = unsafe { libc::syscall(libc::SYS_fanotify_init, flags, event_flags) };
    let fd = check(result)?;
    // SAFETY: the descriptor is new and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Changes a mark of a fanotify group.
pub fn fanotify_mark(
    fanotify: BorrowedFd<'_>,
    flags: u32,
    mask: u64,
    path: &Path,
) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: `path` is a live C string, the rest are integers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_fanotify_mark,
            fanotify.as_raw_fd(),
            flags,
            mask,
            libc::AT_FDCWD,
            path.as_ptr(),
        )
    };
    check(result).map(drop)
}
