//! Why a dump failed.

use std::fmt;
use std::io;
use std::path::PathBuf;

use floe_image::manifest::ManifestError;
use floe_image::{ImageError, WriteError};
use floe_inject::InjectError;
use floe_kernel::ids::HostPid;
use floe_kernel::proc::ProcError;
use floe_memory::{CopyError, DedupError, IndexError, ScanError, TrackError};
use floe_options::HookError;
use floe_resources::{CollectError, Obstacle};

use crate::keeper::KeeperError;

/// Why a dump failed. In every case the tasks run on as before, except after [`DumpError::Kill`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DumpError {
    /// The tree could not be stopped.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// Something in the tree cannot be saved: everything that is in the way.
    #[error("{0}")]
    Preflight(Obstacles),
    /// A kernel object could not be read.
    #[error("Collecting the state of the tasks")]
    Collect(#[source] CollectError),
    /// TCP connections did not leave repair mode.
    #[error("Letting TCP connections go on")]
    Connections(#[source] std::io::Error),
    /// Connections could not be kept locked for the restore.
    #[error(transparent)]
    Lock(#[from] floe_resources::netlock::LockError),
    /// A task could not be driven.
    #[error("Asking the tasks")]
    Inject(#[from] InjectError),
    /// The pages to save could not be found.
    #[error("Saving memory")]
    Scan(#[from] ScanError),
    /// Changed pages could not be told from others.
    #[error("Finding the changed pages")]
    Track(#[from] TrackError),
    /// This kernel does not have the tracker that was asked for.
    #[error(
        "This kernel has no `{tracker}` tracker: leave out --tracker, or use `--tracker content`"
    )]
    Tracker { tracker: &'static str },
    /// A userfaultfd could not be made in a task.
    #[error("Making a userfaultfd in a task")]
    Uffd(#[source] io::Error),
    /// What was dumped could not be made a whole.
    #[error("Writing the archive; the tree runs on")]
    Seal(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The keeper of the tree's userfaultfds could not be used.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// The generation to build on cannot be read.
    #[error("Reading the parent generation (--prev-images-dir, relative to the images directory)")]
    Parent(#[from] ImageError),
    /// The directory of the images is among those of the generations to build on.
    #[error(
        "The images would take the place of what they build on: {} is --prev-images-dir {} or a parent of that. \
         Give each generation a directory of its own (-D)",
        images.display(), link.display()
    )]
    OwnParent { images: PathBuf, link: PathBuf },
    /// An earlier checkpoint in the directory cannot be kept until the new one is whole.
    #[error("Setting aside the checkpoint that is in {}", path.display())]
    Aside {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// There is nothing to build on.
    #[error(
        "{} holds no generation to build on (--prev-images-dir): it is empty, or its round was never finished",
        path.display()
    )]
    NoGeneration { path: PathBuf },
    /// Another dump writes to the directory.
    #[error(
        "{} is being written by another dump: wait for its end, or give each dump a directory of its own (-D)",
        path.display()
    )]
    DirectoryTaken { path: PathBuf },
    /// The index of the generation to build on cannot be read.
    #[error("Reading the parent generation")]
    ParentIndex(#[from] IndexError),
    /// The manifest of the generation to build on cannot be read.
    #[error("Reading the parent generation")]
    ParentManifest(#[from] ManifestError),
    /// Room in the parents could not be given back; the dump itself is whole.
    #[error("The images are complete, but pages that they replace stay in the parents")]
    Dedup(#[from] DedupError),
    /// The directory of a round could not be made.
    #[error("Making the directory of a round, {}", path.display())]
    Generation {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The program ended while its memory was copied.
    #[error(
        "Task {pid} ended while its memory was copied: there is nothing to checkpoint any more"
    )]
    Ended { pid: HostPid },
    /// There is no connection to the page server.
    #[error(transparent)]
    Connect(#[from] floe_transfer::ConnectError),
    /// The descriptor of `--ps-socket`.
    #[error("Using descriptor {fd} (--ps-socket)")]
    PageSocket {
        fd: i32,
        #[source]
        source: io::Error,
    },
    /// Pages did not arrive at the page server.
    #[error("Saving memory")]
    Send(#[from] floe_transfer::SendError),
    /// Pages could not be saved.
    #[error("Saving memory")]
    Copy(#[from] CopyError),
    /// Whoever asked for the dump is gone.
    #[error("The dump was called off: the process that asked for it has ended")]
    Cancelled,
    /// An image could not be written.
    #[error("Writing the images")]
    Write(#[from] WriteError),
    /// The caller's script refused.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The images are whole, but the tasks could not be ended.
    #[error("The images are complete, but task {pid} could not be ended")]
    Kill {
        pid: HostPid,
        #[source]
        source: io::Error,
    },
}

impl From<CollectError> for DumpError {
    fn from(error: CollectError) -> Self {
        match error {
            CollectError::Unsupported(obstacle) => DumpError::Preflight(Obstacles(vec![obstacle])),
            CollectError::Write(error) => DumpError::Write(error),
            CollectError::Inject(error) => DumpError::Inject(error),
            CollectError::Copy(error) => DumpError::Copy(error),
            CollectError::Scan(error) => DumpError::Scan(error),
            other => DumpError::Collect(other),
        }
    }
}

impl From<ProcError> for DumpError {
    fn from(error: ProcError) -> Self {
        DumpError::Collect(error.into())
    }
}

/// Everything that is in the way of a dump, one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacles(pub Vec<Obstacle>);

impl fmt::Display for Obstacles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.len() {
            1 => write!(f, "Refused, nothing was changed: {}", self.0[0]),
            count => {
                write!(f, "Refused for {count} reasons, nothing was changed:")?;
                self.0
                    .iter()
                    .try_for_each(|obstacle| write!(f, "\n  - {obstacle}"))
            }
        }
    }
}

/// Why a tree could not be stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FreezeError {
    /// There is no such task.
    #[error("There is no task {pid}")]
    NoTask { pid: HostPid },
    /// A thread that is no process.
    #[error("Task {tid} is a thread of process {pid}: give the pid of the process (-t {pid})")]
    Thread { tid: HostPid, pid: HostPid },
    /// The root is a zombie.
    #[error("Task {pid} is dead already: it waits for its parent to take note")]
    RootDead { pid: HostPid },
    /// The coordinator is inside.
    #[error(
        "Task {pid} is in the tree to be dumped and is this very program: run it from outside of the tree"
    )]
    Ourselves { pid: HostPid },
    /// A debugger was first.
    #[error("Task {pid} is being traced by task {tracer}: end the debugger or tracer first")]
    Traced { pid: HostPid, tracer: HostPid },
    /// Another engine was first.
    #[error(
        "Task {pid} is being dumped by process {by} at this moment: wait for its end and try again"
    )]
    Dumped { pid: HostPid, by: HostPid },
    /// The main thread ended, others go on.
    #[error(
        "The main thread of task {pid} has ended while others run: this cannot be checkpointed"
    )]
    LeaderEnded { pid: HostPid },
    /// Its filter would be in the way of our calls.
    #[error(
        "Task {pid} has a system call filter, which only root without one may suspend: run Floe as root, \
         in a container with --security-opt seccomp=unconfined"
    )]
    Filtered { pid: HostPid },
    /// It has no memory of its own.
    #[error(
        "Task {pid} is a thread of the kernel, which cannot be checkpointed: give the pid of a program"
    )]
    Kernel { pid: HostPid },
    /// We may not trace it.
    #[error(
        "Task {pid} may not be traced: run Floe as root, or with CAP_SYS_PTRACE and all capabilities that the task has"
    )]
    Denied { pid: HostPid },
    /// The kernel refused.
    #[error("Stopping task {pid}")]
    Stop {
        pid: HostPid,
        #[source]
        source: InjectError,
    },
    /// A control group holds it.
    #[error(
        "Task {pid} is frozen by the control group {group}, and could not answer: thaw that (`cgroup.freeze`, \
         `freezer.state`), or name it by --freeze-cgroup if all of the tree is in it"
    )]
    Frozen { pid: HostPid, group: String },
    /// New tasks came faster than they could be stopped, or one is stuck.
    #[error(
        "The tree did not come to rest within {seconds} s: {tasks} tasks were stopped (raise --timeout)"
    )]
    Timeout { seconds: u64, tasks: usize },
    /// The control group of `--freeze-cgroup`.
    #[error(transparent)]
    Group(#[from] floe_resources::cgroup::freezer::FreezerError),
    /// `/proc` could not be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
}
