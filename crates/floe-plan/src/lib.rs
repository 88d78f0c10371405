//! Plans: steps, their actors, and the handles by which one step waits for another.
//!
//! Pure: a plan is built from images and options, put in order and verified before anything is
//! touched. What a step does is opaque here (`Op`).
#![forbid(unsafe_code)]

mod coverage;
mod order;

pub use coverage::{Coverage, EntryKey};
pub use order::PlanFault;

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::fmt;

/// Who carries out a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Actor {
    /// The restoring process itself.
    Coordinator,
    /// A task that is being restored, by its pid in the images.
    Task(u32),
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Actor::Coordinator => f.write_str("coordinator"),
            Actor::Task(pid) => write!(f, "task {pid}"),
        }
    }
}

/// Something that one step makes and others need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Handle {
    /// An open file description, by its id in the images.
    File(u32),
    /// Content behind several descriptions: a pipe's data, a socket's queue, a pty pair.
    Object(&'static str, u64),
    /// A shared memory segment.
    Segment(u64),
    /// Every file that tasks inherit from the coordinator is open.
    Files,
    /// The task exists, stopped, with an empty or inherited address space.
    Born(u32),
    /// The task's memory is mapped and filled.
    Memory(u32),
    /// The task is in its final session.
    Session(u32),
    /// The task's descriptors have their final numbers.
    Descriptors(u32),
    /// The task's threads exist.
    Threads(u32),
    /// Every task of the tree exists.
    Tree,
    /// Everything is in place but registers, credentials and timers.
    Ready,
}

/// One step: the smallest thing that another actor may wait for.
pub struct Step<Op> {
    /// What it does and to what, for `--dry-run`, logs and errors.
    pub name: Cow<'static, str>,
    /// Who does it.
    pub actor: Actor,
    /// What must exist before.
    pub needs: Vec<Handle>,
    /// What exists after.
    pub makes: Vec<Handle>,
    /// How it is done.
    pub op: Op,
}

impl<Op> fmt::Display for Step<Op> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.actor, self.name)
    }
}

/// Steps in no particular order.
pub struct PlanBuilder<Op> {
    steps: Vec<Step<Op>>,
}

impl<Op> Default for PlanBuilder<Op> {
    fn default() -> Self {
        Self { steps: Vec::new() }
    }
}

impl<Op> PlanBuilder<Op> {
    /// Adds a step.
    pub fn add(&mut self, step: Step<Op>) {
        self.steps.push(step);
    }

    /// Every handle of this shape that some step makes.
    pub fn made(&self, wanted: impl Fn(&Handle) -> bool) -> Vec<Handle> {
        let made = self.steps.iter().flat_map(|step| step.makes.iter());
        made.filter(|handle| wanted(handle)).copied().collect()
    }

    /// Every handle that is made only after one of this shape, at however many steps' distance.
    pub fn made_after(&self, first: impl Fn(&Handle) -> bool) -> BTreeSet<Handle> {
        let mut users: HashMap<Handle, Vec<usize>> = HashMap::new();
        for (index, step) in self.steps.iter().enumerate() {
            for need in &step.needs {
                users.entry(*need).or_default().push(index);
            }
        }
        let mut open: Vec<Handle> = users.keys().filter(|need| first(need)).copied().collect();
        let mut after = BTreeSet::new();
        while let Some(handle) = open.pop() {
            for index in users.remove(&handle).unwrap_or_default() {
                let makes = self.steps[index].makes.iter();
                open.extend(makes.filter(|made| after.insert(**made)));
            }
        }
        after
    }

    /// Orders the steps so that each handle is made before it is needed; among free steps the order
    /// in which they were added is kept.
    pub fn finish(self) -> Result<Plan<Op>, Vec<PlanFault>> {
        let order = order::order(&self.steps)?;
        let mut slots: Vec<Option<Step<Op>>> = self.steps.into_iter().map(Some).collect();
        let taken = order.into_iter().filter_map(|index| slots[index].take());
        Ok(Plan {
            steps: taken.collect(),
        })
    }
}

/// Steps in an order in which they can be carried out.
pub struct Plan<Op> {
    steps: Vec<Step<Op>>,
}

impl<Op> Plan<Op> {
    /// The steps, first to last.
    pub fn steps(&self) -> &[Step<Op>] {
        &self.steps
    }

    /// The steps, to be carried out.
    pub fn into_steps(self) -> impl Iterator<Item = Step<Op>> {
        self.steps.into_iter()
    }
}
