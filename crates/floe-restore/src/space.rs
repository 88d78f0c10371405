//! Address spaces of all tasks: which plan each has, who shares with whom, the steps that fill them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use floe_image::ImageKind;
use floe_image::messages::MmEntry;
use floe_inject::ARENA_BYTES;
use floe_kernel::ids::TaskFd;
use floe_memory::PageIndex;
use floe_plan::Handle;
use floe_resources::ipc::shm;
use floe_resources::restore::{ExecuteError, PlanError, Planner, TreeImages, World};

use crate::memory::{
    self, FillOptions, HostMemory, MemoryPlan, MemoryRequest, ParentPages, Source,
};
use crate::tree::{Tree, is_zombie};

/// The address spaces of a tree, decided.
pub struct Spaces {
    /// Where every arena lies.
    pub arena: Range<u64>,
    plans: BTreeMap<u32, Arc<MemoryPlan>>,
    /// Tasks that run in their parent's address space (`CLONE_VM`).
    borrowed: BTreeSet<u32>,
    parents: Arc<ParentPages>,
}

impl Spaces {
    /// Decides the layout of every task.
    pub fn new(images: &TreeImages, tree: &Tree) -> Result<Spaces, PlanError> {
        let host = HostMemory::probe().map_err(|error| refused("/proc/self/maps", &error))?;
        let mms: Vec<&MmEntry> = images
            .tasks
            .iter()
            .filter_map(|task| task.mm.as_ref())
            .collect();
        let start = memory::choose_arena(&mms, &host.maps, ARENA_BYTES as u64)
            .map_err(|error| refused("pstree.img", &error))?;
        let segments = shm::sizes(images)?;
        let mut spaces = Spaces {
            arena: start..start + ARENA_BYTES as u64,
            plans: BTreeMap::new(),
            borrowed: BTreeSet::new(),
            parents: Arc::default(),
        };
        for birth in &tree.births {
            let Some(mm) = images.task(birth.pid).and_then(|task| task.mm.as_ref()) else {
                continue;
            };
            if birth
                .parent
                .is_some_and(|parent| shares_space(images, parent, birth.pid))
            {
                spaces.borrowed.insert(birth.pid);
                continue;
            }
            let image = ImageKind::Mm.file_name(u64::from(birth.pid));
            let pages = PageIndex::read(&images.dir, ImageKind::Pagemap, u64::from(birth.pid))
                .map_err(|error| refused(&image, &error))?;
            let parent = birth
                .parent
                .and_then(|parent| spaces.plans.get(&parent))
                .cloned();
            let request = MemoryRequest {
                mm,
                pages: &Arc::new(pages),
                parent: parent.as_deref(),
                arena: &spaces.arena,
                host: &host,
                segments: &segments,
            };
            let plan = MemoryPlan::new(request).map_err(|error| refused(&image, &error))?;
            spaces.plans.insert(birth.pid, Arc::new(plan));
        }
        Ok(spaces)
    }

    /// Tasks that must be forked from their filled parent, to share its pages.
    pub fn sharing(&self) -> BTreeSet<u32> {
        self.plans
            .iter()
            .filter(|(_, plan)| plan.shares_with_parent())
            .map(|(pid, _)| *pid)
            .collect()
    }

    /// Adds the steps that make shared segments, and those that map and fill every task.
    pub fn plan(&self, tree: &Tree, planner: &mut Planner<'_>) -> Result<(), PlanError> {
        self.plan_segments(planner)?;
        shm::plan_attached(planner)?;
        let sharing = self.sharing();
        for birth in &tree.births {
            let pid = birth.pid;
            if is_zombie(planner.images, pid) || birth.helper {
                continue;
            }
            let Some(plan) = self.plans.get(&pid).cloned() else {
                let lender = birth.parent.expect("only children borrow");
                planner.task_step(
                    pid,
                    "share memory",
                    (&[Handle::Memory(lender)], &[Handle::Memory(pid)]),
                    |_| Ok(()),
                );
                continue;
            };
            let mut needs = vec![Handle::Files, Handle::Object("early", u64::from(pid))];
            // Who shares pages with it and is of its older session is forked between the two.
            let heirs = tree.births.iter().filter(|child| child.parent == Some(pid));
            let mut heirs = heirs.filter(|child| sharing.contains(&child.pid));
            let comes_first = heirs.any(|child| child.before_session);
            if !comes_first {
                needs.push(Handle::Session(pid));
            }
            // A fork of an empty address space is cheap: who shares nothing comes first.
            let children = tree.births.iter().filter(|child| child.parent == Some(pid));
            let early = children.filter(|child| {
                !sharing.contains(&child.pid) && (child.before_session || !comes_first)
            });
            needs.extend(early.map(|child| Handle::Born(child.pid)));
            needs.extend(plan.system_v().map(shm::provided));
            let parents = self.parents.clone();
            planner.task_step(
                pid,
                "map and fill memory",
                (&needs, &[Handle::Memory(pid)]),
                move |world| fill(world, pid, &plan, parents),
            );
        }
        Ok(())
    }

    fn plan_segments(&self, planner: &mut Planner<'_>) -> Result<(), PlanError> {
        let plans = self.plans.values().map(AsRef::as_ref);
        let segments = memory::plan_segments(plans);
        for segment in segments {
            let handle = Handle::Segment(segment.id);
            planner.step(
                format!("make shared segment {:#x}", segment.id),
                (&[], &[handle]),
                move |world| {
                    let file = memory::make_segment(&segment, &world.images.dir)
                        .map_err(|error| failed(0, error))?;
                    world.keep_segment(segment.id, file)
                },
            );
        }
        Ok(())
    }
}

fn shares_space(images: &TreeImages, parent: u32, pid: u32) -> bool {
    let space = |pid| {
        images
            .task(pid)
            .filter(|task| task.mm.is_some())
            .and_then(|task| task.ids.as_ref())
            .map(|ids| ids.vm_id)
    };
    space(parent).is_some() && space(parent) == space(pid)
}

fn fill(
    world: &mut World<'_>,
    pid: u32,
    plan: &MemoryPlan,
    parents: Arc<ParentPages>,
) -> Result<(), ExecuteError> {
    let exe = TaskFd(world.file(plan.exe_file())?.as_raw_fd());
    let mut opened = BTreeMap::new();
    for source in plan.sources() {
        let number = match source {
            Source::File { id, .. } => Some(world.file(id)?.as_raw_fd()),
            Source::Segment { id } => world.segment(id),
        };
        opened.insert(source, number.map(TaskFd));
    }
    let workers = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let options = FillOptions {
        workers,
        userfaultfd: world.features.userfaultfd,
        parents,
        in_order: world.images.dir.passes_by(),
    };
    let first = world.take_deferred(pid, 0)?;
    let puppet = world.puppet(pid)?;
    let mut body = memory::Puppet {
        arena: &puppet.arena,
        thread: &mut puppet.leader,
        first,
    };
    memory::map(
        plan,
        &mut body,
        &|source| opened.get(&source).copied().flatten(),
        exe,
    )
    .map_err(|error| failed(pid, error))?;
    memory::fill(plan, &mut body, &options).map_err(|error| failed(pid, error))?;
    memory::finish(plan, &mut body).map_err(|error| failed(pid, error))
}

fn failed(pid: u32, error: impl std::error::Error + Send + Sync + 'static) -> ExecuteError {
    ExecuteError::Memory {
        pid,
        source: Box::new(error),
    }
}

fn refused(image: &str, error: &dyn std::error::Error) -> PlanError {
    let mut what = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        what = format!("{what}: {error}");
        cause = error.source();
    }
    PlanError::damaged(image, what)
}
