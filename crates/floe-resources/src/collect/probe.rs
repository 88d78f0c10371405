//! One descriptor of a task, opened up for the kinds to look at.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use floe_image::messages::FownEntry;
use floe_kernel::file_owner::file_owner;
use floe_kernel::ids::{HostPid, TaskFd};
use floe_kernel::pidfd::Pidfd;
use floe_kernel::proc::{FdInfo, ProcDir, parse_fdinfo};
use rustix::fs::{FileType, OFlags, Stat};

use super::file_ids::Seen;
use super::{CollectError, Collector};
use crate::namespace::PidView;

/// What is asked about a descriptor before it is looked at; any thread may ask.
#[derive(Debug)]
pub(super) struct Opened {
    fd: TaskFd,
    file: OwnedFd,
    stat: Stat,
    target: Vec<u8>,
    info: FdInfo,
}

/// Where descriptors come from: a stopped task.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'a> {
    pub proc: &'a ProcDir,
    pub pidfd: &'a Pidfd,
}

impl Source<'_> {
    /// Opens up descriptor `fd` of the task.
    pub(super) fn open(&self, fd: TaskFd) -> Result<Opened, CollectError> {
        let Source { proc, pidfd } = self;
        let failed = |action, source| CollectError::Fd {
            pid: proc.pid(),
            fd,
            action,
            source,
        };
        let file = pidfd
            .duplicate_fd(fd)
            .map_err(|error| failed("Duplicating", error))?;
        let stat = rustix::fs::fstat(&file).map_err(|errno| failed("fstat", errno.into()))?;
        // Not the link of our duplicate: that one the kernel would have to make first, and to forget later,
        // where this one was made by listing the table.
        let target = proc.read_link(&format!("fd/{fd}"))?;
        let info = parse_fdinfo(proc.read_record(&format!("fdinfo/{fd}"))?)
            .map_err(|error| proc.bad(error))?;
        Ok(Opened {
            fd,
            file,
            stat,
            target,
            info,
        })
    }
}

/// A descriptor of a stopped task: our own duplicate of it, and what `/proc` says.
#[derive(Debug)]
pub struct FdProbe<'a> {
    proc: &'a ProcDir,
    fd: TaskFd,
    file: Rc<OwnedFd>,
    stat: Stat,
    target: Vec<u8>,
    info: FdInfo,
    carrier: Option<HostPid>,
    pids: Rc<PidView>,
}

impl<'a> FdProbe<'a> {
    /// Opens up descriptor `fd` of the task behind `proc` and `pidfd`.
    pub fn open(
        proc: &'a ProcDir,
        pidfd: &Pidfd,
        fd: TaskFd,
        collector: &mut Collector<'_>,
    ) -> Result<Self, CollectError> {
        let source = Source { proc, pidfd };
        Ok(Self::of(proc, source.open(fd)?, collector.pids()))
    }

    /// Takes what was opened of the task behind `proc`.
    pub(super) fn of(proc: &'a ProcDir, opened: Opened, pids: &Rc<PidView>) -> Self {
        let Opened {
            fd,
            file,
            stat,
            target,
            info,
        } = opened;
        FdProbe {
            proc,
            fd,
            file: Rc::new(file),
            stat,
            target,
            info,
            carrier: None,
            pids: Rc::clone(pids),
        }
    }

    /// Says that the file is in no table but in a message to task `carrier`; what was opened is our copy.
    pub fn in_message_to(self, carrier: HostPid) -> Self {
        FdProbe {
            carrier: Some(carrier),
            ..self
        }
    }

    /// The task in whose table descriptors that the file refers to are found.
    pub fn table(&self) -> HostPid {
        self.carrier.unwrap_or(self.pid())
    }

    /// By what it is told from other descriptors.
    pub(super) fn seen(&self) -> Seen {
        Seen {
            at: (self.pid(), self.fd),
            own: Rc::clone(&self.file),
        }
    }

    /// The task whose table it is in.
    pub fn pid(&self) -> HostPid {
        self.proc.pid()
    }

    /// How the images number processes.
    pub fn pids(&self) -> &PidView {
        &self.pids
    }

    /// `/proc/<pid>` of the task.
    pub fn proc(&self) -> &'a ProcDir {
        self.proc
    }

    /// Its number in the task.
    pub fn fd(&self) -> TaskFd {
        self.fd
    }

    /// Our duplicate. It shares the open file description with the task: do not seek, do not read what
    /// cannot be put back.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Metadata of the file.
    pub fn stat(&self) -> &Stat {
        &self.stat
    }

    /// What `/proc/<pid>/fd/<fd>` points at.
    pub fn target(&self) -> &[u8] {
        &self.target
    }

    /// What `/proc/<pid>/fdinfo/<fd>` says.
    pub fn info(&self) -> &FdInfo {
        &self.info
    }

    /// The type in the file's mode; anonymous inodes have none.
    pub fn file_type(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    /// Whether it is the anonymous inode of this name, such as `[eventfd]`.
    pub fn is_anon(&self, name: &str) -> bool {
        self.target.strip_prefix(b"anon_inode:") == Some(name.as_bytes())
    }

    /// Flags of the open file description, without the descriptor's `O_CLOEXEC` that fdinfo mixes in.
    pub fn flags(&self) -> u32 {
        self.info.flags & !OFlags::CLOEXEC.bits()
    }

    /// Flags of the descriptor: `FD_CLOEXEC` or nothing.
    pub fn fd_flags(&self) -> u32 {
        u32::from(self.info.flags & OFlags::CLOEXEC.bits() != 0)
    }

    /// Whether it was opened with `O_PATH`.
    pub fn is_path(&self) -> bool {
        self.info.flags & OFlags::PATH.bits() != 0
    }

    /// The entry about who gets the file's signals.
    pub fn owner(&self) -> Result<FownEntry, CollectError> {
        if self.is_path() {
            return Ok(no_owner());
        }
        let owner = file_owner(self.file())
            .map_err(|source| self.failed("Asking for the owner", source))?;
        Ok(FownEntry {
            uid: self.pids.owners().uid_inside(owner.uid),
            euid: self.pids.owners().uid_inside(owner.euid),
            signum: owner.signal,
            pid_type: owner.kind,
            pid: self.pids.owner(owner.pid),
        })
    }

    /// The number that an event counter has of its own (`eventfd-id`); 0 for other kinds.
    pub(super) fn counter(&self) -> u64 {
        let is_counter = self.is_anon("[eventfd]");
        let number = is_counter.then(|| self.info_number("eventfd-id", 10).ok());
        number.flatten().unwrap_or(0)
    }

    /// The number after `key:` in fdinfo, in this base.
    pub fn info_number(&self, key: &'static str, radix: u32) -> Result<u64, CollectError> {
        let text = self
            .info
            .value(key)
            .map(String::from_utf8_lossy)
            .unwrap_or_default();
        let digits = text.trim_start_matches("0x");
        u64::from_str_radix(digits, radix).map_err(|_| self.garbled(key))
    }

    /// An error about a call on this descriptor.
    pub fn failed(&self, action: &'static str, source: impl Into<std::io::Error>) -> CollectError {
        CollectError::Fd {
            pid: self.pid(),
            fd: self.fd,
            action,
            source: source.into(),
        }
    }

    /// An error about text in fdinfo that has another form than documented.
    pub fn garbled(&self, what: &'static str) -> CollectError {
        CollectError::Garbled {
            pid: self.pid(),
            what,
            text: String::from_utf8_lossy(&self.info.text).into_owned(),
        }
    }
}

/// The entry of a file that nobody owns.
pub fn no_owner() -> FownEntry {
    FownEntry {
        uid: 0,
        euid: 0,
        signum: 0,
        pid_type: 0,
        pid: 0,
    }
}

/// The name of a file that we have open.
pub(crate) fn own_link(file: BorrowedFd<'_>) -> Result<Vec<u8>, rustix::io::Errno> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::readlink(path, Vec::with_capacity(256)).map(std::ffi::CString::into_bytes)
}
