//! A process that removes names which a killed process has left.
//!
//! Contract relied on: `fork(2)` from a process with one thread leaves the child a working copy; a
//! reader of a pipe sees its end when the last writer is gone, however it ended.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::sysv::shm;

/// What a name names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameKind {
    /// Anything but a directory.
    File,
    /// A directory, which must be empty to be removed.
    Directory,
    /// A segment of System V shared memory, by its number.
    SharedMemory,
}

impl NameKind {
    /// Removes what a name names.
    pub fn remove(self, path: &Path) -> io::Result<()> {
        match self {
            NameKind::File => std::fs::remove_file(path),
            NameKind::Directory => std::fs::remove_dir(path),
            NameKind::SharedMemory => {
                let id = path.to_str().and_then(|id| id.parse().ok());
                match shm::remove(id.ok_or(io::ErrorKind::InvalidInput)?) {
                    // It was marked before, and went with its last mapping.
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
                    removed => removed,
                }
            }
        }
    }

    fn code(self) -> u8 {
        match self {
            NameKind::File => b'f',
            NameKind::Directory => b'd',
            NameKind::SharedMemory => b'm',
        }
    }
}

/// The end of the list: nothing needs to be removed.
const DONE: u8 = b'.';

/// The janitor's process, as long as this lives. Dropping it sends the janitor home.
#[derive(Debug)]
pub struct Janitor {
    list: File,
    pid: libc::pid_t,
}

impl Janitor {
    /// Starts the process. The caller must have one thread only.
    pub fn start() -> io::Result<Janitor> {
        let (end, list) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        // SAFETY: this process has one thread, so the child finds every lock free.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop(list);
                watch(end);
            }
            pid => Ok(Janitor {
                list: File::from(list),
                pid,
            }),
        }
    }

    /// Puts a name on the list: it is removed when this process is killed.
    pub fn note(&self, kind: NameKind, path: &Path) -> io::Result<()> {
        let bytes = path.as_os_str().as_bytes();
        let mut record = vec![kind.code()];
        record.extend_from_slice(&(bytes.len() as u32).to_ne_bytes());
        record.extend_from_slice(bytes);
        (&self.list).write_all(&record)
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        // It can only fail when the janitor is dead, and then there is nobody to tell.
        let _ = (&self.list).write_all(&[DONE]);
        let mut status = 0;
        // SAFETY: waits for our own child; `status` is a live integer.
        unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
    }
}

fn watch(end: OwnedFd) -> ! {
    let _ = rustix::process::setsid();
    keep_only(&end);
    for (kind, path) in unfinished(File::from(end)).into_iter().rev() {
        let _ = kind.remove(&path);
    }
    // SAFETY: ends this process without running destructors of the other one's objects.
    unsafe { libc::_exit(0) }
}

/// The names on a list that ended without `DONE`.
fn unfinished(list: impl Read) -> Vec<(NameKind, PathBuf)> {
    let mut list = BufReader::new(list);
    let mut names = Vec::new();
    loop {
        let mut code = [0u8; 1];
        if list.read_exact(&mut code).is_err() {
            return names;
        }
        let kind = match code[0] {
            b'f' => NameKind::File,
            b'd' => NameKind::Directory,
            b'm' => NameKind::SharedMemory,
            _ => return Vec::new(),
        };
        let mut len = [0u8; 4];
        let mut path = Vec::new();
        let read = list.read_exact(&mut len).and_then(|()| {
            path.resize(u32::from_ne_bytes(len) as usize, 0);
            list.read_exact(&mut path)
        });
        if read.is_ok() {
            names.push((kind, PathBuf::from(OsStr::from_bytes(&path))));
        }
    }
}

/// Holds no descriptor of the other process: its pipes and files must end when it ends.
fn keep_only(end: &OwnedFd) {
    let keep = end.as_raw_fd() as u32;
    // SAFETY: integers only; this process uses none of the closed descriptors.
    unsafe {
        if keep > 0 {
            libc::syscall(libc::SYS_close_range, 0, keep - 1, 0);
        }
        libc::syscall(libc::SYS_close_range, keep + 1, u32::MAX, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(done: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, path) in [(NameKind::Directory, "/a"), (NameKind::File, "/a/b")] {
            bytes.push(kind.code());
            bytes.extend_from_slice(&(path.len() as u32).to_ne_bytes());
            bytes.extend_from_slice(path.as_bytes());
        }
        bytes.extend(done.then_some(DONE));
        bytes
    }

    #[test]
    fn only_an_unfinished_list_is_worked_off() {
        assert_eq!(unfinished(&list(true)[..]), []);
        let names = unfinished(&list(false)[..]);
        assert_eq!(names[0], (NameKind::Directory, PathBuf::from("/a")));
        assert_eq!(names[1], (NameKind::File, PathBuf::from("/a/b")));
        // A record that was cut off names nothing.
        assert_eq!(unfinished(&list(false)[..9]).len(), 1);
    }
}
