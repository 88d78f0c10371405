//! Pid namespaces below the root's (`pid_namespaces(7)`): what `unshare --pid --fork` in the tree makes.
//!
//! Saved:    the numbers that processes, threads, groups and sessions have inside, and the namespace that
//!           new children of a process will be in (fields of our own in `pstree.img`, which CRIU has not).
//! Rebuilt:  begun by the birth of its first process, with all numbers of everybody (`set_tid`); the
//!           namespace for children is set when the threads of a process are there.
//! Not kept: the number that the kernel would give next.
//!
//! All other numbers in images are those of the root's namespace, whoever is meant.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd};

use floe_image::messages::{FloeNestedId, PstreeEntry};
use floe_inject::{Arg, Program};
use floe_kernel::ids::HostPid;
use floe_kernel::namespace::NsKind;
use floe_kernel::proc::ProcDir;
use floe_plan::Handle;

use super::collect::refused;
use super::ids::UNBEGUN;
use super::tree::{identity, identity_at, identity_of};
use super::{PidView, TreeNamespace, TreeNamespaces, ids};
use crate::collect::{CollectError, Collector};
use crate::restore::{ExecuteError, PlanError, Planner, TaskImages, World};

/// The kernel allows no more (`MAX_PID_NS_LEVEL`).
const MAX_DEPTH: usize = 32;

/// Refuses a namespace whose processes are not all ours to make.
pub(super) fn check(
    namespace: &TreeNamespace,
    collector: &Collector<'_>,
) -> Result<(), CollectError> {
    let pids = collector.pids();
    let mut begun_here = false;
    for process in collector.tree() {
        if pids.nested(process).last() == Some(&1) {
            let found = identity(&ProcDir::open(process)?, NsKind::Pid)?;
            begun_here |= found == Some(namespace.namespace.identity());
        }
    }
    if !begun_here {
        let remedy = "its first process is not in the tree: dump a tree that has it";
        return Err(refused(namespace, remedy));
    }
    tracing::warn!(
        pid = namespace.member.0,
        "a pid namespace within the tree: CRIU cannot restore these images, Floe can"
    );
    Ok(())
}

/// Whether new children of a task will be in a pid namespace that restore can give them.
pub(super) fn children_can_follow(
    task: &ProcDir,
    collector: &Collector<'_>,
) -> Result<bool, CollectError> {
    let own = identity(task, NsKind::Pid)?;
    let of_children = identity_of(task, "pid_for_children")?;
    if own == of_children {
        return Ok(true);
    }
    // Each thread has its own; of those that differ only the simplest is kept.
    for thread in task.threads()? {
        if identity_at(task, &format!("task/{thread}/ns/pid_for_children"))? != of_children {
            return Ok(false);
        }
    }
    let namespaces = collector.namespaces();
    Ok(match of_children {
        None => task.threads()?.len() == 1,
        Some(found) => namespaces.number(NsKind::Pid, found).is_some(),
    })
}

/// Completes a task's line of `pstree.img`.
pub fn describe(
    (task, threads): (&ProcDir, &[HostPid]),
    (pids, namespaces): (&PidView, &TreeNamespaces),
    entry: &mut PstreeEntry,
) -> Result<(), CollectError> {
    entry.floe_child_pid_ns = match threads.is_empty() {
        true => None,
        false => namespaces.pid_namespace_of_children(task)?,
    };
    if pids.nested(task.pid()).is_empty() {
        return Ok(());
    }
    entry.floe_pid_ns = namespaces.pid_namespace(task)?;
    entry.floe_nested = pids.nested_ids(task.pid(), threads, (entry.pgid, entry.sid));
    Ok(())
}

/// The numbers of a tree in namespaces below the root's.
#[derive(Debug, Default)]
pub struct Nested {
    /// By the number in the root's namespace; outermost first.
    below: BTreeMap<u32, Vec<u32>>,
    /// The namespace of each task that is not in the root's.
    namespaces: BTreeMap<u32, u32>,
    /// The first task of each.
    first: BTreeMap<u32, u32>,
    /// The one around each, where that is not the root's.
    around: BTreeMap<u32, u32>,
}

impl Nested {
    /// Reads them from the lines of `pstree.img`.
    pub fn read(tasks: &[TaskImages]) -> Result<Self, PlanError> {
        let mut nested = Nested::default();
        for task in tasks {
            let entry = &task.entry;
            for FloeNestedId { id, inner } in &entry.floe_nested {
                let valid = |number: &u32| (1..=i32::MAX.cast_unsigned()).contains(number);
                if inner.is_empty() || inner.len() >= MAX_DEPTH || !inner.iter().all(valid) {
                    return Err(damaged(format!("the inner numbers of {id}")));
                }
                let before = nested.below.insert(*id, inner.clone());
                if before.is_some_and(|before| before != *inner) {
                    return Err(damaged(format!("{id} has two inner numbers")));
                }
            }
            if let Some(namespace) = entry.floe_pid_ns {
                nested.namespaces.insert(entry.pid, namespace);
            }
        }
        nested.check(tasks)?;
        Ok(nested)
    }

    fn check(&mut self, tasks: &[TaskImages]) -> Result<(), PlanError> {
        let mut seen = std::collections::BTreeSet::new();
        for task in tasks {
            let pid = task.pid();
            let depth = self.below(pid).len();
            let namespace = self.namespace_of(pid);
            if (depth > 0) != namespace.is_some() {
                return Err(damaged(format!("the pid namespace of task {pid}")));
            }
            let Some(namespace) = namespace else { continue };
            for id in std::iter::once(pid).chain(task.threads.keys().copied()) {
                let inner = self.below(id);
                if inner.len() != depth || !seen.insert((namespace, inner.last().copied())) {
                    return Err(damaged(format!("the inner number of {id}")));
                }
            }
            if self.below(pid).last() == Some(&1) {
                self.first.insert(namespace, pid);
                // Its parent began it, or is of the namespace that adopts those of who did.
                let around = self.namespace_of(task.entry.ppid);
                self.around.extend(around.map(|around| (namespace, around)));
            }
        }
        let orphan = self
            .namespaces
            .iter()
            .find(|(_, namespace)| !self.first.contains_key(namespace));
        match orphan {
            Some((pid, _)) => Err(damaged(format!(
                "the pid namespace of task {pid} has no first task"
            ))),
            None => Ok(()),
        }
    }

    /// Whether all are in the root's namespace.
    pub fn is_empty(&self) -> bool {
        self.below.is_empty()
    }

    /// The numbers of an id below the root's namespace, outermost first.
    pub fn below(&self, id: u32) -> &[u32] {
        self.below.get(&id).map_or(&[], Vec::as_slice)
    }

    /// All numbers of an id as `set_tid` takes them: innermost first.
    pub fn numbers(&self, id: u32) -> Vec<u32> {
        let below = self.below(id).iter().rev().copied();
        below.chain([id]).collect()
    }

    /// By which number a task knows an id; zero where it cannot know it.
    pub fn seen_by(&self, task: u32, id: u32) -> u32 {
        match self.below(task).len() {
            0 => id,
            depth => self.below(id).get(depth - 1).copied().unwrap_or(0),
        }
    }

    /// The pid namespace of a task, where it is not the root's.
    pub fn namespace_of(&self, pid: u32) -> Option<u32> {
        self.namespaces.get(&pid).copied()
    }

    /// The first task of a namespace.
    pub fn first_of(&self, namespace: u32) -> Option<u32> {
        self.first.get(&namespace).copied()
    }

    /// The namespaces from one to the root's, which is `None`.
    pub fn line(&self, namespace: Option<u32>) -> Vec<Option<u32>> {
        let around = |namespace: &Option<u32>| Some(self.around.get(&(*namespace)?).copied());
        std::iter::successors(Some(namespace), around)
            .take(MAX_DEPTH)
            .collect()
    }

    /// The namespace, below the root's, in which an inner number of an id is its last one.
    pub fn namespace_of_id(&self, id: u32, tasks: &[TaskImages]) -> Option<u32> {
        let depth = self.below(id).len();
        let mut tasks = tasks.iter().filter(|task| {
            let entry = &task.entry;
            entry.pid == id || entry.sid == id || entry.pgid == id
        });
        tasks.find_map(|task| {
            let namespace = self.namespace_of(task.pid())?;
            (self.below(task.pid()).len() == depth).then_some(namespace)
        })
    }

    /// The highest inner number.
    pub fn highest(&self) -> u32 {
        self.below.values().flatten().copied().max().unwrap_or(0)
    }
}

fn damaged(what: String) -> PlanError {
    PlanError::damaged("pstree.img", what)
}

/// The namespace exists, with its first task.
pub fn begun(images: &crate::restore::TreeImages, namespace: u32) -> Option<Handle> {
    images.nested.first_of(namespace).map(Handle::Born)
}

/// Adds the steps that set the pid namespace of a task's children, where that is not its own.
pub fn plan_children(planner: &mut Planner<'_>) -> Result<(), PlanError> {
    for task in &planner.images.tasks {
        let (pid, Some(namespace)) = (task.pid(), task.entry.floe_child_pid_ns) else {
            continue;
        };
        let mut needs = vec![Handle::Tree, Handle::Threads(pid)];
        let root = planner.images.root().ids.as_ref();
        let of_root = root.and_then(|root| ids::get(root, NsKind::Pid)) == Some(namespace);
        if namespace != UNBEGUN {
            let first = begun(planner.images, namespace).filter(|_| !of_root);
            needs.push(
                first.ok_or_else(|| {
                    damaged(format!("the pid namespace for children of task {pid}"))
                })?,
            );
        }
        let makes = [Handle::Object("namespace of children", u64::from(pid))];
        let name = "set the pid namespace of its children";
        planner.task_step(pid, name, (&needs, &makes), move |world| match namespace {
            UNBEGUN => unshare(world, pid),
            namespace => enter(world, pid, namespace),
        });
    }
    Ok(())
}

fn unshare(world: &mut World<'_>, pid: u32) -> Result<(), ExecuteError> {
    let mut program = Program::new();
    let args = [Arg::from(libc::CLONE_NEWPID)];
    program.call("unshare(CLONE_NEWPID)", libc::SYS_unshare, &args);
    world.run(pid, &program).map(drop)
}

fn enter(world: &mut World<'_>, pid: u32, namespace: u32) -> Result<(), ExecuteError> {
    let file = world.namespaces().get(namespace)?;
    let there = world.hand_over(pid, file.as_fd().as_raw_fd())?;
    let mut program = Program::new();
    set_for_children(&mut program, there, namespace);
    let puppet = world.puppet(pid)?;
    for thread in puppet.threads.values_mut() {
        puppet.arena.run(thread, &program)?;
    }
    program.call("close", libc::SYS_close, &[Arg::from(there)]);
    puppet.run(&program).map(drop)
}

/// Has whoever runs the program have children in this namespace; `file` is its descriptor of it.
pub fn set_for_children(program: &mut Program, file: i32, namespace: u32) {
    let args = [Arg::from(file), Arg::from(NsKind::Pid.flag())];
    let label = format!("setns to pid namespace {namespace}");
    program.call(label, libc::SYS_setns, &args);
}
