//! Points of an operation at which the caller takes part: action scripts and RPC notifications.

use std::os::fd::BorrowedFd;

use crate::External;

/// A point at which CRIU runs action scripts or sends a notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    PreDump,
    PostDump,
    PreRestore,
    PostRestore,
    NetworkLock,
    NetworkUnlock,
    SetupNamespaces,
    PostSetupNamespaces,
    PreResume,
    PostResume,
    PreStream,
    OrphanPtsMaster,
    StatusReady,
    QueryExtFiles,
}

impl Action {
    /// The name in `CRTOOLS_SCRIPT_ACTION` and in RPC notifications.
    pub fn name(self) -> &'static str {
        match self {
            Self::PreDump => "pre-dump",
            Self::PostDump => "post-dump",
            Self::PreRestore => "pre-restore",
            Self::PostRestore => "post-restore",
            Self::NetworkLock => "network-lock",
            Self::NetworkUnlock => "network-unlock",
            Self::SetupNamespaces => "setup-namespaces",
            Self::PostSetupNamespaces => "post-setup-namespaces",
            Self::PreResume => "pre-resume",
            Self::PostResume => "post-resume",
            Self::PreStream => "pre-stream",
            Self::OrphanPtsMaster => "orphan-pts-master",
            Self::StatusReady => "status-ready",
            Self::QueryExtFiles => "query-ext-files",
        }
    }
}

/// What the engine tells at an [`Action`].
#[derive(Debug, Clone, Copy)]
pub struct HookEvent<'a> {
    /// The point that was reached.
    pub action: Action,
    /// The tree's root in the caller's pid namespace, once there is one.
    pub root_pid: Option<i32>,
    /// The master side of an orphan pty, for `OrphanPtsMaster` only.
    pub master: Option<BorrowedFd<'a>>,
}

impl HookEvent<'_> {
    /// An event without a descriptor.
    pub fn new(action: Action, root_pid: Option<i32>) -> Self {
        Self {
            action,
            root_pid,
            master: None,
        }
    }
}

/// A hook that said no.
#[derive(Debug, thiserror::Error)]
#[error("The hook for {action} failed: {reason}", action = .action.name())]
pub struct HookError {
    /// Where it was.
    pub action: Action,
    /// What it said or how it ended.
    pub reason: String,
}

/// The caller's part. The engine calls [`Hooks::run`] at every action and fails when it fails,
/// except for `PostResume` and `NetworkUnlock`, where the error can only be logged.
pub trait Hooks: Send + Sync {
    /// Runs what the caller has for this event and returns when it is done.
    fn run(&self, event: HookEvent<'_>) -> Result<(), HookError>;

    /// Whether somebody may look at the images at `PostDump`, while the tree stands still.
    fn watches_dumps(&self) -> bool;

    /// Asks for resources that shall not be saved, beyond those of the options, once the tree stands
    /// still (`QueryExtFiles`).
    fn external_files(&self) -> Result<Vec<External>, HookError>;
}

/// No scripts and nobody to notify.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoHooks;

impl Hooks for NoHooks {
    fn run(&self, _event: HookEvent<'_>) -> Result<(), HookError> {
        Ok(())
    }

    fn watches_dumps(&self) -> bool {
        false
    }

    fn external_files(&self) -> Result<Vec<External>, HookError> {
        Ok(Vec::new())
    }
}
