//! The command line's hooks: action scripts and `--status-fd`.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};

use floe_options::{Action, External, HookError, HookEvent, Hooks};

/// Runs each `--action-script` at each action, with CRIU's environment.
pub struct Scripts {
    /// Programs, searched in PATH.
    pub scripts: Vec<String>,
    /// The scripts' current directory.
    pub work_dir: PathBuf,
    /// CRTOOLS_IMAGE_DIR.
    pub images_dir: PathBuf,
    /// Told by a zero byte and closed at `StatusReady`.
    pub status: Mutex<Option<OwnedFd>>,
}

impl Hooks for Scripts {
    fn run(&self, event: HookEvent<'_>) -> Result<(), HookError> {
        let action = event.action;
        let failed = |reason: String| HookError { action, reason };
        // Only the RPC has these two, as in CRIU.
        if matches!(action, Action::OrphanPtsMaster | Action::QueryExtFiles) {
            return Ok(());
        }
        for script in &self.scripts {
            tracing::debug!("running {script} for {}", action.name());
            let mut command = Command::new(script);
            command
                .env("CRTOOLS_SCRIPT_ACTION", action.name())
                .env("CRTOOLS_IMAGE_DIR", &self.images_dir);
            if let Some(pid) = event.root_pid {
                command.env("CRTOOLS_INIT_PID", pid.to_string());
            }
            let status = command
                .current_dir(&self.work_dir)
                .status()
                .map_err(|e| failed(format!("{script}: {e}")))?;
            if !status.success() {
                return Err(failed(format!("{script}: {status}")));
            }
        }
        if action == Action::StatusReady {
            let status = self.status.lock().ok().and_then(|mut status| status.take());
            if let Some(fd) = status {
                rustix::io::write(&fd, &[0])
                    .map_err(|error| failed(format!("--status-fd: {error}")))?;
            }
        }
        Ok(())
    }

    fn watches_dumps(&self) -> bool {
        !self.scripts.is_empty()
    }

    fn external_files(&self) -> Result<Vec<External>, HookError> {
        Ok(Vec::new())
    }
}

/// Scripts of configuration files beside a caller who is notified: the caller comes first, as in CRIU.
pub struct CallerAndScripts {
    /// The caller of a request.
    pub caller: Arc<dyn Hooks>,
    /// The scripts.
    pub scripts: Arc<Scripts>,
}

impl Hooks for CallerAndScripts {
    fn run(&self, event: HookEvent<'_>) -> Result<(), HookError> {
        self.caller.run(event)?;
        self.scripts.run(event)
    }

    fn watches_dumps(&self) -> bool {
        self.caller.watches_dumps() || self.scripts.watches_dumps()
    }

    fn external_files(&self) -> Result<Vec<External>, HookError> {
        self.caller.external_files()
    }
}
