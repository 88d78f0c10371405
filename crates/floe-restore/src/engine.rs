//! The life of a restore: load, plan, verify, execute, release.

use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use floe_archive::check;
use floe_image::messages::{RestoreStatsEntry, StatsEntry};
use floe_image::{ImageDir, ImageKind, ImageWriter};
use floe_inject::Stopped;
use floe_kernel::cpu::CpuFacts;
use floe_kernel::fault;
use floe_kernel::features::KernelFeatures;
use floe_kernel::ids::HostPid;
use floe_kernel::ptrace::{self, WaitStatus};
use floe_options::{Action, HookEvent, RestoreOptions};
use floe_plan::Plan;
use floe_resources::cpu;
use floe_resources::fd::inet::release_connections;
use floe_resources::namespace::{has_own_pids, join_users};
use floe_resources::restore::{Op, PlanError, Planner, Puppet, TreeImages, World};
use floe_resources::task::scheduling::LowestNice;

use crate::births::{Births, plan_threads};
use crate::error::RestoreError;
use crate::labels::TreeLabels;
use crate::numbers::free_numbers;
use crate::space::Spaces;
use crate::state::Background;
use crate::tree::{Tree, highest_id};
use crate::{descriptors, release, state};

/// What a restore did.
#[derive(Clone, Debug, Default)]
pub struct RestoreReport {
    /// The root in the caller's pid namespace.
    pub root: i32,
    /// Tasks, zombies among them.
    pub tasks: usize,
    /// From the first clone to the whole tree standing there.
    pub forking: Duration,
    /// From the start to the release.
    pub total: Duration,
    /// Pages written into tasks.
    pub pages_restored: u64,
}

/// Plans the restore of a loaded tree: changes nothing.
pub fn plan<'i>(
    images: &'i TreeImages,
    options: &'i RestoreOptions,
    features: &'i KernelFeatures,
) -> Result<(Plan<Op<'i>>, Rc<Background<'i>>), PlanError> {
    let mut planner = Planner::new(images, options, features);
    let tree = Tree::new(images)?;
    floe_resources::namespace::plan_namespaces(&mut planner)?;
    let movers = floe_resources::cgroup::plan_groups(&mut planner)?;
    floe_resources::fd::plan_files(&mut planner)?;
    let spaces = Spaces::new(images, &tree)?;
    spaces.plan(&tree, &mut planner)?;
    Births {
        tree: &tree,
        arena: spaces.arena.start,
        share_memory: spaces.sharing(),
        movers,
    }
    .plan(&mut planner)?;
    descriptors::plan(&mut planner)?;
    floe_resources::file_lock::plan_locks(&mut planner)?;
    let labels = Rc::new(TreeLabels::new(images, options)?);
    labels.plan(&mut planner);
    plan_threads(&mut planner, &labels);
    floe_resources::namespace::nested::plan_children(&mut planner)?;
    let background = Rc::new(Background::new(&planner)?);
    state::plan(&mut planner, &background, labels)?;
    Ok((planner.finish()?, background))
}

/// Does all that a restore does before it touches anything; the steps of the plan in their order.
pub fn dry_run(
    dir: ImageDir,
    options: &RestoreOptions,
    features: &KernelFeatures,
) -> Result<Vec<String>, RestoreError> {
    let mut images = load(dir)?;
    join_users(&mut images, options)?;
    check_cpu(&images.dir, options)?;
    let (plan, _) = plan(&images, options, features)?;
    check_ids_are_free(&Tree::new(&images)?, &images)?;
    free_numbers(&images)?;
    Ok(plan.steps().iter().map(ToString::to_string).collect())
}

/// Reads the images, if nothing of them is missing.
fn load(dir: ImageDir) -> Result<TreeImages, RestoreError> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut rows = check::before_restore(&dir, threads);
    rows.retain(|row| row.state == check::State::Bad);
    if !rows.is_empty() {
        return Err(RestoreError::NotWhole(rows));
    }
    Ok(TreeImages::read(dir)?)
}

/// The highest pid that a restore in a new pid namespace needs; refuses a tree that has its own.
pub fn highest_pid(dir: &ImageDir) -> Result<u32, RestoreError> {
    let images = load(dir.clone())?;
    if has_own_pids(&images) {
        return Err(needless_pids().into());
    }
    let tree = Tree::new(&images)?;
    let helpers = tree.ids(&images).max().unwrap_or(0);
    Ok(highest_id(&images).max(helpers))
}

pub(crate) fn needless_pids() -> PlanError {
    PlanError::Unsupported {
        object: "A new pid namespace for a tree that had one of its own".to_string(),
        remedy: "leave out --new-pidns: its pids are free in any case",
    }
}

/// Restores the tree of images: of a directory, or of an archive.
pub fn restore(
    dir: ImageDir,
    options: &RestoreOptions,
    features: &KernelFeatures,
) -> Result<RestoreReport, RestoreError> {
    let start = Instant::now();
    let mut images = load(dir)?;
    join_users(&mut images, options)?;
    check_cpu(&images.dir, options)?;
    let _nice = LowestNice::take(&images);
    let (plan, background) = plan(&images, options, features)?;
    check_ids_are_free(&Tree::new(&images)?, &images)?;
    let numbers = free_numbers(&images)?;
    options
        .hooks
        .run(HookEvent::new(Action::PreRestore, None))?;
    let mut world = World::new(&images, options, features, numbers);
    let mut report = RestoreReport {
        tasks: images.tasks.len(),
        ..RestoreReport::default()
    };
    if let Err(error) = execute(&mut world, (plan, &background), start, &mut report) {
        abort(&mut world);
        return Err(error);
    }
    world.tidy_up();
    report.total = start.elapsed();
    // The tree runs, with or without.
    if let Err(error) = write_statistics(&options.place.work_dir, &report) {
        tracing::warn!(%error, "the statistics cannot be written to the work directory");
    }
    let resumed = options
        .hooks
        .run(HookEvent::new(Action::PostResume, Some(report.root)));
    if let Err(error) = resumed {
        tracing::warn!(%error, "a hook failed after the restore");
    }
    tracing::info!(
        pid = report.root,
        tasks = report.tasks,
        "Restore finished successfully. Tasks resumed."
    );
    Ok(report)
}

fn execute<'i>(
    world: &mut World<'i>,
    (plan, background): (Plan<Op<'i>>, &Background<'i>),
    start: Instant,
    report: &mut RestoreReport,
) -> Result<(), RestoreError> {
    let mut last = None;
    for step in plan.into_steps() {
        let name = step.to_string();
        tracing::debug!("{name}");
        fault::point();
        // What a task deferred nobody else may miss.
        let ready = match last.replace(step.actor) {
            Some(actor) if actor == step.actor => Ok(()),
            _ => world.run_deferred(),
        };
        let done = ready.and_then(|()| (step.op)(world));
        done.map_err(|source| RestoreError::Step { step: name, source })?;
    }
    world.go_home();
    // Of what came through a pipe the checksums are known only now.
    world.images.dir.check_rest()?;
    report.forking = start.elapsed();
    let (options, root) = (world.options, world.images.root().pid());
    report.root = world.puppets.get(&root).map_or(0, |puppet| puppet.pid().0);
    let event = |action| options.hooks.run(HookEvent::new(action, Some(report.root)));
    event(Action::PostRestore)?;
    if let Some(path) = &options.pidfile {
        std::fs::write(path, report.root.to_string()).map_err(|source| RestoreError::Write {
            path: path.clone(),
            source,
        })?;
    }
    fault::point();
    event(Action::NetworkUnlock)?;
    release_connections(world).map_err(|source| RestoreError::Step {
        step: "let the TCP connections go on".into(),
        source,
    })?;
    fault::point();
    event(Action::PreResume)?;
    world.prepare_release();
    release::release(world, background).map_err(|source| RestoreError::Step {
        step: "release".into(),
        source,
    })
}

/// Leaves nothing behind: every task made so far is killed and reaped, names are removed.
fn abort(world: &mut World<'_>) {
    world.go_home();
    // The first process of a pid namespace ends only after all others of it.
    world.give_up();
    let made = std::mem::take(&mut world.puppets);
    let nested = &world.images.nested;
    // Inner namespaces end before outer ones.
    let mut order: Vec<(&u32, &Puppet)> = made.iter().rev().collect();
    order.sort_by_key(|(pid, _)| {
        let below = nested.below(**pid);
        std::cmp::Reverse((below.len(), below.last() != Some(&1)))
    });
    // The end of a leader is reported after that of its threads, and that of the first task of a pid
    // namespace after all others.
    let all = order.into_iter().flat_map(|(_, puppet)| {
        let threads = puppet.threads.values().map(Stopped::pid);
        threads.chain([puppet.pid()])
    });
    let all: Vec<HostPid> = all.collect();
    // Dropping a puppet kills it.
    drop(made);
    for pid in all {
        while let Ok(Some((_, status))) = ptrace::wait(pid, 0) {
            if matches!(status, WaitStatus::Exited(_) | WaitStatus::Killed(_)) {
                break;
            }
        }
    }
    world.take_back();
}

/// How long a zombie may keep its pid: init processes reap orphans within seconds.
const ZOMBIE_PATIENCE: Duration = Duration::from_secs(5);

/// Compares this CPU with the one of the dump, if the images name it and the options ask for it.
fn check_cpu(dir: &ImageDir, options: &RestoreOptions) -> Result<(), RestoreError> {
    let wanted = options.cpu_cap;
    if !wanted.fpu && !wanted.instructions && !wanted.exact {
        return Ok(());
    }
    let Some(saved) = dir.read_optional(ImageKind::Cpuinfo, 0)? else {
        return Ok(());
    };
    match CpuFacts::read() {
        Ok(here) => cpu::compare(&saved, &here, wanted).map_err(RestoreError::Cpu),
        Err(error) => {
            tracing::warn!("the saved CPU capabilities are not compared: {error}");
            Ok(())
        }
    }
}

/// Who has a pid or tid that a restore needs.
pub(crate) struct Owner {
    /// Its name, and what keeps a zombie.
    pub shown: String,
    /// Whether it has ended and waits to be reaped.
    pub is_zombie: bool,
}

impl Owner {
    /// Nobody where the id is free.
    pub fn of(id: u32) -> Option<Owner> {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        // `pid (comm) state ...`, where comm may hold anything.
        let (owner, rest) = stat.rsplit_once(')').unwrap_or((&stat, ""));
        let is_zombie = rest.trim_start().starts_with(['Z', 'X']);
        let comm = owner.split_once('(').map_or(owner, |(_, comm)| comm);
        let why = if is_zombie {
            ", a zombie whose parent does not reap it"
        } else {
            ""
        };
        Some(Owner {
            shown: format!("`{comm}`{why}"),
            is_zombie,
        })
    }
}

/// Finds every pid and tid that is taken, before anything is made.
fn check_ids_are_free(tree: &Tree, images: &TreeImages) -> Result<(), PlanError> {
    if has_own_pids(images) {
        return Ok(());
    }
    let deadline = Instant::now() + ZOMBIE_PATIENCE;
    for id in tree.ids(images) {
        while let Some(owner) = Owner::of(id) {
            if !owner.is_zombie || Instant::now() > deadline {
                let owner = owner.shown;
                return Err(PlanError::IdTaken { id, owner });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    Ok(())
}

fn write_statistics(work_dir: &Path, report: &RestoreReport) -> Result<(), RestoreError> {
    let microseconds = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
    let restore = RestoreStatsEntry {
        pages_compared: 0,
        pages_skipped_cow: 0,
        forking_time: microseconds(report.forking),
        restore_time: microseconds(report.total),
        pages_restored: Some(report.pages_restored),
    };
    let writer = ImageWriter::for_statistics(work_dir)?;
    writer.write_one(
        ImageKind::Stats,
        floe_image::catalogue::STATS_RESTORE,
        &StatsEntry {
            dump: None,
            restore: Some(restore),
        },
    )?;
    Ok(())
}
