//! Why something could not be collected.

use std::io;

use floe_image::WriteError;
use floe_inject::InjectError;
use floe_kernel::ids::{HostPid, TaskFd};
use floe_kernel::proc::ProcError;
use floe_memory::{CopyError, ScanError};

/// Something in a task that cannot be saved, with what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    pub pid: HostPid,
    /// What it is, such as `fd 5 (anon_inode:[io_uring])`.
    pub object: String,
    /// What the user can do.
    pub remedy: String,
}

impl Obstacle {
    /// An obstacle that is a descriptor.
    pub fn fd(
        pid: HostPid,
        fd: TaskFd,
        what: impl std::fmt::Display,
        remedy: impl Into<String>,
    ) -> Self {
        Obstacle {
            pid,
            object: format!("fd {fd} ({what})"),
            remedy: remedy.into(),
        }
    }
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "task {}: {} cannot be checkpointed: {}",
            self.pid, self.object, self.remedy
        )
    }
}

/// Collecting a kernel object failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CollectError {
    /// It can never be saved as it is.
    #[error("{0}")]
    Unsupported(Obstacle),
    /// `/proc` could not be read or understood.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// A descriptor could not be looked into.
    #[error("{action} of fd {fd} of task {pid}")]
    Fd {
        pid: HostPid,
        fd: TaskFd,
        action: &'static str,
        #[source]
        source: io::Error,
    },
    /// The kernel refused to tell something about a task.
    #[error("{action} of task {pid}")]
    Task {
        pid: HostPid,
        action: &'static str,
        #[source]
        source: io::Error,
    },
    /// The kernel refused something that is not of a task.
    #[error("{action}")]
    System {
        action: String,
        #[source]
        source: io::Error,
    },
    /// Something in `/proc` or from a system call does not read as documented.
    #[error("Task {pid}: {what} is not as the kernel documents it: {text}")]
    Garbled {
        pid: HostPid,
        what: &'static str,
        text: String,
    },
    /// A remote call failed.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// Looking for pages failed.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// Copying pages failed.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// The network could not be locked.
    #[error(transparent)]
    Lock(#[from] crate::netlock::LockError),
    /// The content of a network namespace could not be read.
    #[error(transparent)]
    Net(#[from] crate::net::NetError),
    /// An image could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}
