//! Stopping a tree.
//!
//! Threads are seized and interrupted, all of a process before the first is waited for. A process whose
//! threads have all stopped makes no more threads or children, so listing goes on until a whole pass over
//! the tree finds nothing new. All ptrace requests must come from this one thread.
//!
//! With a control group all its members stand still while they are seized, however fast they fork. They
//! are waited for once it is thawed; whoever is not in the group is found afterwards.

use std::collections::HashSet;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use floe_inject::{InjectError, Seized, Stopped};
use floe_kernel::fault;
use floe_kernel::ids::HostPid;
use floe_kernel::proc::{ProcDir, ProcError, Stat, parse_cgroup, parse_stat, parse_status};
use floe_kernel::ptrace::options;
use floe_resources::cgroup::freezer::{Freezer as Group, frozen_group};
use floe_resources::namespace::PidView;

use crate::error::FreezeError;
use crate::keeper;

/// Remote calls need stops at system calls, and filters of the task must not forbid them.
const OPTIONS: u32 = options::TRACE_SYSGOOD | options::SUSPEND_SECCOMP;

/// What a timeout of zero stands for, as in CRIU.
const NO_LIMIT: Duration = Duration::from_secs(365 * 24 * 3600);

/// How a task was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskState {
    Alive,
    /// In a group-stop by this signal.
    Stopped(i32),
    /// A zombie.
    Dead,
}

/// One stopped process.
#[derive(Debug)]
pub struct FrozenTask {
    pub pid: HostPid,
    /// Its pid in the images.
    pub number: u32,
    /// Its place in [`FrozenTree::tasks`]' order; `None` for the root.
    pub parent: Option<HostPid>,
    pub proc: ProcDir,
    /// The leader first, then by tid; none of a zombie.
    pub threads: Vec<Stopped>,
    pub stat: Stat,
    pub state: TaskState,
}

impl FrozenTask {
    /// Whether it is a zombie.
    pub fn is_dead(&self) -> bool {
        self.state == TaskState::Dead
    }
}

/// A stopped tree. Dropping it releases every task as it was.
#[derive(Debug)]
pub struct FrozenTree {
    /// Frozen again, if it was, before the tasks are released.
    group: Option<Group>,
    /// Parents before their children; the root is the first.
    pub tasks: Vec<FrozenTask>,
    /// How the images number its processes and threads.
    pub pids: Rc<PidView>,
}

impl FrozenTree {
    /// The task at the top.
    pub fn root(&self) -> &FrozenTask {
        &self.tasks[0]
    }

    /// Tasks that are not zombies.
    pub fn living(&self) -> impl Iterator<Item = &FrozenTask> {
        self.tasks.iter().filter(|task| !task.is_dead())
    }

    /// The tasks, for whoever ends them: their group stays thawed, or they could not end.
    pub fn into_tasks_to_end(self) -> Vec<FrozenTask> {
        if let Some(group) = self.group {
            group.leave_thawed();
        }
        self.tasks
    }

    /// The tasks, to be released: a group that was frozen is so again.
    pub fn into_tasks_to_release(self) -> Vec<FrozenTask> {
        drop(self.group);
        self.tasks
    }

    /// Threads of all tasks.
    pub fn thread_count(&self) -> usize {
        self.tasks.iter().map(|task| task.threads.len()).sum()
    }
}

/// Stops the tree under `root` within `timeout`, by the freezer of `group` if there is one.
pub fn freeze(
    root: HostPid,
    timeout: Duration,
    group: Option<&Path>,
) -> Result<FrozenTree, FreezeError> {
    let mut freezer = Freezer {
        tasks: Vec::new(),
        known: HashSet::new(),
        started: Instant::now(),
        timeout: if timeout.is_zero() { NO_LIMIT } else { timeout },
        seized: Interrupted::default(),
    };
    let group = group.map(|path| freezer.seize_frozen(root, path));
    let group = group.transpose()?;
    if !freezer.add(root, None)? {
        return Err(FreezeError::NoTask { pid: root });
    }
    if freezer.tasks[0].is_dead() {
        return Err(FreezeError::RootDead { pid: root });
    }
    while freezer.add_children_of_all()? {}
    let mut pids = PidView::of(&freezer.tasks[0].proc)?;
    for task in &mut freezer.tasks {
        pids.learn(&task.proc, task.threads.iter().map(Stopped::pid))?;
        task.number = pids.number(task.pid);
    }
    Ok(FrozenTree {
        group,
        tasks: std::mem::take(&mut freezer.tasks),
        pids: Rc::new(pids),
    })
}

struct Freezer {
    tasks: Vec<FrozenTask>,
    known: HashSet<HostPid>,
    started: Instant,
    timeout: Duration,
    /// Threads that were seized while their group was frozen.
    seized: Interrupted,
}

impl Freezer {
    /// Seizes the tree while its group stands still, and thaws it.
    fn seize_frozen(&mut self, root: HostPid, path: &Path) -> Result<Group, FreezeError> {
        let mut group = Group::open(path)?;
        // Half of the time is left for what the group does not stop.
        if !group.freeze(self.started + self.timeout / 2)? {
            tracing::warn!("{} does not freeze; going on without", path.display());
            return Ok(group);
        }
        let mut waiting = vec![root];
        while let Some(pid) = waiting.pop() {
            // What is wrong with a task is found out again, and reported, once all run.
            let Ok(proc) = ProcDir::open(pid) else {
                continue;
            };
            if let Ok(mut new) = seize_new(&proc, &[], &mut Interrupted::default()) {
                self.seized.threads.append(&mut new.threads);
            }
            for tid in proc.threads().unwrap_or_default() {
                waiting.extend(proc.children(tid).unwrap_or_default());
            }
        }
        group.thaw()?;
        tracing::debug!(
            threads = self.seized.threads.len(),
            "seized in a frozen group"
        );
        Ok(group)
    }

    /// One pass over the tree, new tasks included; true when it found any.
    fn add_children_of_all(&mut self) -> Result<bool, FreezeError> {
        let mut found = false;
        let mut index = 0;
        while index < self.tasks.len() {
            let parent = self.tasks[index].pid;
            for child in self.children(index)? {
                if !self.known.contains(&child) {
                    found |= self.add(child, Some(parent))?;
                }
            }
            index += 1;
        }
        Ok(found)
    }

    fn children(&self, index: usize) -> Result<Vec<HostPid>, FreezeError> {
        let task = &self.tasks[index];
        let mut children = Vec::new();
        for thread in &task.threads {
            children.extend(task.proc.children(thread.pid())?);
        }
        Ok(children)
    }

    /// Stops one process and adds it; false when it is gone.
    fn add(&mut self, pid: HostPid, parent: Option<HostPid>) -> Result<bool, FreezeError> {
        if pid.0 == std::process::id().cast_signed() {
            return Err(FreezeError::Ourselves { pid });
        }
        let proc = match ProcDir::open(pid) {
            Ok(proc) => proc,
            Err(error) if error.is_gone() => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let (stopped, stat) = match self.stop_threads(&proc) {
            Err(FreezeError::Proc(error)) if error.is_gone() => return Ok(false),
            other => other?,
        };
        let state = match stopped.first().map(Stopped::stop_signal) {
            None => TaskState::Dead,
            Some(Some(signal)) => TaskState::Stopped(signal),
            Some(None) => TaskState::Alive,
        };
        self.known.insert(pid);
        self.tasks.push(FrozenTask {
            pid,
            number: 0,
            parent,
            proc,
            threads: stopped,
            stat,
            state,
        });
        Ok(true)
    }

    /// Stops all threads of a process, the leader first in the result; none for a zombie.
    fn stop_threads(&mut self, proc: &ProcDir) -> Result<(Vec<Stopped>, Stat), FreezeError> {
        let mut stopped: Vec<Stopped> = Vec::new();
        loop {
            self.check_time()?;
            let new = seize_new(proc, &stopped, &mut self.seized)?;
            let nothing_new = new.threads.is_empty();
            stopped.extend(wait_for_all(proc, new)?);
            let stat = parse_stat(&proc.read_record("stat")?).map_err(|error| proc.bad(error))?;
            // Stopped threads make no more, so as many as there are is all of them.
            let complete = nothing_new || stat.threads as usize == stopped.len();
            if complete && (!stopped.is_empty() || stat.state == b'Z') {
                stopped.sort_by_key(|thread| (thread.pid() != proc.pid(), thread.pid()));
                return Ok((stopped, stat));
            }
        }
    }

    fn check_time(&self) -> Result<(), FreezeError> {
        if self.started.elapsed() < self.timeout {
            return Ok(());
        }
        Err(FreezeError::Timeout {
            seconds: self.timeout.as_secs(),
            tasks: self.tasks.len(),
        })
    }
}

/// Threads on their way to a stop. They are waited for in any case: giving up a thread that is still
/// running is not possible.
#[derive(Default)]
struct Interrupted {
    threads: Vec<Seized>,
}

impl Drop for Interrupted {
    fn drop(&mut self) {
        for thread in self.threads.drain(..) {
            // Dropping a stopped thread releases it; one that cannot be stopped stays as it is.
            drop(thread.wait_stopped());
        }
    }
}

impl Interrupted {
    /// Takes the thread `tid` out, if it is here.
    fn take(&mut self, tid: HostPid) -> Option<Seized> {
        let place = self.threads.iter().position(|thread| thread.pid() == tid)?;
        Some(self.threads.swap_remove(place))
    }
}

/// Seizes and interrupts the threads that were not stopped yet, where `seized` does not have them
/// already; none of a zombie.
fn seize_new(
    proc: &ProcDir,
    stopped: &[Stopped],
    seized: &mut Interrupted,
) -> Result<Interrupted, FreezeError> {
    let have: HashSet<HostPid> = stopped.iter().map(Stopped::pid).collect();
    let mut new = Interrupted {
        threads: Vec::new(),
    };
    let all = proc.threads()?;
    for &tid in all.iter().filter(|tid| !have.contains(tid)) {
        let seizing = match seized.take(tid) {
            Some(thread) => Seizing::Done(thread),
            None => seize(proc, tid)?,
        };
        match seizing {
            Seizing::Done(thread) => new.threads.push(thread),
            Seizing::Gone => {}
            Seizing::Zombie if all.len() == 1 => {}
            Seizing::Zombie => return Err(FreezeError::LeaderEnded { pid: proc.pid() }),
        }
    }
    Ok(new)
}

fn wait_for_all(proc: &ProcDir, mut new: Interrupted) -> Result<Vec<Stopped>, FreezeError> {
    let mut group = None;
    let mut is_frozen = || {
        let memberships = proc
            .read("cgroup")
            .ok()
            .and_then(|text| parse_cgroup(&text).ok());
        group = memberships.and_then(|memberships| frozen_group(&memberships));
        group.is_some()
    };
    let mut stopped = Vec::with_capacity(new.threads.len());
    while let Some(thread) = new.threads.pop() {
        let pid = thread.pid();
        match thread.wait_stopped_unless(&mut is_frozen) {
            Ok(thread) => stopped.push(thread),
            Err(InjectError::GivenUp { .. }) => {
                let group = group.unwrap_or_default();
                return Err(FreezeError::Frozen {
                    pid: proc.pid(),
                    group,
                });
            }
            // It ended before it stopped: the next listing tells what is left.
            Err(InjectError::Died { .. }) => {}
            Err(source) => return Err(FreezeError::Stop { pid, source }),
        }
    }
    Ok(stopped)
}

enum Seizing {
    Done(Seized),
    Gone,
    Zombie,
}

fn seize(proc: &ProcDir, tid: HostPid) -> Result<Seizing, FreezeError> {
    fault::point();
    let thread = match Seized::new(tid, OPTIONS) {
        Ok(thread) => thread,
        Err(source) => return why_not(proc, tid, source),
    };
    match thread.interrupt() {
        Ok(()) => Ok(Seizing::Done(thread)),
        Err(_) => Ok(Seizing::Gone),
    }
}

/// Looks whether there is something to be dumped at all, before anything is written.
pub fn look(root: HostPid) -> Result<(), FreezeError> {
    let gone = |_| FreezeError::NoTask { pid: root };
    let proc = ProcDir::open(root).map_err(gone)?;
    let status = parse_status(&proc.read("status").map_err(gone)?);
    let status = status.map_err(|error| proc.bad(error))?;
    if let Some(pid) = status.tgid.filter(|leader| *leader != root) {
        return Err(FreezeError::Thread { tid: root, pid });
    }
    match status.state {
        b'X' => Err(FreezeError::NoTask { pid: root }),
        b'Z' => Err(FreezeError::RootDead { pid: root }),
        _ if is_of_kernel(&proc) => Err(FreezeError::Kernel { pid: root }),
        _ => Ok(()),
    }
}

/// Whether it is a thread of the kernel: a process without a program, and not dead (proc_pid_exe(5)).
fn is_of_kernel(proc: &ProcDir) -> bool {
    // The line first: the mappings of a program may be thousands.
    let is_empty = |name: &str| proc.read(name).is_ok_and(|text| text.is_empty());
    is_empty("cmdline") && is_empty("maps")
}

/// Finds out what a refused seizing means.
fn why_not(proc: &ProcDir, tid: HostPid, source: InjectError) -> Result<Seizing, FreezeError> {
    let read = |name: &str| -> Result<Option<Vec<u8>>, ProcError> {
        match proc.read(&format!("task/{tid}/{name}")) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(error),
        }
    };
    let Some(text) = read("status")? else {
        return Ok(Seizing::Gone);
    };
    let status = parse_status(&text).map_err(|error| proc.bad(error))?;
    match (status.state, status.tracer) {
        (b'X', _) => Ok(Seizing::Gone),
        (b'Z', _) => Ok(Seizing::Zombie),
        (_, Some(tracer)) => Err(match keeper::is_engine(tracer) {
            true => FreezeError::Dumped {
                pid: tid,
                by: keeper::asked_by(tracer),
            },
            false => FreezeError::Traced { pid: tid, tracer },
        }),
        _ if source.errno() != Some(libc::EPERM) => Err(FreezeError::Stop { pid: tid, source }),
        _ if is_of_kernel(proc) => Err(FreezeError::Kernel { pid: tid }),
        _ if status.seccomp != 0 => Err(FreezeError::Filtered { pid: tid }),
        _ => Err(FreezeError::Denied { pid: tid }),
    }
}
