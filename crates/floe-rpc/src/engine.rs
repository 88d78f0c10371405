//! What the server needs of the program around it.

use std::sync::Arc;

use floe_inject::Watch;
use floe_kernel::ids::HostPid;
use floe_options::command::Command;
use floe_options::{Hooks, Settings};

/// Why a request was not done, as the caller is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// `cr_errno`, where the cause has a number that callers look at.
    pub errno: Option<i32>,
    /// The error, and on further lines what to do about it.
    pub lines: Vec<String>,
}

impl Refusal {
    /// A refusal without a number.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            errno: None,
            lines: vec![message.into()],
        }
    }

    /// The options of the request make no sense.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self {
            errno: Some(rustix::io::Errno::BADRQC.raw_os_error()),
            lines: vec![message.into()],
        }
    }

    /// The same with a number.
    pub fn with_errno(mut self, errno: i32) -> Self {
        self.errno = Some(errno);
        self
    }
}

/// Does what requests ask for. Nothing in it may write to standard output or error: those belong to
/// the program that is restored.
pub trait Engine {
    /// The settings before a request: those of the configuration files that hold for everything.
    fn defaults(&self) -> Result<Settings, Refusal>;

    /// Opens the log that the settings name; from now on `tracing` writes there.
    fn start_log(&self, settings: &Settings) -> Result<(), Refusal>;

    /// Dumps or pre-dumps a tree.
    fn dump(
        &self,
        command: Command,
        settings: &Settings,
        hooks: Option<Arc<dyn Hooks>>,
        watch: &Watch,
    ) -> Result<(), Refusal>;

    /// Restores a tree; gives the root's pid as this process sees it.
    fn restore(
        &self,
        settings: &Settings,
        hooks: Option<Arc<dyn Hooks>>,
    ) -> Result<HostPid, Refusal>;

    /// Becomes the command of the request after a restore; only comes back with an error.
    fn become_command(&self, words: &[String]) -> Refusal;

    /// `check`: whether this kernel has what is needed.
    fn check(&self, settings: &Settings) -> Result<(), Refusal>;

    /// Whether a feature is there, by CRIU's name for it.
    fn has_feature(&self, name: &str) -> bool;

    /// Receives the pages of one dump in this very process. `ready` is told the port once it listens (0 for
    /// a socket of the caller's).
    fn page_server(&self, settings: &Settings, ready: &mut dyn FnMut(u16)) -> Result<(), Refusal>;

    /// `cpuinfo dump` and `cpuinfo check`.
    fn cpuinfo(&self, command: Command, settings: &Settings) -> Result<(), Refusal>;
}
