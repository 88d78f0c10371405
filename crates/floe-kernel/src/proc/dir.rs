//! A handle on `/proc/<pid>` that cannot come to mean another task.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, RawDir};

use super::text::{ParseError, decimal};
use crate::ids::HostPid;

/// Reading or understanding a file of `/proc/<pid>`.
#[derive(Debug, thiserror::Error)]
pub enum ProcError {
    #[error("Reading /proc/{pid}/{name}")]
    Read {
        pid: HostPid,
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("Task {pid}")]
    Parse {
        pid: HostPid,
        #[source]
        source: ParseError,
    },
}

impl ProcError {
    /// Whether the cause is that the task is gone.
    pub fn is_gone(&self) -> bool {
        match self {
            ProcError::Read { source, .. } => {
                matches!(source.raw_os_error(), Some(libc::ESRCH | libc::ENOENT))
            }
            ProcError::Parse { .. } => false,
        }
    }
}

/// Room for which another read is worth its while.
const ENOUGH: usize = 1024;

/// An open `/proc/<pid>` directory. It stays bound to its task: reads fail with `ESRCH` once the task is
/// gone, also when the pid was given to another.
#[derive(Debug)]
pub struct ProcDir {
    pid: HostPid,
    fd: OwnedFd,
}

impl ProcDir {
    /// Opens the directory of a task (or of a thread, by its id).
    pub fn open(pid: HostPid) -> Result<Self, ProcError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd =
            rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty()).map_err(|errno| {
                ProcError::Read {
                    pid,
                    name: String::new(),
                    source: errno.into(),
                }
            })?;
        Ok(ProcDir { pid, fd })
    }

    /// The task that this directory is of.
    pub fn pid(&self) -> HostPid {
        self.pid
    }

    fn failed(&self, name: &str, errno: rustix::io::Errno) -> ProcError {
        ProcError::Read {
            pid: self.pid,
            name: name.to_string(),
            source: errno.into(),
        }
    }

    /// The whole of a file, named relative to the directory.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, ProcError> {
        let mut text = Vec::new();
        self.read_into(name, &mut text)?;
        Ok(text)
    }

    /// As [`ProcDir::read`], into a buffer that is kept between calls.
    pub fn read_into(&self, name: &str, text: &mut Vec<u8>) -> Result<(), ProcError> {
        text.clear();
        let file = self.open_file(name, OFlags::RDONLY)?;
        loop {
            // procfs answers at most a page or a line at a time, whatever the room.
            if text.capacity() - text.len() < ENOUGH {
                text.reserve(4096);
            }
            let room = rustix::buffer::spare_capacity(text);
            match rustix::io::read(&file, room) {
                Ok(0) => return Ok(()),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(self.failed(name, errno)),
            }
        }
    }

    /// As [`ProcDir::read`], of a file that the kernel prints as one record (`status`, `stat`, `cgroup`,
    /// `fdinfo/N`; not `maps` or `children`): an answer that leaves room is the whole.
    pub fn read_record(&self, name: &str) -> Result<Vec<u8>, ProcError> {
        let file = self.open_file(name, OFlags::RDONLY)?;
        let mut text = Vec::with_capacity(4096);
        loop {
            let room = text.capacity() - text.len();
            match rustix::io::read(&file, rustix::buffer::spare_capacity(&mut text)) {
                Ok(read) if read < room => return Ok(text),
                Ok(_) => text.reserve(text.capacity()),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(self.failed(name, errno)),
            }
        }
    }

    /// Opens a file, named relative to the directory.
    pub fn open_file(&self, name: &str, flags: OFlags) -> Result<OwnedFd, ProcError> {
        rustix::fs::openat(
            self.fd.as_fd(),
            name,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| self.failed(name, errno))
    }

    /// The target of a symbolic link, such as `fd/3` or `cwd`.
    pub fn read_link(&self, name: &str) -> Result<Vec<u8>, ProcError> {
        rustix::fs::readlinkat(self.fd.as_fd(), name, Vec::with_capacity(256))
            .map(std::ffi::CString::into_bytes)
            .map_err(|errno| self.failed(name, errno))
    }

    /// Metadata of a file; symbolic links are followed.
    pub fn stat(&self, name: &str) -> Result<rustix::fs::Stat, ProcError> {
        rustix::fs::statat(self.fd.as_fd(), name, rustix::fs::AtFlags::empty())
            .map_err(|errno| self.failed(name, errno))
    }

    /// Metadata of a symbolic link itself; its mode tells how a descriptor was opened.
    pub fn link_stat(&self, name: &str) -> Result<rustix::fs::Stat, ProcError> {
        rustix::fs::statat(self.fd.as_fd(), name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| self.failed(name, errno))
    }

    /// The names in a directory that are numbers (`task`, `fd`), ascending.
    pub fn list(&self, name: &str) -> Result<Vec<i32>, ProcError> {
        let dir = self.open_file(name, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut buffer = Vec::with_capacity(16 * 1024);
        let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
        let mut numbers = Vec::new();
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(|errno| self.failed(name, errno))?;
            if let Some(number) = decimal(entry.file_name().to_bytes()) {
                numbers.extend(i32::try_from(number));
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Threads of the task, ascending; the leader may be anywhere among them.
    pub fn threads(&self) -> Result<Vec<HostPid>, ProcError> {
        Ok(self.list("task")?.into_iter().map(HostPid).collect())
    }

    /// Children of one thread of the task, in the order they were made.
    pub fn children(&self, thread: HostPid) -> Result<Vec<HostPid>, ProcError> {
        let name = format!("task/{thread}/children");
        let text = self.read(&name)?;
        text.split(u8::is_ascii_whitespace)
            .filter(|word| !word.is_empty())
            .map(|word| {
                decimal(word)
                    .and_then(|n| i32::try_from(n).ok())
                    .map(HostPid)
                    .ok_or_else(|| ProcError::Parse {
                        pid: self.pid,
                        source: ParseError::new("children", "pid", word),
                    })
            })
            .collect()
    }

    /// A file that is one number with an optional line feed, such as `oom_score_adj`.
    pub fn number(&self, name: &'static str) -> Result<i64, ProcError> {
        let text = self.read(name)?;
        super::text::signed(text.trim_ascii())
            .ok_or_else(|| self.bad(ParseError::new(name, "number", &text)))
    }

    /// A file that is one hexadecimal number, such as `personality`.
    pub fn hex_number(&self, name: &'static str) -> Result<u64, ProcError> {
        let text = self.read(name)?;
        super::text::hex(text.trim_ascii())
            .ok_or_else(|| self.bad(ParseError::new(name, "number", &text)))
    }

    /// Adds the task to a parser's error.
    pub fn bad(&self, source: ParseError) -> ProcError {
        ProcError::Parse {
            pid: self.pid,
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::{parse_maps, parse_stat, parse_status};

    fn own() -> ProcDir {
        ProcDir::open(HostPid(std::process::id().cast_signed())).expect("we are alive")
    }

    #[test]
    fn our_own_directory_reads_and_parses() {
        let proc = own();
        let stat = parse_stat(&proc.read("stat").expect("readable")).expect("understood");
        let status = parse_status(&proc.read("status").expect("readable")).expect("understood");
        assert_eq!(Some(stat.ppid), status.ppid);
        let maps = parse_maps(&proc.read("smaps").expect("readable")).expect("understood");
        assert!(
            maps.iter()
                .any(|m| m.name == b"[stack]" && m.flags.grows_down)
        );
        assert!(
            proc.list("fd").expect("readable").contains(&0)
                || !proc.list("fd").expect("readable").is_empty()
        );
        assert!(proc.threads().expect("readable").contains(&proc.pid()));
        assert_eq!(proc.children(proc.pid()).map(|c| c.len()).unwrap_or(0), 0);
    }

    #[test]
    fn a_missing_file_names_itself() {
        let error = own().read("no_such_file").expect_err("absent");
        assert!(error.is_gone() && error.to_string().contains("no_such_file"));
    }
}
