//! The call sites of the engine, and what its errors mean for the exit code.

use floe_dump::{DumpError, DumpReport};
use floe_kernel::features::KernelFeatures;
use floe_options::{DumpOptions, RestoreOptions};

use crate::exit::{Exit, Failure};

/// What is printed by `--display-stats`: a name and a value with its unit.
pub type Statistics = Vec<(&'static str, String)>;

/// Dumps a tree.
pub fn dump(options: &DumpOptions, features: &KernelFeatures) -> Result<Statistics, Failure> {
    match floe_dump::dump(options, features) {
        Ok(report) => Ok(dump_statistics(&report)),
        Err(error) => Err(Failure::new(dump_exit(&error), error)),
    }
}

fn dump_exit(error: &DumpError) -> Exit {
    match error {
        DumpError::Preflight(_) => Exit::Unsupported,
        DumpError::Freeze(_)
        | DumpError::Inject(_)
        | DumpError::Collect(_)
        | DumpError::Scan(_) => Exit::Kernel,
        _ => Exit::Failed,
    }
}

fn dump_statistics(report: &DumpReport) -> Statistics {
    let micros = |time: std::time::Duration| format!("{} us", time.as_micros());
    vec![
        ("Freezing time", micros(report.freezing)),
        ("Frozen time", micros(report.frozen)),
        ("Memory dump time", micros(report.memory_reading)),
        ("Memory write time", micros(report.memory_writing)),
        ("Total time", micros(report.total)),
        ("Tasks", report.tasks.to_string()),
        ("Threads", report.threads.to_string()),
        ("Open files", report.files.to_string()),
        (
            "Memory pages scanned",
            report.memory.pages_scanned.to_string(),
        ),
        (
            "Memory pages written",
            report.memory.pages_written.to_string(),
        ),
        (
            "Shared pages written",
            report.memory.shared_written.to_string(),
        ),
        ("Image size", format!("{} bytes", report.image_bytes)),
    ]
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
