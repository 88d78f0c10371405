//! Dirty tracking of a tree over several commands: which trackers, whose state, which parent.
//!
//! What the kernel tracks counts only together with the images of the last round, so three things must
//! fit: the keeper holds the descriptors, its state names the last round that was finished, and that
//! name is the one in the parent's inventory. If one does not, all memory is copied, and the log says so.

mod blind;
mod lineage;
mod make;
mod state;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use floe_image::ImageKind;
use floe_kernel::features::KernelFeatures;
use floe_kernel::ids::{HostPid, TaskAddr};
use floe_kernel::proc::{Mapping, ProcDir, parse_maps};
use floe_memory::{
    Area, ContentTracker, DirtyTracker, LivePages, MappedPages, Maps, NoTracker, PageIndex,
    PageRun, PageSource, Selection, TrackerKind, intersection, push_run,
};
use floe_options::{DumpOptions, TrackerChoice};
use floe_resources::collect::Segment;
use floe_resources::namespace::PidView;
use floe_resources::vma::TrackedTasks;

use crate::error::DumpError;
use crate::freeze::{FrozenTask, FrozenTree};
use crate::keeper::{Purpose, Session, Tracked, TreeKey, Waiting};
use crate::segments::{MappedSegments, is_segment};

pub use lineage::{Lineage, refuse_own_parent};
use state::RoundState;

/// The program that a keeper runs: the one that asks for it.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// What the parent has of a segment: where, and the same mapped.
type ParentSegment = (Arc<PageIndex>, Arc<MappedPages>);

/// The tracking of one tree during one command.
#[derive(Debug)]
pub struct Tracking {
    kind: TrackerKind,
    lineage: Lineage,
    keeper: Option<Session>,
    /// What the keeper had from the last round, where that is the parent's.
    last: Option<RoundState>,
    arms: bool,
    trackers: HashMap<HostPid, Box<dyn DirtyTracker>>,
    /// By their pid in the images.
    parents: HashMap<u32, Arc<PageIndex>>,
    /// Of shared memory, by its number.
    parent_segments: HashMap<u64, ParentSegment>,
    /// Shared memory of the tree.
    segments: MappedSegments,
    pids: Rc<PidView>,
    /// Start times, for the next round's state.
    tasks: Vec<Tracked>,
}

/// Whether a command begins a new round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// Changes count from this command on.
    New,
    /// What was tracked is used, and tracked on from the last round.
    Final,
}

impl Tracking {
    /// Finds out what there is to build on, and starts a keeper for a new round. To be called before
    /// the tree is stopped.
    pub fn open(
        options: &DumpOptions,
        features: &KernelFeatures,
        round: Round,
    ) -> Result<Tracking, DumpError> {
        let lineage = Lineage::find(&options.place)?;
        let kind = choose(options.tracker, features, &lineage)?;
        let key = TreeKey::of(HostPid(options.tree.get()))?;
        let arms =
            round == Round::New && matches!(kind, TrackerKind::Uffd | TrackerKind::SoftDirty);
        let keeper = if arms {
            Some(Session::start(&key, Path::new(OWN_PROGRAM))?)
        } else {
            Session::open(&key, Purpose::Read, Waiting::Patiently)?
        };
        let mut tracking = Tracking {
            kind,
            lineage,
            keeper,
            last: None,
            arms,
            trackers: HashMap::new(),
            parents: HashMap::new(),
            parent_segments: HashMap::new(),
            segments: MappedSegments::default(),
            pids: Rc::default(),
            tasks: Vec::new(),
        };
        tracking.recall();
        tracking.read_parents()?;
        Ok(tracking)
    }

    /// Compares the keeper's state with the parent.
    fn recall(&mut self) {
        if !matches!(self.kind, TrackerKind::Uffd | TrackerKind::SoftDirty) {
            return;
        }
        let Some(parent) = &self.lineage.parent else {
            return;
        };
        let state = self
            .keeper
            .as_ref()
            .and_then(|keeper| RoundState::parse(&keeper.state));
        match state {
            Some(state) if state.tracker != self.kind.name() => {
                tracing::warn!(
                    "the last round was tracked by {}, not by {}: all memory is copied",
                    state.tracker,
                    self.kind.name()
                );
            }
            Some(state) if Some(&state.round) == self.lineage.parent_round.as_ref() => {
                self.last = Some(state);
            }
            Some(_) => tracing::warn!(
                "changes are tracked since another round than that in {}: all memory is copied",
                parent.path().display()
            ),
            None => tracing::warn!(
                "nothing was tracked since {} was made (no keeper, or its last round failed): all \
                 memory is copied",
                parent.path().display()
            ),
        }
    }

    /// The parent, its generation and how the pages were chosen.
    pub fn lineage(&self) -> &Lineage {
        &self.lineage
    }

    /// The tracker by which pages are told apart.
    pub fn kind(&self) -> TrackerKind {
        self.kind
    }

    /// The tasks whose memory may be registered with a userfaultfd of ours.
    pub fn registered(&self) -> TrackedTasks {
        let keeper = self.keeper.iter();
        TrackedTasks(
            keeper
                .flat_map(|keeper| keeper.fds.keys())
                .map(|(pid, _)| HostPid(*pid))
                .chain(self.tasks.iter().map(|(pid, _)| HostPid(*pid)))
                .collect(),
        )
    }

    /// Makes the trackers of a stopped tree and, for a new round, arms them.
    pub fn begin_round(&mut self, tree: &mut FrozenTree) -> Result<Vec<TaskAreas>, DumpError> {
        self.pids = Rc::clone(&tree.pids);
        let mut all = Vec::new();
        for task in &mut tree.tasks {
            if task.is_dead() {
                continue;
            }
            let text = task.proc.read("maps")?;
            let mappings = parse_maps(&text).map_err(|error| task.proc.bad(error))?;
            let areas = areas(&mappings);
            let mut tracker = self.make(task, &mappings, &areas)?;
            if self.arms {
                tracker.arm(&areas)?;
            } else {
                tracker.survey(&areas)?;
            }
            self.tasks.push((task.pid.0, task.stat.start_time));
            self.trackers.insert(task.pid, tracker);
            let shared = mappings.into_iter().filter(is_segment).collect();
            all.push(TaskAreas {
                pid: task.pid,
                areas,
                shared,
            });
        }
        Ok(all)
    }

    /// Has writes noticed also where they were not before: takes time, and the tree may run on meanwhile
    /// when its pages are read later.
    pub fn arm_fresh(&mut self) -> Result<(), DumpError> {
        let mut all = self.trackers.values_mut();
        Ok(all.try_for_each(|tracker| tracker.arm_fresh())?)
    }

    /// Reads where the chain has what of every task: before the tree is stopped, since it takes time.
    fn read_parents(&mut self) -> Result<(), DumpError> {
        let counts = self.last.is_some() || self.kind == TrackerKind::Content;
        let Some(parent) = self.lineage.parent.as_ref().filter(|_| counts) else {
            return Ok(());
        };
        for id in parent.ids(ImageKind::Pagemap)? {
            let index = PageIndex::read(parent, ImageKind::Pagemap, id)?;
            self.parents.insert(id as u32, Arc::new(index));
        }
        Ok(())
    }

    /// Maps shared memory and what the parent has of it: before the tree is stopped, which then stands still
    /// for the comparison alone.
    pub fn map_segments(&mut self, root: HostPid) -> Result<(), DumpError> {
        let parent = self.lineage.parent.as_ref();
        let Some(parent) = parent.filter(|_| self.kind != TrackerKind::None) else {
            return Ok(());
        };
        let ids = parent.ids(ImageKind::ShmemPagemap)?;
        if ids.is_empty() {
            return Ok(());
        }
        self.segments = MappedSegments::of_running(root);
        tracing::info!(
            segments = self.segments.count(),
            "mapped shared memory, to compare it"
        );
        if self.segments.count() == 0 {
            return Ok(());
        }
        for id in ids {
            let index = Arc::new(PageIndex::read(parent, ImageKind::ShmemPagemap, id)?);
            let pages = Arc::new(MappedPages::of(&index));
            self.parent_segments.insert(id, (index, pages));
        }
        Ok(())
    }

    fn make(
        &mut self,
        task: &mut FrozenTask,
        mappings: &[Mapping],
        areas: &[Area],
    ) -> Result<Box<dyn DirtyTracker>, DumpError> {
        if matches!(self.kind, TrackerKind::Content | TrackerKind::None) {
            // Content needs to know how memory is read, which is not decided yet.
            return Ok(Box::new(NoTracker));
        }
        if let Some(object) = blind::unseen_writer(task, mappings)? {
            tracing::warn!(
                pid = task.pid.0,
                "the task has {object}, through which its memory may be written without a trace: all \
                 of it is copied"
            );
            return Ok(Box::new(NoTracker));
        }
        let tracked = (task.pid.0, task.stat.start_time);
        let unsure = match &self.last {
            Some(last) => last.unsure_of(tracked),
            None => None,
        };
        match self.kind {
            TrackerKind::SoftDirty => make::soft_dirty(task, unsure, self.arms),
            _ => make::uffd(
                task,
                (mappings, areas),
                self.keeper.as_mut(),
                unsure,
                self.arms,
            ),
        }
    }

    /// Which of the pages in `present`, all in `area`, the parent has as they are.
    pub fn unchanged(
        &mut self,
        pid: HostPid,
        area: &Area,
        present: &[PageRun],
        source: &Arc<dyn PageSource>,
    ) -> Result<Vec<PageRun>, DumpError> {
        let Some(parent) = self.parents.get(&self.pids.number(pid)) else {
            return Ok(Vec::new());
        };
        let unchanged = if self.kind == TrackerKind::Content {
            ContentTracker::new(source.clone(), parent.clone()).unchanged(area, present)?
        } else {
            match self.trackers.get_mut(&pid) {
                Some(tracker) => tracker.unchanged(area, present)?,
                None => return Ok(Vec::new()),
            }
        };
        // What the chain does not have cannot be left to it, whatever the tracker says.
        let stored = stored(parent, area);
        Ok(intersection(&intersection(&unchanged, present), &stored))
    }

    /// Which of the pages in `present` of a shared segment the parent has; `source` reads the segment. Only
    /// its content tells (see `segments.rs`).
    pub fn unchanged_of_segment(
        &self,
        segment: &Segment,
        present: &[PageRun],
        source: &Arc<dyn PageSource>,
    ) -> Result<Vec<PageRun>, DumpError> {
        let id = segment.id;
        let parent = self.lineage.parent.as_ref();
        let parent = parent.filter(|parent| parent.has(ImageKind::ShmemPagemap, id));
        let (Some(parent), false) = (parent, self.kind == TrackerKind::None) else {
            return Ok(Vec::new());
        };
        let (index, before) = match self.parent_segments.get(&id) {
            Some((index, pages)) => (index.clone(), Some(pages.clone())),
            None => {
                let index = PageIndex::read(parent, ImageKind::ShmemPagemap, id)?;
                (Arc::new(index), None)
            }
        };
        let now = self.segments.of(segment.file.as_fd());
        let maps = now.zip(before).map(|(now, before)| Maps { now, before });
        let whole = Area {
            range: TaskAddr(0)..TaskAddr(u64::MAX),
            selection: Selection::Everything,
        };
        let tracker = ContentTracker::new(source.clone(), index);
        Ok(tracker.with_maps(maps).unchanged(&whole, present)?)
    }

    /// Ends a new round once its images are whole. `unsure` are pages that were not copied for sure.
    pub fn commit(self, round: &str, unsure: &[(HostPid, Vec<PageRun>)]) -> Result<(), DumpError> {
        let (Some(keeper), true) = (&self.keeper, self.arms) else {
            return Ok(());
        };
        for ended in keeper.fds.keys().filter(|key| !self.tasks.contains(key)) {
            keeper.release(*ended)?;
        }
        let state = RoundState::new(round, self.kind.name(), &self.tasks, unsure);
        Ok(keeper.commit(&state.text(Session::MAX_STATE))?)
    }
}

/// The tasks under `root` whose memory may be registered with a userfaultfd of ours.
pub fn tracked_tasks(root: HostPid) -> Result<TrackedTasks, DumpError> {
    let keeper = Session::open(&TreeKey::of(root)?, Purpose::Read, Waiting::Patiently)?;
    let fds = keeper.iter().flat_map(|keeper| keeper.fds.keys());
    Ok(TrackedTasks(fds.map(|(pid, _)| HostPid(*pid)).collect()))
}

/// Whether there is a keeper for the tree under `root`, be it that another command talks to it.
pub fn may_be_tracked(root: HostPid) -> bool {
    TreeKey::of(root).is_ok_and(|key| {
        let session = Session::open(&key, Purpose::Read, Waiting::Not);
        !matches!(session, Ok(None))
    })
}

/// Ends the tracking of the tree under `root`.
pub fn stop(root: HostPid) -> Result<(), DumpError> {
    let Ok(key) = TreeKey::of(root) else {
        // A keeper ends with its tree.
        return Ok(());
    };
    let keeper = Session::open(&key, Purpose::Read, Waiting::Patiently)?;
    Ok(keeper.map_or(Ok(()), Session::stop)?)
}

/// Whether a keeper holds descriptors of the tree under `root`.
pub fn is_tracked(root: HostPid) -> Result<bool, DumpError> {
    match TreeKey::of(root) {
        Ok(key) => Ok(Session::open(&key, Purpose::Read, Waiting::Patiently)?.is_some()),
        // The freeze says what is wrong.
        Err(_) => Ok(false),
    }
}

/// The memory of one task.
#[derive(Clone, Debug)]
pub struct TaskAreas {
    pub pid: HostPid,
    /// What is private.
    pub areas: Vec<Area>,
    /// Mappings of memory that may be shared.
    pub shared: Vec<Mapping>,
}

/// Stretches that the chain has content for.
fn stored(parent: &PageIndex, area: &Area) -> Vec<PageRun> {
    let mut runs = Vec::new();
    for run in parent.runs_in(area.range.start.0..area.range.end.0) {
        push_run(&mut runs, run.start, run.end());
    }
    runs
}

/// The private mappings whose pages are saved with the task, by their names: `smaps`, which tells more,
/// takes as long as arming does.
fn areas(mappings: &[Mapping]) -> Vec<Area> {
    let named = |mapping: &&Mapping| !mapping.shared && !is_special(&mapping.name);
    let area = |mapping: &Mapping| Area {
        range: mapping.start..mapping.end,
        selection: if mapping.name.starts_with(b"/") {
            Selection::CopiedOnWrite
        } else {
            Selection::Anonymous
        },
    };
    mappings.iter().filter(named).map(area).collect()
}

fn is_special(name: &[u8]) -> bool {
    const KERNELS: [&[u8]; 5] = [
        b"[vsyscall]",
        b"[vvar]",
        b"[vvar_vclock]",
        b"[vdso]",
        b"[uprobes]",
    ];
    KERNELS.contains(&name) || name.starts_with(b"/[aio]")
}

fn choose(
    choice: TrackerChoice,
    features: &KernelFeatures,
    lineage: &Lineage,
) -> Result<TrackerKind, DumpError> {
    let kind = match choice {
        TrackerChoice::Auto => TrackerKind::best(features).0,
        TrackerChoice::Uffd => TrackerKind::Uffd,
        TrackerChoice::SoftDirty => TrackerKind::SoftDirty,
        TrackerChoice::Content => TrackerKind::Content,
        TrackerChoice::None => TrackerKind::None,
    };
    if !kind.is_possible(features) {
        return Err(DumpError::Tracker {
            tracker: kind.name(),
        });
    }
    tracing::info!(
        tracker = kind.name(),
        parent = lineage.parent.is_some(),
        "tracking"
    );
    Ok(kind)
}

/// Opens what is needed to read a task's memory while it runs; a task that has kin in the tree may share
/// pages with it.
pub fn live_source(
    proc: &ProcDir,
    has_kin: bool,
    unsure: Arc<std::sync::Mutex<Vec<PageRun>>>,
) -> Result<Arc<dyn PageSource>, DumpError> {
    let memory = proc.open_file("mem", rustix::fs::OFlags::RDONLY)?;
    let pages = LivePages::new(proc.pid(), memory, unsure);
    Ok(if has_kin {
        Arc::new(pages.keeping_shared())
    } else {
        Arc::new(pages)
    })
}
