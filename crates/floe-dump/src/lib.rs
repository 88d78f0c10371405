//! Checkpointing a tree: freeze, preflight, collect, write, release.
//!
//! The tree is stopped by [`freeze`]; what can be seen from outside is collected, with every obstacle
//! listed before anything is changed; pages are copied by other threads while the tasks are asked for the
//! rest; then the images are written, and the tasks run on or are ended. A [`freeze::FrozenTree`] that is
//! dropped on the way releases all tasks as they were.
#![forbid(unsafe_code)]

mod apart;
mod aside;
mod dir_lock;
mod error;
mod freeze;
mod generations;
mod hooks;
mod iterate;
pub mod keeper;
mod kinship;
mod leftovers;
mod memory;
mod pace;
mod pagemap_out;
mod predump;
mod preflight;
mod release;
mod remote;
mod report;
mod reserve;
mod segments;
mod strangers;
mod task;
mod track;
mod unfinished;
mod write;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use floe_image::manifest::DumpKind;
use floe_image::{ImageDir, ImageKind, ImageWriter, Sync};
use floe_inject::{Journal, Watch};
use floe_kernel::fault;
use floe_kernel::features::KernelFeatures;
use floe_kernel::ids::HostPid;
use floe_kernel::namespace::NsKind;
use floe_kernel::proc::ProcDir;
use floe_kernel::security::SecurityModule;
use floe_memory::{PageStore, punch_replaced};
use floe_options::{Action, AfterDump, DumpOptions, HookEvent};
use floe_resources::cgroup::CgroupView;
use floe_resources::collect::make_room_for_descriptors;
use floe_resources::fd::inet::{HeldConnections, hold_connections};
use floe_resources::fd::remap::HeldNames;
use floe_resources::ipc::posix::{take_telling, write_telling};
use floe_resources::mount::{InMemory, in_memory};
use floe_resources::namespace::collect_namespaces;
use floe_resources::task::label::{policy, without_executable_memory};
use floe_resources::vma::MappingReader;
use floe_resources::{Collector, Obstacle};

pub use aside::settle_after_kill;
pub use dir_lock::DirLock;
pub use error::{DumpError, FreezeError, Obstacles};
pub use iterate::{IterateReport, RoundReport, StopReason, dump_in_rounds};
pub use leftovers::Leftovers;
pub use memory::MemoryCounts;
pub use predump::pre_dump;
pub use report::DumpReport;
pub use track::refuse_own_parent;

use aside::Aside;
use freeze::FrozenTree;
use generations::Generations;
use hooks::{asked_external, lock_network};
use memory::MemoryDump;
use task::{Draft, Shared};
use track::{Round, Tracking};
use unfinished::Unfinished;

/// What becomes of a dump beside the images in its directory.
#[derive(Clone, Default)]
pub struct Destination<'a> {
    /// Takes the pages; without it they go to files of the directory.
    pub store: Option<Arc<dyn PageStore>>,
    /// Makes a whole of what is there. If it fails, so does the dump, and the tree runs on.
    pub seal: Option<&'a Seal<'a>>,
}

/// See [`Destination::seal`].
pub type Seal<'a> =
    dyn Fn() -> Result<(), Box<dyn std::error::Error + Send + std::marker::Sync>> + 'a;

/// Checkpoints the tree `options.tree` into `options.place`.
pub fn dump(
    options: &DumpOptions,
    features: &KernelFeatures,
    watch: Option<&Watch>,
) -> Result<DumpReport, DumpError> {
    dump_to(&Destination::default(), options, features, watch)
}

/// Checkpoints the tree `options.tree` to `destination`, its images into `options.place`.
///
/// Must be called from a thread that stays: it becomes the tracer of every task in the tree. With a
/// `watch`, the tasks are put right even when this process is killed.
pub fn dump_to(
    destination: &Destination<'_>,
    options: &DumpOptions,
    features: &KernelFeatures,
    watch: Option<&Watch>,
) -> Result<DumpReport, DumpError> {
    let started = Instant::now();
    let root = HostPid(options.tree.get());
    freeze::look(root)?;
    refuse_own_parent(&options.place)?;
    strangers::warn_of(root);
    warn_of_files_in_memory(root, options);
    let hook = |action| options.hooks.run(HookEvent::new(action, Some(root.0)));
    hook(Action::PreDump)?;
    preflight::spare_what_is_there(options, features, watch)?;
    let images = &options.place.images_dir;
    let _ours = DirLock::take(images)?;
    let _aside = set_aside(options)?;
    let writer = ImageWriter::create(images, durability(images))?;
    let mut unfinished = Unfinished::of(&writer);
    write::write_cpu(&writer, options)?;
    let mut memory = begin_memory(destination, &writer, options, features)?;
    prepare(&writer, options);
    let mut report = DumpReport::default();
    let stopping = Instant::now();
    let mut tree = stop(root, options, watch)?;
    report.freezing = stopping.elapsed();
    look_ahead(&mut memory, &mut tree)?;
    let unlock = lock_network(options, &tree)?;
    let options = &*asked_external(options)?;
    let run_id = run_id();
    let (network, links) = save(
        &mut tree,
        options,
        (features, &run_id, watch.map(Watch::journal)),
        &mut memory,
        &mut report,
    )?;
    hook(Action::PostDump)?;
    // The last moment to turn back: what comes now may end the tasks.
    if watch.is_some_and(Watch::is_cancelled) {
        return Err(DumpError::Cancelled);
    }
    fault::point();
    if options.after == AfterDump::LeaveRunning {
        network.release().map_err(DumpError::Connections)?;
        drop(unlock);
        release::resume(tree)?;
        report.frozen = stopping.elapsed();
        report.image_bytes = finish(&writer, &mut memory, &run_id)?;
        destination.make_whole()?;
        unfinished.keep();
    } else {
        report.image_bytes = finish(&writer, &mut memory, &run_id)?;
        fault::point();
        // What comes now is the end of the tasks, or not theirs to notice.
        report.frozen = stopping.elapsed();
        destination.make_whole()?;
        // An archive that bears its name is for good.
        if destination.seal.is_none() && watch.is_some_and(Watch::is_cancelled) {
            return Err(DumpError::Cancelled);
        }
        // Stopped tasks are as good as ended: their connections belong to the images now, and whoever
        // kills them must not end the connections.
        let network = network.persist(&run_id, root)?;
        unfinished.keep();
        fault::point();
        match options.after {
            AfterDump::LeaveStopped => release::stop(tree)?,
            _ => release::kill(tree)?,
        }
        network.end();
        if let Some(lock) = unlock {
            lock.keep();
        }
        links.keep();
        tracing::info!("gave up the tree");
    }
    Generations::remove_unused(images);
    dedup(options)?;
    report.total = started.elapsed();
    report.write_statistics(&options.place);
    Ok(report)
}

/// Keeps the images that this dump replaces until it is whole. A page server may have put its part there.
fn set_aside(options: &DumpOptions) -> Result<Option<Aside<'_>>, DumpError> {
    let here = options.page_server.is_none();
    here.then(|| Aside::set(&options.place.images_dir))
        .transpose()
}

impl Destination<'_> {
    fn make_whole(&self) -> Result<(), DumpError> {
        self.seal
            .map_or(Ok(()), |seal| seal().map_err(DumpError::Seal))
    }
}

/// What copies memory, and where to.
fn begin_memory<'a>(
    destination: &Destination<'_>,
    writer: &'a ImageWriter,
    options: &DumpOptions,
    features: &KernelFeatures,
) -> Result<MemoryDump<'a>, DumpError> {
    let root = HostPid(options.tree.get());
    if options.place.prev_images_dir.is_none() && options.page_server.is_none() {
        writer.unlink_parent()?;
    }
    let mut memory = match track(options, features, root)? {
        Some(mut tracking) => {
            tracking.lineage().write_link(writer)?;
            tracking.map_segments(root)?;
            MemoryDump::incremental(writer, tracking)
        }
        None if options.page_server.is_some() || destination.store.is_some() => {
            MemoryDump::new(writer)
        }
        None => MemoryDump::prepare(writer, root)?,
    };
    memory.use_server(options)?;
    memory.hashes = options.after != AfterDump::LeaveRunning;
    memory.store = destination.store.clone();
    if reserve::has_big_tasks(root) {
        memory.mappings = MappingReader::prepare();
    }
    Ok(memory)
}

/// Begins what takes long and needs nothing but a stopped tree.
fn look_ahead(memory: &mut MemoryDump<'_>, tree: &mut FrozenTree) -> Result<(), DumpError> {
    memory.mappings.start(tree.living().map(|task| &task.proc));
    if let Some(tracking) = &mut memory.tracking {
        tracking.begin_round(tree)?;
        tracking.arm_fresh()?;
    }
    Ok(())
}

/// What the caller has mounted, too, is rarely meant to go along.
fn warn_of_files_in_memory(root: HostPid, options: &DumpOptions) {
    for InMemory { point, bytes, .. } in in_memory(&reserve::running_tasks(root), options)
        .iter()
        .filter(|found| found.is_callers && found.bytes > 0)
    {
        tracing::warn!(
            "the files in memory at {point} ({}) are not the tree's alone and go along, copied while it stands still; \
             leave them out by --external mnt[{point}]:NAME, and give --external mnt[NAME]:{point} to the restore",
            size(*bytes)
        );
    }
}

/// `12 MiB`.
fn size(bytes: u64) -> String {
    match bytes {
        0..0x40_0000 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

/// Does what the tree need not stand still for.
fn prepare(writer: &ImageWriter, options: &DumpOptions) {
    make_room_for_descriptors();
    // A tree that runs on need not wait for files to be made.
    if options.after == AfterDump::LeaveRunning && !options.hooks.watches_dumps() {
        writer.hold();
    }
}

/// Stops the tree, with every thread in the supervisor's care.
fn stop(
    root: HostPid,
    options: &DumpOptions,
    watch: Option<&Watch>,
) -> Result<FrozenTree, DumpError> {
    let group = options.cgroups.freeze.as_deref();
    let mut tree = freeze::freeze(root, options.freeze_timeout, group)?;
    if let Some(watch) = watch {
        for thread in tree.tasks.iter_mut().flat_map(|task| &mut task.threads) {
            thread.guard(watch.journal());
        }
    }
    tracing::info!(
        tasks = tree.tasks.len(),
        threads = tree.thread_count(),
        "the tree is stopped"
    );
    fault::point();
    Ok(tree)
}

/// What this dump can build on; `None` for one that copies everything and leaves no trace.
fn track(
    options: &DumpOptions,
    features: &KernelFeatures,
    root: HostPid,
) -> Result<Option<Tracking>, DumpError> {
    let round = match (options.track_mem, options.after) {
        (true, AfterDump::LeaveRunning | AfterDump::LeaveStopped) => Round::New,
        _ => Round::Final,
    };
    let wanted = options.place.prev_images_dir.is_some() || round == Round::New;
    // A tree that is tracked has registered memory, which is to be told from the program's own.
    if !wanted && !track::is_tracked(root)? {
        return Ok(None);
    }
    Tracking::open(options, features, round).map(Some)
}

/// `--auto-dedup`: once the new generation is whole, the room of what it replaces is given back.
fn dedup(options: &DumpOptions) -> Result<(), DumpError> {
    // A page server has the pages, and options of its own.
    let here = options.page_server.is_none();
    if here && options.auto_dedup && options.place.prev_images_dir.is_some() {
        let images = ImageDir::open(&options.place.images_dir)?;
        let punched = punch_replaced(&images)?;
        tracing::info!(bytes = punched.0, "gave back room in the parents");
    }
    Ok(())
}

/// A file system in memory does not outlive a power failure, so there is nothing to wait for.
fn durability(images: &Path) -> Sync {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    match rustix::fs::statfs(images) {
        Ok(stat) if stat.f_type == TMPFS_MAGIC => Sync::None,
        _ => Sync::Durable,
    }
}

/// Ends the images: only now does the directory pass for a dump.
fn finish(
    writer: &ImageWriter,
    memory: &mut MemoryDump<'_>,
    run_id: &str,
) -> Result<u64, DumpError> {
    let info = write::manifest_info(DumpKind::Full, memory.tracking.as_ref());
    let manifest = writer.finish(info)?;
    if let Some(tracking) = memory.tracking.take() {
        tracking.commit(run_id, &[])?;
    }
    Ok(manifest.files.values().map(|file| file.size).sum())
}

/// The cgroup namespaces of the tree, the root's before all others.
fn cgroup_views(collector: &Collector<'_>) -> Result<Vec<CgroupView>, DumpError> {
    let namespaces = collector.namespaces().all().iter();
    let mut own: Vec<_> = namespaces
        .filter(|namespace| namespace.kind() == NsKind::Cgroup)
        .collect();
    own.sort_by_key(|namespace| !namespace.of_root);
    let views = own.into_iter().map(|namespace| {
        Ok(CgroupView {
            id: namespace.id,
            of_root: namespace.of_root,
            member: ProcDir::open(namespace.member)?,
        })
    });
    views.collect()
}

/// Collects and writes everything of a stopped tree.
fn save(
    tree: &mut FrozenTree,
    options: &DumpOptions,
    (features, run_id, journal): (&KernelFeatures, &str, Option<Arc<Journal>>),
    memory: &mut MemoryDump<'_>,
    report: &mut DumpReport,
) -> Result<(HeldConnections, HeldNames), DumpError> {
    let writer = memory.writer();
    let mut collector = Collector::new(options, features, writer)?;
    collector.set_tree(tree.tasks.iter().map(|task| task.pid), tree.pids.clone());
    if let Some(tracking) = &memory.tracking {
        collector.cache(|| tracking.registered());
    }
    let mappings = std::mem::take(&mut memory.mappings);
    collector.cache(|| mappings);
    let mut shared = Shared::new();
    let ourselves = ProcDir::open(HostPid(std::process::id().cast_signed()))?;
    let own_cgroups = shared.cgroups.of(&ourselves, "cgroup")?;
    let mut drafts = collect_all(tree, options, &mut shared, &mut collector)?;
    collector.run_after_preflight()?;
    fault::point();
    let network = hold_connections(&mut collector, journal.as_ref())?;
    fault::point();

    tracing::info!(
        files = collector.file_count(),
        "collected what can be seen from outside"
    );
    let mut guards = Vec::with_capacity(drafts.len());
    for (task, draft) in tree.tasks.iter().zip(&drafts) {
        guards.push(match draft {
            Draft::Living(draft) => memory.send_task(task, &draft.space)?,
            Draft::Dead(_) => Vec::new(),
        });
    }
    tracing::info!(
        pages = memory.counts.pages_written,
        "found the pages to save"
    );
    for segment in collector.take_segments().into_values() {
        memory.send_segment(segment)?;
    }
    let mut telling = take_telling(&mut collector);
    for (task, draft) in tree.tasks.iter_mut().zip(&mut drafts) {
        if let Draft::Living(draft) = draft {
            remote::ask(task, draft, (&tree.pids, shared.security, &mut telling))?;
        }
    }
    write_telling(telling, &mut collector)?;
    tracing::info!("asked the tasks");
    let lines: Vec<_> = tree
        .tasks
        .iter()
        .map(|task| task::tree_entry(task, (&tree.pids, collector.namespaces())))
        .collect::<Result<_, _>>()?;
    writer.write_all(ImageKind::Pstree, 0, &lines)?;
    for ((task, draft), guards) in tree.tasks.iter().zip(drafts).zip(guards) {
        write::write_task(writer, task, draft, guards)?;
    }
    report.files = collector.file_count();
    let links = std::mem::take(collector.cache(HeldNames::default));
    let own_views = cgroup_views(&collector)?;
    collector.finish()?;
    writer.write_one(ImageKind::Seccomp, 0, &shared.seccomp.into_entry())?;
    if let Some(policy) = &shared.policy {
        writer.write_one(ImageKind::Apparmor, 0, policy)?;
    }
    if let Some(cgroups) = shared.cgroups.into_entry(&options.cgroups, &own_views)? {
        writer.write_one(ImageKind::Cgroup, 0, &cgroups)?;
    }
    let whose = (own_cgroups, shared.security);
    write::write_inventory(writer, options, whose, run_id.to_string())?;
    tracing::info!("wrote the images but the pages");
    let copied = memory.drain()?;
    tracing::info!(bytes = copied.bytes, "wrote the pages");
    (report.memory_reading, report.memory_writing) = (copied.reading, copied.writing);
    (report.tasks, report.threads) = (tree.tasks.len(), tree.thread_count());
    report.memory = memory.counts;
    Ok((network, links))
}

/// Collects what can be seen from outside, and refuses when something cannot be saved.
fn collect_all<'a>(
    tree: &FrozenTree,
    options: &DumpOptions,
    shared: &mut Shared,
    collector: &mut Collector<'a>,
) -> Result<Vec<Draft>, DumpError> {
    check_session(tree, options, collector);
    for task in tree.living() {
        collector.learn_namespaces(&task.proc)?;
    }
    for task in tree.tasks.iter().filter(|task| task.is_dead()) {
        if !tree.pids.nested(task.pid).is_empty() {
            collector.learn_zombie(&task.proc)?;
        }
    }
    collect_namespaces(&tree.root().proc, collector)?;
    let mut drafts = Vec::with_capacity(tree.tasks.len());
    for task in &tree.tasks {
        let draft = task::collect(task, shared, collector);
        drafts.extend(collector.note(draft)?);
    }
    check_labels(&drafts, tree.root().pid, shared, collector);
    collector.run_deferred()?;
    let obstacles = collector.take_obstacles();
    if !obstacles.is_empty() {
        return Err(DumpError::Preflight(Obstacles(obstacles)));
    }
    Ok(drafts)
}

/// Looks for what else the labels of the tree need, and what they forbid.
fn check_labels(
    drafts: &[Draft],
    root: HostPid,
    shared: &mut Shared,
    collector: &mut Collector<'_>,
) {
    let labels = || drafts.iter().flat_map(Draft::labels);
    match shared.security {
        SecurityModule::None => {}
        SecurityModule::AppArmor => match policy::collect(labels().map(|(_, label)| label), root) {
            Ok(found) => shared.policy = found,
            Err(obstacle) => collector.obstacle(obstacle),
        },
        SecurityModule::SeLinux => {
            let refused = without_executable_memory(labels());
            refused.into_iter().for_each(|one| collector.obstacle(one));
        }
    }
}

/// A root whose session leader is outside can only be restored into a session of the caller's.
fn check_session(tree: &FrozenTree, options: &DumpOptions, collector: &mut Collector<'_>) {
    let root = tree.root();
    if root.stat.sid != root.pid && !options.shell_job {
        collector.obstacle(Obstacle {
            pid: root.pid,
            object: format!(
                "its session (leader {} is outside of the tree)",
                root.stat.sid
            ),
            remedy: "use --shell-job, or start the program with setsid".to_string(),
        });
    }
}

/// Names this dump, for what has to be found again at restore (network rules).
fn run_id() -> String {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    format!("{:x}-{:x}", std::process::id(), now.as_nanos())
}
