//! What can go wrong with a foreign task.

use std::borrow::Cow;
use std::io;

use floe_kernel::ids::HostPid;
use floe_kernel::ptrace::WaitStatus;

/// Why a task could not be driven.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    #[error("ptrace {request} of task {pid}")]
    Ptrace {
        pid: HostPid,
        request: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("Task {pid} died while it was being handled ({status:?})")]
    Died { pid: HostPid, status: WaitStatus },
    #[error("Task {pid} cannot stop now")]
    GivenUp { pid: HostPid },
    #[error("Task {pid} did not stop within {seconds} s: it is stuck in the kernel")]
    Stuck { pid: HostPid, seconds: u64 },
    #[error("Task {pid} stopped unexpectedly ({status:?}) instead of {expected}")]
    UnexpectedStop {
        pid: HostPid,
        status: WaitStatus,
        expected: &'static str,
    },
    #[error("Task {pid}: {label} failed")]
    Call {
        pid: HostPid,
        label: Cow<'static, str>,
        index: usize,
        #[source]
        source: io::Error,
    },
    #[error("Writing the program of task {pid}")]
    WriteProgram {
        pid: HostPid,
        #[source]
        source: io::Error,
    },
    #[error("Reading the results of task {pid}")]
    ReadResults {
        pid: HostPid,
        #[source]
        source: io::Error,
    },
    #[error("A program of {bytes} bytes for task {pid} does not fit its arena of {arena} bytes")]
    TooLarge {
        pid: HostPid,
        bytes: usize,
        arena: usize,
    },
    #[error("Task {pid} has no executable memory with a system call instruction")]
    NoGate { pid: HostPid },
    #[error("Making the first task of the tree (pid {pid})")]
    Spawn {
        pid: HostPid,
        #[source]
        source: io::Error,
    },
    #[error("Mapping {bytes} bytes for the executor")]
    MapArena {
        bytes: usize,
        #[source]
        source: io::Error,
    },
}

impl InjectError {
    /// The errno of a call that the kernel refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            InjectError::Call { source, .. }
            | InjectError::Spawn { source, .. }
            | InjectError::Ptrace { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

pub(crate) trait OnTask<T> {
    fn on(self, pid: HostPid, request: &'static str) -> Result<T, InjectError>;
}

impl<T> OnTask<T> for io::Result<T> {
    fn on(self, pid: HostPid, request: &'static str) -> Result<T, InjectError> {
        self.map_err(|source| InjectError::Ptrace {
            pid,
            request,
            source,
        })
    }
}
