//! The side of the commands.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use floe_kernel::ids::HostPid;
use floe_kernel::proc::{ProcDir, parse_stat};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::message::{MAX_MESSAGE, Message, receive, send};
use super::{Busy, KeeperError, PATIENCE, TreeKey};

/// How long a new keeper may take to answer.
const START: Duration = Duration::from_secs(5);

/// How long a keeper may take to answer anything.
const ANSWER: Duration = Duration::from_secs(5);

/// What a client is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Use what is tracked.
    Read,
    /// Begin a new round: the state of the last one is void from now on.
    Change,
}

/// What a client does where another one is talking to the keeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// Fails at once.
    Not,
    /// Says so in the log, and waits for [`PATIENCE`].
    Patiently,
}

/// A tracked process: pid and start time.
pub type Tracked = (i32, u64);

/// A conversation with the keeper of one tree; no other client gets in while it lasts.
#[derive(Debug)]
pub struct Session {
    key: TreeKey,
    socket: OwnedFd,
    /// What the last round left, empty for nothing.
    pub state: String,
    /// The userfaultfds that are held.
    pub fds: BTreeMap<Tracked, OwnedFd>,
}

impl Session {
    /// Begins to talk to the keeper of a tree; `None` when there is none.
    pub fn open(
        key: &TreeKey,
        purpose: Purpose,
        waiting: Waiting,
    ) -> Result<Option<Session>, KeeperError> {
        let failed = |source| KeeperError::Talk {
            root: key.root,
            source,
        };
        let Some(socket) = connect(key).map_err(failed)? else {
            return Ok(None);
        };
        let owner = sockopt::socket_peercred(&socket).map_err(|errno| failed(errno.into()))?;
        if !owner.uid.is_root() && owner.uid != rustix::process::geteuid() {
            return Err(KeeperError::Foreign {
                root: key.root,
                uid: owner.uid.as_raw(),
            });
        }
        let mut session = Session {
            key: key.clone(),
            socket,
            state: String::new(),
            fds: BTreeMap::new(),
        };
        match session.begin(purpose, waiting) {
            Ok(()) => Ok(Some(session)),
            // It has ended, with the tree or because there was nothing to keep.
            Err(KeeperError::Talk { source, .. }) if is_end(&source) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// As [`Session::open`], after starting a keeper by `program` where there is none.
    pub fn start(key: &TreeKey, program: &Path) -> Result<Session, KeeperError> {
        if let Some(session) = Session::open(key, Purpose::Change, Waiting::Patiently)? {
            return Ok(session);
        }
        let failed = |source| KeeperError::Start {
            root: key.root,
            source,
        };
        let mut keeper = Command::new(program)
            .args(["keeper", &key.root.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let started = Instant::now();
        loop {
            if let Some(session) = Session::open(key, Purpose::Change, Waiting::Patiently)? {
                return Ok(session);
            }
            let ended = keeper.try_wait().map_err(failed)?.is_some();
            if started.elapsed() > START || (ended && connect(key).map_err(failed)?.is_none()) {
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
            std::thread::sleep(Duration::from_micros(300));
        }
    }

    fn begin(&mut self, purpose: Purpose, waiting: Waiting) -> Result<(), KeeperError> {
        let word = match purpose {
            Purpose::Read => "read",
            Purpose::Change => "change",
        };
        self.send(&format!("begin {word}"), None)?;
        let mut deadline = Instant::now() + ANSWER;
        let mut busy = None;
        loop {
            let message = self.receive_before(deadline, busy)?;
            match message.words().as_slice() {
                ["busy", client] => {
                    let by = client.parse().map(|pid| asked_by(HostPid(pid)));
                    let by = by.map_err(|_| self.failed(io::ErrorKind::InvalidData.into()))?;
                    self.wait_for(by, waiting)?;
                    (busy, deadline) = (Some(by), Instant::now() + PATIENCE);
                }
                ["fd", pid, start] => {
                    let key = pid.parse().ok().zip(start.parse().ok());
                    let (Some(key), Some(fd)) = (key, message.fd) else {
                        return Err(self.failed(io::ErrorKind::InvalidData.into()));
                    };
                    self.fds.insert(key, fd);
                }
                ["state", ..] => {
                    let state = message.text.strip_prefix("state").unwrap_or_default();
                    self.state = state.trim_start().to_string();
                    return Ok(());
                }
                _ => return Err(self.failed(io::ErrorKind::InvalidData.into())),
            }
        }
    }

    fn wait_for(&self, by: HostPid, waiting: Waiting) -> Result<(), KeeperError> {
        let root = self.key.root;
        match waiting {
            Waiting::Not => Err(KeeperError::InUse { root, by }),
            Waiting::Patiently => {
                tracing::warn!("{}", Busy { root, by });
                Ok(())
            }
        }
    }

    /// Hands over a descriptor, in place of an earlier one for the same process.
    pub fn keep(&self, tracked: Tracked, fd: impl AsFd) -> Result<(), KeeperError> {
        self.send(&format!("fd {} {}", tracked.0, tracked.1), Some(fd.as_fd()))
    }

    /// Has the descriptor of a process closed.
    pub fn release(&self, tracked: Tracked) -> Result<(), KeeperError> {
        self.send(&format!("drop {} {}", tracked.0, tracked.1), None)
    }

    /// Ends a round: `state`, of at most [`Session::MAX_STATE`] bytes, is what the next one gets.
    pub fn commit(&self, state: &str) -> Result<(), KeeperError> {
        self.send(&format!("commit {state}"), None)?;
        self.receive().map(drop)
    }

    /// Longest state in bytes.
    pub const MAX_STATE: usize = MAX_MESSAGE - 64;

    /// Ends the keeper, and with it the tracking.
    pub fn stop(self) -> Result<(), KeeperError> {
        self.send("stop", None)?;
        self.receive().map(drop)
    }

    fn send(&self, text: &str, fd: Option<std::os::fd::BorrowedFd<'_>>) -> Result<(), KeeperError> {
        send(&self.socket, text, fd).map_err(|source| self.failed(source))
    }

    fn receive(&self) -> Result<Message, KeeperError> {
        self.receive_before(Instant::now() + ANSWER, None)
    }

    /// Waits for a message; `busy` is whom the keeper talks to before.
    fn receive_before(
        &self,
        deadline: Instant,
        busy: Option<HostPid>,
    ) -> Result<Message, KeeperError> {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: left.subsec_nanos().into(),
        };
        match (rustix::event::poll(&mut fds, Some(&left)), busy) {
            (Ok(0), Some(by)) => Err(KeeperError::Busy {
                root: self.key.root,
                by,
            }),
            (Ok(0), None) => Err(self.failed(io::ErrorKind::TimedOut.into())),
            (Ok(_), _) => receive(&self.socket).map_err(|source| self.failed(source)),
            (Err(errno), _) => Err(self.failed(errno.into())),
        }
    }

    fn failed(&self, source: io::Error) -> KeeperError {
        KeeperError::Talk {
            root: self.key.root,
            source,
        }
    }
}

/// Who is dumping the tree under `root` at this moment.
pub fn busy_with(root: HostPid) -> Option<Busy> {
    let key = TreeKey::of(root).ok()?;
    match Session::open(&key, Purpose::Read, Waiting::Not) {
        Err(KeeperError::InUse { root, by }) => Some(Busy { root, by }),
        _ => None,
    }
}

/// The process that a user knows of a client: the engine of a dump is a copy of its supervisor.
pub fn asked_by(client: HostPid) -> HostPid {
    let line = |pid: HostPid| std::fs::read(format!("/proc/{pid}/cmdline")).ok();
    let parent = || {
        let proc = ProcDir::open(client).ok()?;
        let stat = parse_stat(&proc.read("stat").ok()?).ok()?;
        (line(stat.ppid) == Some(line(client)?)).then_some(stat.ppid)
    };
    parent().unwrap_or(client)
}

/// Whether another process runs the same program as this one.
pub fn is_engine(process: HostPid) -> bool {
    // A thread of ours is no other.
    if Path::new("/proc/self/task")
        .join(process.to_string())
        .exists()
    {
        return false;
    }
    let program = |who: &str| std::fs::read_link(format!("/proc/{who}/exe")).ok();
    program("self").is_some_and(|own| Some(own) == program(&process.to_string()))
}

fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

fn connect(key: &TreeKey) -> io::Result<Option<OwnedFd>> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    match rustix::net::connect(&socket, &key.address()?) {
        Ok(()) => Ok(Some(socket)),
        Err(rustix::io::Errno::CONNREFUSED) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}
