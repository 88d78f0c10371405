//! The keeper: a small process that holds the userfaultfds of a tracked tree between two commands.
//!
//! A userfaultfd tracks only as long as it is open, and a chain of checkpoints is many commands. The
//! keeper waits on a socket named after the root's pid, its start time and the boot, and ends with the
//! root. It serves one client at a time, which is what keeps two rounds of one tree apart. It knows
//! nothing: what the client leaves is given to the next one as it was. A client that said it would
//! change the tracking and never came to [`Session::commit`] leaves no state, so the next dump takes
//! everything.

mod client;
mod message;
mod serve;

use std::io;
use std::time::Duration;

use floe_kernel::ids::HostPid;
use floe_kernel::proc::{ProcDir, ProcError, parse_stat};
use rustix::net::SocketAddrUnix;

pub use client::{Purpose, Session, Tracked};
pub use serve::serve;

/// How long a keeper may be busy with another client.
const PATIENCE: Duration = Duration::from_secs(20);

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
    #[error("Another dump of the tree of task {root} is under way: try again when it is done")]
    Busy { root: HostPid },
    #[error("The keeper of task {root} belongs to user {uid}, not to us")]
    Foreign { root: HostPid, uid: u32 },
    #[error(transparent)]
    Proc(#[from] ProcError),
}
