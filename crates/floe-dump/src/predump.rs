//! A pre-dump: memory is copied while the program runs, which stops only to begin a new round.
//!
//! The order decides: writes to a page are noticed from a moment on, and the page is read after it. Where
//! they were noticed before, that moment is one at which the program stood still; what is tracked for the
//! first time is protected while it runs. A page that is torn, because the program wrote to it meanwhile, is found changed by the
//! next round and copied again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use floe_image::ImageWriter;
use floe_image::manifest::DumpKind;
use floe_inject::Watch;
use floe_kernel::fault;
use floe_kernel::features::KernelFeatures;
use floe_kernel::ids::HostPid;
use floe_kernel::proc::ProcDir;
use floe_memory::PageRun;
use floe_options::{Action, DumpOptions, HookEvent};
use floe_resources::collect::Segment;
use rustix::fs::OFlags;

use crate::dir_lock::DirLock;
use crate::error::DumpError;
use crate::freeze::{self, FrozenTree};
use crate::memory::{LiveTask, MemoryDump};
use crate::pace::Pace;
use crate::pagemap_out::connect;
use crate::report::DumpReport;
use crate::track::{Round, TaskAreas, Tracking, live_source, refuse_own_parent};
use crate::unfinished::Unfinished;
use crate::{dedup, durability, preflight, release, run_id, segments, set_aside, stop, write};

type Unsure = Arc<Mutex<Vec<PageRun>>>;

/// Copies the memory of the tree `options.tree` into `options.place` while it runs.
///
/// As for [`crate::dump`], the calling thread becomes the tracer for a moment.
pub fn pre_dump(
    options: &DumpOptions,
    features: &KernelFeatures,
    watch: Option<&Watch>,
) -> Result<DumpReport, DumpError> {
    let root = HostPid(options.tree.get());
    round(options, None, (features, watch)).map_err(|error| match error {
        // Its keeper ends with it.
        DumpError::Keeper(_) if ProcDir::open(root).is_err() => DumpError::Ended { pid: root },
        error => error,
    })
}

/// A pre-dump; the first round of a dump looks whether that can be made at all.
pub fn round(
    options: &DumpOptions,
    for_dump: Option<&DumpOptions>,
    (features, watch): (&KernelFeatures, Option<&Watch>),
) -> Result<DumpReport, DumpError> {
    let started = Instant::now();
    let root = HostPid(options.tree.get());
    freeze::look(root)?;
    refuse_own_parent(&options.place)?;
    let event = HookEvent::new(Action::PreDump, Some(root.0));
    options.hooks.run(event)?;
    if let Some(dump) = for_dump {
        preflight::look(dump, features, watch)?;
    }
    let images = &options.place.images_dir;
    let _ours = DirLock::take(images)?;
    let _aside = set_aside(options)?;
    let writer = ImageWriter::create(images, durability(images))?;
    let mut unfinished = Unfinished::of(&writer);
    let server = options.page_server.as_ref().map(connect).transpose()?;
    let mut tracking = Tracking::open(options, features, Round::New)?;
    tracking.lineage().write_link(&writer)?;
    let uptime = write::uptime();
    let stopping = Instant::now();
    let mut tree = stop(root, options, watch)?;
    let mut report = DumpReport {
        freezing: stopping.elapsed(),
        tasks: tree.tasks.len(),
        threads: tree.thread_count(),
        ..DumpReport::default()
    };
    let areas = tracking.begin_round(&mut tree)?;
    let segments = segments::open_mapped(&tree, &areas)?;
    let tasks = open_all(&tree, areas)?;
    release::resume(tree)?;
    report.frozen = stopping.elapsed();
    tracing::info!(
        frozen_us = report.frozen.as_micros() as u64,
        "the tree runs on"
    );
    tracking.arm_fresh()?;
    let mut memory = MemoryDump::incremental(&writer, tracking);
    memory.server = server;
    memory.pace = options.max_rate.map(|rate| Pace::new(rate.0));
    memory.watch = watch.cloned();
    let unsure = copy(&mut memory, tasks, segments, &mut report)?;
    if ProcDir::open(root).is_err() {
        return Err(DumpError::Ended { pid: root });
    }
    fault::point();
    let round = run_id();
    write::write_round(&writer, options.pre_dump_mode, &round, uptime)?;
    let info = write::manifest_info(DumpKind::PreDump, memory.tracking.as_ref());
    let manifest = writer.finish(info)?;
    report.image_bytes = manifest.files.values().map(|file| file.size).sum();
    if let Some(tracking) = memory.tracking.take() {
        tracking.commit(&round, &unsure)?;
    }
    unfinished.keep();
    dedup(options)?;
    report.memory = memory.counts;
    report.total = started.elapsed();
    report.write_statistics(&options.place);
    Ok(report)
}

/// Opens what is needed to copy, while the tasks certainly are who they are.
fn open_all(
    tree: &FrozenTree,
    areas: Vec<TaskAreas>,
) -> Result<Vec<(LiveTask, Unsure)>, DumpError> {
    let mut opened = Vec::with_capacity(areas.len());
    let living = tree.living();
    for (task, TaskAreas { pid, areas, .. }) in living.zip(areas) {
        let unsure = Unsure::default();
        let live = LiveTask {
            pid,
            number: task.number,
            pagemap: task.proc.open_file("pagemap", OFlags::RDONLY)?,
            source: live_source(&task.proc, tree.tasks.len() > 1, unsure.clone())?,
            areas,
        };
        opened.push((live, unsure));
    }
    Ok(opened)
}

/// Copies all tasks; a task that ends meanwhile is left out.
fn copy(
    memory: &mut MemoryDump<'_>,
    tasks: Vec<(LiveTask, Unsure)>,
    segments: BTreeMap<u64, Segment>,
    report: &mut DumpReport,
) -> Result<Vec<(HostPid, Vec<PageRun>)>, DumpError> {
    let mut all = Vec::with_capacity(tasks.len());
    for (task, unsure) in tasks {
        match memory.send_live(&task) {
            Err(error) if !is_for_lack_of_memory(&error) && ProcDir::open(task.pid).is_ok() => {
                return Err(error);
            }
            Err(_) => tracing::info!(pid = task.pid.0, "the task ended while it was copied"),
            Ok(()) => all.push((task.pid, unsure)),
        }
    }
    for segment in segments.into_values() {
        memory.send_segment(segment)?;
    }
    report.shared_comparing = memory.comparing;
    let copied = memory.drain()?;
    (report.memory_reading, report.memory_writing) = (copied.reading, copied.writing);
    let found = |unsure: Unsure| {
        std::mem::take(&mut *unsure.lock().unwrap_or_else(PoisonError::into_inner))
    };
    Ok(all
        .into_iter()
        .map(|(pid, unsure)| (pid, found(unsure)))
        .collect())
}

/// Whether an address space was gone already: a task that ends gives it up before it can be seen to end.
fn is_for_lack_of_memory(error: &DumpError) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        let system = error.downcast_ref::<std::io::Error>();
        if system.is_some_and(|error| error.raw_os_error() == Some(libc::ESRCH)) {
            return true;
        }
        cause = error.source();
    }
    false
}
