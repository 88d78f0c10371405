//! The call sites of the engine, and what its errors mean for the exit code.

use floe_kernel::features::KernelFeatures;
use floe_options::{DumpOptions, RestoreOptions};

use crate::exit::{Exit, Failure};

/// What is printed by `--display-stats`: a name and a value with its unit.
pub type Statistics = Vec<(&'static str, String)>;

/// Dumps a tree.
pub fn dump(_options: &DumpOptions, _features: &KernelFeatures) -> Result<Statistics, Failure> {
    Err(Failure::new(
        Exit::Unsupported,
        anyhow::anyhow!("dump is not built into this binary yet"),
    ))
}

/// Restores a tree.
pub fn restore(
    _options: &RestoreOptions,
    _features: &KernelFeatures,
) -> Result<Statistics, Failure> {
    Err(Failure::new(
        Exit::Unsupported,
        anyhow::anyhow!("restore is not built into this binary yet"),
    ))
}

/// Waits until all children of ours have ended, as CRIU does without `--restore-detached`: the
/// restored root, and tasks that lost their parent to us. Their status is not ours.
pub fn wait_for_children() -> Result<Exit, Failure> {
    use rustix::io::Errno;
    loop {
        match rustix::process::wait(rustix::process::WaitOptions::empty()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::CHILD) => return Ok(Exit::Done),
            Err(error) => {
                return Err(anyhow::anyhow!("waiting for the restored tasks: {error}").into());
            }
        }
    }
}
