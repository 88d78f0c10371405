//! The call sites of the engine, and what its errors mean for the exit code.

use std::io::Write;
use std::path::Path;

use floe_dump::{Destination, DumpError, DumpReport, FreezeError, RoundReport, Seal};
use floe_image::ImageDir;
use floe_image::frames::Codec;
use floe_inject::Watch;
use floe_kernel::features::KernelFeatures;
use floe_kernel::ids::HostPid;
use floe_options::{DumpOptions, IterateOptions, RestoreOptions};
use floe_resources::net::NetError;
use floe_resources::restore::{ExecuteError, PlanError};
use floe_restore::RestoreError;

use crate::exit::{Exit, Failure};

/// Dumps a tree; `watch` is this engine's line to its supervisor.
pub fn dump(
    options: &DumpOptions,
    features: &KernelFeatures,
    watch: &Watch,
) -> Result<(), Failure> {
    dump_to(&Destination::default(), options, (features, watch))
}

/// Dumps a tree into an archive.
pub fn dump_to(
    destination: &Destination<'_>,
    options: &DumpOptions,
    (features, watch): (&KernelFeatures, &Watch),
) -> Result<(), Failure> {
    match floe_dump::dump_to(destination, options, features, Some(watch)) {
        Ok(report) => {
            log_report(&report);
            Ok(())
        }
        Err(error) => Err(Failure::new(dump_exit(&error), error)),
    }
}

/// Copies the memory of a tree while it runs.
pub fn pre_dump(
    options: &DumpOptions,
    features: &KernelFeatures,
    watch: &Watch,
) -> Result<(), Failure> {
    match floe_dump::pre_dump(options, features, Some(watch)) {
        Ok(report) => {
            log_report(&report);
            Ok(())
        }
        Err(error) => Err(Failure::new(dump_exit(&error), error)),
    }
}

/// Dumps a tree in rounds, with a line to `say` for each.
pub fn dump_in_rounds(
    (options, seal): (&DumpOptions, Option<&Seal<'_>>),
    rounds: IterateOptions,
    (features, watch): (&KernelFeatures, &Watch),
    say: &dyn Fn(&str),
) -> Result<(), Failure> {
    let mut show = |round: &RoundReport| say(&round_line(round));
    let environment = (features, Some(watch));
    match floe_dump::dump_in_rounds((options, seal), rounds, environment, &mut show) {
        Ok(report) => {
            say(&format!(
                "stopped after {} rounds: {}\n",
                report.rounds, report.reason
            ));
            let (dump, memory) = (report.dump, report.dump.memory);
            say(&format!(
                "final  {:>9} pages copied {:>9} in parent  frozen {:>8.1} ms\n",
                memory.pages_written + memory.shared_written,
                memory.pages_in_parent + memory.shared_in_parent,
                dump.frozen.as_secs_f64() * 1e3,
            ));
            log_report(&dump);
            Ok(())
        }
        Err(error) => Err(Failure::new(dump_exit(&error), error)),
    }
}

fn round_line(round: &RoundReport) -> String {
    let mut line = format!(
        "round {:<2} {:>7} pages copied {:>9} in parent  frozen {:>8.1} ms  took {:>7.0} ms",
        round.number,
        round.pages_written,
        round.pages_in_parent,
        round.frozen.as_secs_f64() * 1e3,
        round.took.as_secs_f64() * 1e3,
    );
    if let (Some(rate), Some(freeze)) = (round.dirty_rate, round.expected_freeze) {
        line.push_str(&format!(
            "  changes {:.0} MiB/s  expected freeze {:.1} ms",
            rate as f64 / (1 << 20) as f64,
            freeze.as_secs_f64() * 1e3
        ));
    }
    line.push('\n');
    line
}

/// Says a line on standard error.
pub fn say(text: &str) {
    // Nobody is left to tell if standard error is closed.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

fn dump_exit(error: &DumpError) -> Exit {
    match error {
        DumpError::Preflight(_) => Exit::Unsupported,
        DumpError::Freeze(error) => freeze_exit(error),
        DumpError::Inject(_)
        | DumpError::Collect(_)
        | DumpError::Scan(_)
        | DumpError::Track(_)
        | DumpError::Tracker { .. }
        | DumpError::Uffd(_)
        | DumpError::Kill { .. } => Exit::Kernel,
        DumpError::NoGeneration { .. }
        | DumpError::Parent(_)
        | DumpError::ParentIndex(_)
        | DumpError::ParentManifest(_) => Exit::BadImage,
        DumpError::OwnParent { .. } => Exit::Usage,
        _ => Exit::Failed,
    }
}

/// A wrong pid is not the kernel's fault.
fn freeze_exit(error: &FreezeError) -> Exit {
    match error {
        FreezeError::NoTask { .. } | FreezeError::Thread { .. } | FreezeError::Ourselves { .. } => {
            Exit::Usage
        }
        FreezeError::RootDead { .. }
        | FreezeError::Traced { .. }
        | FreezeError::Dumped { .. }
        | FreezeError::Kernel { .. }
        | FreezeError::Frozen { .. }
        | FreezeError::LeaderEnded { .. } => Exit::Unsupported,
        FreezeError::Denied { .. }
        | FreezeError::Filtered { .. }
        | FreezeError::Stop { .. }
        | FreezeError::Proc(_) => Exit::Kernel,
        _ => Exit::Failed,
    }
}

fn log_report(report: &DumpReport) {
    tracing::info!(
        "{} tasks, {} threads, {} files; {} pages written, {} left to the parent; frozen for {} us, \
         {} us in all, {} bytes",
        report.tasks,
        report.threads,
        report.files,
        report.memory.pages_written + report.memory.shared_written,
        report.memory.pages_in_parent + report.memory.shared_in_parent,
        report.frozen.as_micros(),
        report.total.as_micros(),
        report.image_bytes
    );
}

/// Compresses the pages of a finished dump, when no task waits for it any more.
pub fn compress(images: &Path, codec: &str) -> Result<(), Failure> {
    let codec =
        Codec::parse(codec).ok_or_else(|| anyhow::anyhow!("--compress {codec}: unknown"))?;
    let report = floe_archive::compress::compress(images, codec, crate::own::processors());
    let report = report.map_err(|error| Failure::new(Exit::Failed, error))?;
    tracing::info!(
        "compressed {} bytes of pages to {}",
        report.content,
        report.stored
    );
    Ok(())
}

/// Restores a tree; gives its root.
pub fn restore(options: &RestoreOptions, features: &KernelFeatures) -> Result<HostPid, Failure> {
    let restored = floe_restore::restore(images(options)?, options, features);
    restored
        .map(|report| HostPid(report.root))
        .map_err(|error| Failure::new(restore_exit(&error), error))
}

/// Opens the images that a restore is to read.
pub fn images(options: &RestoreOptions) -> Result<ImageDir, Failure> {
    if !options.archives.is_empty() {
        let opened = floe_archive::archive::open_set(&options.archives);
        return opened.map_err(|error| Failure::new(Exit::BadImage, error));
    }
    let opened = ImageDir::open(&options.place.images_dir);
    opened.map_err(|error| Failure::new(Exit::BadImage, error))
}

/// The highest pid in the images of a restore.
pub fn highest_pid(options: &RestoreOptions) -> Result<u32, Failure> {
    let highest = floe_restore::highest_pid(&images(options)?);
    highest.map_err(|error| Failure::new(restore_exit(&error), error))
}

/// The steps of a restore, of which none is done.
pub fn dry_run(
    options: &RestoreOptions,
    features: &KernelFeatures,
) -> Result<Vec<String>, Failure> {
    let steps = floe_restore::dry_run(images(options)?, options, features);
    steps.map_err(|error| Failure::new(restore_exit(&error), error))
}

fn restore_exit(error: &RestoreError) -> Exit {
    match error {
        RestoreError::Plan(error) => plan_exit(error),
        RestoreError::Image(_) | RestoreError::NotWhole(_) => Exit::BadImage,
        RestoreError::Cpu(_) => Exit::Unsupported,
        RestoreError::Step { source, .. } => step_exit(source),
        _ => Exit::Failed,
    }
}

fn plan_exit(error: &PlanError) -> Exit {
    match error {
        PlanError::Image(_) | PlanError::Damaged { .. } => Exit::BadImage,
        PlanError::Unsupported { .. }
        | PlanError::NotExternal { .. }
        | PlanError::NeedsOption { .. }
        | PlanError::IdTaken { .. } => Exit::Unsupported,
        PlanError::Missing { .. } => Exit::Kernel,
        _ => Exit::Failed,
    }
}

fn step_exit(error: &ExecuteError) -> Exit {
    match error {
        ExecuteError::Image(_) => Exit::BadImage,
        ExecuteError::File(_)
        | ExecuteError::Address(_)
        | ExecuteError::Group(_)
        | ExecuteError::Net(NetError::Unsupported { .. }) => Exit::Unsupported,
        ExecuteError::Plan(error) => plan_exit(error),
        error if is_damage(error) => Exit::BadImage,
        ExecuteError::Failed { .. } | ExecuteError::Inject(_) | ExecuteError::Memory { .. } => {
            Exit::Kernel
        }
        _ => Exit::Failed,
    }
}

/// Whether the cause is that pages ended early or did not match their checksum.
fn is_damage(error: &ExecuteError) -> bool {
    let first: &dyn std::error::Error = error;
    std::iter::successors(Some(first), |error| error.source())
        .filter_map(|error| error.downcast_ref::<std::io::Error>())
        .any(|error| {
            use std::io::ErrorKind::{InvalidData, UnexpectedEof};
            matches!(error.kind(), InvalidData | UnexpectedEof)
        })
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
