//! The keeper: a small process that holds the userfaultfds of a tracked tree between two commands.
//!
//! A userfaultfd tracks only as long as it is open, and a chain of checkpoints is many commands. The
//! keeper waits on a socket named after the root's pid, its start time and the boot, and ends with the
//! root. It serves one client at a time, which is what keeps two rounds of one tree apart. It knows
//! nothing: what the client leaves is given to the next one as it was. A client that said it would
//! change the tracking and never came to [`Session::commit`] leaves no state, so the next dump takes
//! everything; if no client ever came to that, the keeper ends. Clients that come meanwhile are told whom
//! they wait for.

mod client;
mod message;
mod serve;

use std::io;
use std::time::Duration;

use floe_kernel::ids::HostPid;
use floe_kernel::proc::{ProcDir, ProcError, parse_stat};
use rustix::net::SocketAddrUnix;

pub use client::{Purpose, Session, Tracked, Waiting, asked_by, busy_with, is_engine};
pub use serve::serve;

/// How long a client waits for another one to be done.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Which tree a keeper is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeKey {
    pub root: HostPid,
    /// Clock ticks since boot: tells a reused pid.
    pub start_time: u64,
    /// Which boot it is, and in which pid namespace the number of the root is: names of keepers are those of
    /// a network, which others may share.
    place: String,
}

impl TreeKey {
    /// The key of the tree under a living task.
    pub fn of(root: HostPid) -> Result<TreeKey, ProcError> {
        let proc = ProcDir::open(root)?;
        let stat = parse_stat(&proc.read("stat")?).map_err(|error| proc.bad(error))?;
        // Without it two boots cannot be told apart, but no keeper lives through one either.
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let pids = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        Ok(TreeKey {
            root,
            start_time: stat.start_time,
            place: format!("{}-{}", boot.trim_end(), pids.display()),
        })
    }

    fn address(&self) -> io::Result<SocketAddrUnix> {
        let name = format!(
            "floe/keeper/{}-{}-{}",
            self.root, self.start_time, self.place
        );
        Ok(SocketAddrUnix::new_abstract_name(name.as_bytes())?)
    }
}

/// Somebody else is dumping a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy {
    pub root: HostPid,
    /// The process that was asked to.
    pub by: HostPid,
}

impl std::fmt::Display for Busy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Busy { root, by } = self;
        let seconds = PATIENCE.as_secs();
        write!(
            f,
            "process {by} is dumping the tree of task {root}: waiting for its end, up to {seconds} s"
        )
    }
}

/// The keeper could not be used.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error("Talking to the keeper of task {root}")]
    Talk {
        root: HostPid,
        #[source]
        source: io::Error,
    },
    #[error("Starting the keeper of task {root}")]
    Start {
        root: HostPid,
        #[source]
        source: io::Error,
    },
    /// Another client was not done in time.
    #[error(
        "Process {by} is still dumping the tree of task {root} after {} s: wait for its end, or end it \
         (`kill {by}`; the tree runs on), and try again",
        PATIENCE.as_secs()
    )]
    Busy { root: HostPid, by: HostPid },
    /// There is another client, for which this one was not to wait.
    #[error("Process {by} is dumping the tree of task {root}")]
    InUse { root: HostPid, by: HostPid },
    #[error("The keeper of task {root} belongs to user {uid}, not to us")]
    Foreign { root: HostPid, uid: u32 },
    #[error(transparent)]
    Proc(#[from] ProcError),
}
