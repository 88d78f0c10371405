//! Steps that make the tasks: the root, forks, sessions, groups, threads, zombies.

mod alone;
mod choice;
mod doors;
mod threads;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use floe_inject::{ARENA_BYTES, Arg, BufferId, CallId, Program, RootSpawn, Seized};
use floe_kernel::acting::Acting;
use floe_kernel::ids::HostPid;
use floe_kernel::namespace::{Namespace, NsKind};
use floe_options::{Action, DetachMode, HookEvent};
use floe_plan::Handle;
use floe_resources::fd::tty::take_controlling_terminal;
use floe_resources::namespace::user_births::Arrival;
use floe_resources::namespace::{nested, time};
use floe_resources::restore::{Attempt, ExecuteError, PlanError, Planner, Puppet, World};
use floe_resources::task::attributes;
use floe_resources::task::credentials::Credentials;

pub use threads::plan_threads;

use alone::Alone;
use choice::Choice;
use doors::Doors;

use crate::kin::known_children;
use crate::memory;
use crate::midwife;
use crate::tree::{Birth, EarlyGroup, Place, Tree, is_zombie};

/// What makes the birth of the tree's tasks differ from run to run.
pub struct Births<'t> {
    /// Who forks whom.
    pub tree: &'t Tree,
    /// Where every arena lies.
    pub arena: u64,
    /// Tasks that are forked when their parent's memory is in place, to share pages with it.
    pub share_memory: BTreeSet<u32>,
    /// Tasks that enter control groups, which their children inherit.
    pub movers: BTreeSet<u32>,
}

impl Births<'_> {
    /// Adds the steps from the root's birth to the whole tree standing there.
    pub fn plan(&self, planner: &mut Planner<'_>) -> Result<(), PlanError> {
        let files = planner.inherited();
        planner.step(
            "all inherited files are open",
            (&files, &[Handle::Files]),
            |world| world.end_of_inheritance(),
        );
        let mut litters = self.litters(planner)?;
        for birth in &self.tree.births {
            match birth.parent {
                None => self.plan_root(birth, planner)?,
                Some(_) => {
                    if let Some(litter) = litters.remove(&birth.pid) {
                        plan_forks(litter, planner);
                    }
                    plan_early_group(birth, planner);
                }
            }
            self.plan_session(birth, planner);
        }
        let born: Vec<Handle> = self
            .tree
            .births
            .iter()
            .map(|birth| Handle::Session(birth.pid))
            .collect();
        planner.step_at_home("the whole tree stands", (&born, &[Handle::Tree]), |world| {
            let event = HookEvent::new(Action::PostSetupNamespaces, None);
            Ok(world.options.hooks.run(event)?)
        });
        self.plan_groups(planner);
        self.plan_deaths(planner);
        Ok(())
    }

    fn plan_root(&self, birth: &Birth, planner: &mut Planner<'_>) -> Result<(), PlanError> {
        let (pid, arena) = (birth.pid, self.arena);
        let images = planner.images;
        let arrival = match images.users.birth_of(pid) {
            None => None,
            Some(_) => {
                let ours = Credentials::of_this_thread().map_err(unknown)?;
                Some(Arrival::of(images, images.root(), (None, &ours))?)
            }
        };
        let sibling = planner.options.detach == DetachMode::Sibling;
        planner.step_at_home(
            format!("clone the root, pid {pid}"),
            (&[Handle::Files], &[Handle::Born(pid)]),
            move |world| {
                let parent = if sibling { libc::CLONE_PARENT } else { 0 };
                let spawn = RootSpawn {
                    flags: parent as u64,
                    set_tid: vec![pid as i32],
                    // The kernel takes the signal of CLONE_PARENT from the caller's own birth.
                    exit_signal: if sibling { 0 } else { libc::SIGCHLD },
                    arena,
                    arena_bytes: ARENA_BYTES,
                };
                let (arena, mut leader) = world.inside(|world| {
                    // It is to be what we are, not whom we make files as there.
                    let _own =
                        Acting::as_ourselves().during("Taking", || "our own ids".to_string())?;
                    time::in_new_clocks(world, |world| {
                        midwife::root(world, spawn, arrival.as_ref())
                    })
                })?;
                let mut body = memory::Puppet {
                    arena: &arena,
                    thread: &mut leader,
                    first: Program::new(),
                };
                memory::clear(&mut body).map_err(|source| ExecuteError::Memory {
                    pid,
                    source: Box::new(source),
                })?;
                let event = HookEvent::new(Action::SetupNamespaces, Some(leader.pid().0));
                world.puppets.insert(
                    pid,
                    Puppet {
                        arena,
                        leader,
                        threads: Default::default(),
                    },
                );
                Ok(world.options.hooks.run(event)?)
            },
        );
        Ok(())
    }

    /// Children of one parent that need the same are forked by one program; by the pid of the first.
    fn litters(&self, planner: &Planner<'_>) -> Result<BTreeMap<u32, Litter>, PlanError> {
        let is_nested = !planner.images.nested.is_empty();
        let mut litters: Vec<Litter> = Vec::new();
        let mut open: BTreeMap<(u32, u64, Vec<Handle>), usize> = BTreeMap::new();
        let in_outer_group = |pid: u32| {
            let mut births = self.tree.births.iter();
            births.any(|birth| birth.pid == pid && is_put_into_group(birth))
        };
        for birth in &self.tree.births {
            let Some(parent) = birth.parent else { continue };
            let pid = birth.pid;
            let flags = shared_tables(planner, parent, pid)?;
            let mut needs = Vec::new();
            if !birth.before_session {
                needs.push(Handle::Session(parent));
            }
            if self.share_memory.contains(&pid) {
                needs.push(Handle::Memory(parent));
            }
            if self.movers.contains(&parent) {
                needs.push(floe_resources::cgroup::entered(parent));
            }
            if is_nested && in_outer_group(parent) {
                needs.push(outer_group(parent));
            }
            if let Place::Other(namespace) = birth.place {
                needs.extend(nested::begun(planner.images, namespace));
            }
            let child = Child {
                pid,
                numbers: birth.numbers.clone(),
                place: birth.place,
                alone: self.alone(birth, planner, flags)?,
            };
            let key = (parent, flags, needs.clone());
            match open.get(&key) {
                Some(at)
                    if litters[*at].children.len() < FORKS_AT_ONCE && child.alone.is_none() =>
                {
                    litters[*at].children.push(child);
                }
                _ => {
                    open.insert(key, litters.len());
                    litters.push(Litter {
                        parent,
                        flags,
                        needs,
                        children: vec![child],
                    });
                }
            }
        }
        Ok(litters
            .into_iter()
            .map(|litter| (litter.children[0].pid, litter))
            .collect())
    }

    /// How a child is born that is no matter of a single call.
    fn alone(
        &self,
        birth: &Birth,
        planner: &Planner<'_>,
        flags: u64,
    ) -> Result<Option<Rc<Alone>>, PlanError> {
        let images = planner.images;
        let (Some(parent), false) = (birth.parent, images.users.is_empty()) else {
            return Ok(None);
        };
        let (from, user) = (
            self.tree.birth_users(images, parent),
            self.tree.birth_users(images, birth.pid),
        );
        let choice = Choice::new(images, user, (&birth.numbers, birth.namespace));
        let arrival = match images.task(birth.pid) {
            Some(task) if user != from => {
                let ours = Credentials::of_this_thread().map_err(unknown)?;
                Some(Arrival::of(images, task, (from, &ours))?)
            }
            _ => None,
        };
        if arrival.is_some() && flags != 0 {
            return Err(PlanError::Unsupported {
                object: format!("Task {}, which shares tables with its parent,", birth.pid),
                remedy: "it is born in another user namespace; end it before the dump",
            });
        }
        let is_plain = choice.is_free() && arrival.is_none();
        Ok((!is_plain).then(|| Rc::new(Alone { choice, arrival })))
    }

    fn plan_session(&self, birth: &Birth, planner: &mut Planner<'_>) {
        let pid = birth.pid;
        let early = self
            .tree
            .births
            .iter()
            .filter(|child| child.parent == Some(pid) && child.before_session);
        let needs: Vec<Handle> = early.map(|child| Handle::Born(child.pid)).collect();
        if !birth.leads_session {
            let leads = birth.early_group == Some(EarlyGroup::Leads);
            planner.task_step(
                pid,
                "stay in the session",
                (&needs, &[Handle::Session(pid)]),
                move |world| match leads {
                    true => set_group(world, pid, (0, 0)),
                    false => Ok(()),
                },
            );
            return;
        }
        planner.task_step(
            pid,
            "setsid",
            (&needs, &[Handle::Session(pid)]),
            move |world| {
                let mut program = Program::new();
                program.call("setsid", libc::SYS_setsid, &[]);
                world.run(pid, &program)?;
                take_controlling_terminal(world, pid)
            },
        );
    }

    fn plan_groups(&self, planner: &mut Planner<'_>) {
        let births = self.tree.births.iter();
        let members: Vec<(u32, u32)> = births
            .filter_map(|birth| Some((birth.pid, birth.group?)))
            .collect();
        planner.step(
            "join process groups",
            (&[Handle::Tree], &[Handle::Object("groups", 0)]),
            move |world| {
                let (leaders, others): (Vec<_>, Vec<_>) =
                    members.into_iter().partition(|(pid, group)| pid == group);
                for (pid, group) in leaders.into_iter().chain(others) {
                    let group = world.images.nested.seen_by(pid, group);
                    set_group(world, pid, (0, group))?;
                }
                Ok(())
            },
        );
    }

    /// Helpers go before zombies appear, so that nobody mistakes one for the other.
    fn plan_deaths(&self, planner: &mut Planner<'_>) {
        let births = &self.tree.births;
        let helpers: Vec<Birth> = births
            .iter()
            .filter(|birth| birth.helper)
            .cloned()
            .collect();
        let adopters = helpers.iter().filter_map(|birth| birth.adopter);
        let memory: Vec<Handle> = adopters.map(Handle::Memory).collect();
        let needs = [&[Handle::Tree, Handle::Object("groups", 0)][..], &memory].concat();
        planner.step(
            "dismiss helpers",
            (&needs, &[Handle::Object("helpers", 0)]),
            move |world| {
                helpers
                    .iter()
                    .rev()
                    .try_for_each(|birth| dismiss(world, birth))
            },
        );
        let images = planner.images;
        for birth in self
            .tree
            .births
            .iter()
            .filter(|birth| is_zombie(images, birth.pid))
        {
            let pid = birth.pid;
            let status = images
                .task(pid)
                .and_then(|task| task.core.tc.as_ref())
                .map_or(0, |task| task.exit_code);
            let needs = [
                Handle::Tree,
                Handle::Object("groups", 0),
                Handle::Object("helpers", 0),
            ];
            let makes = [
                Handle::Memory(pid),
                Handle::Descriptors(pid),
                Handle::Threads(pid),
            ];
            planner.task_step(pid, "die as a zombie", (&needs, &makes), move |world| {
                die(world, pid, status)
            });
        }
    }
}

fn unknown(error: std::io::Error) -> PlanError {
    PlanError::damaged("/proc/thread-self", error.to_string())
}

/// `CLONE_FILES` and the like, for what a child shares with its parent.
fn shared_tables(planner: &Planner<'_>, parent: u32, pid: u32) -> Result<u64, PlanError> {
    let ids = |pid| planner.images.task(pid).and_then(|task| task.ids.as_ref());
    let (Some(theirs), Some(ours)) = (ids(parent), ids(pid)) else {
        return Ok(0);
    };
    if is_zombie(planner.images, pid) || is_zombie(planner.images, parent) {
        return Ok(0);
    }
    let table = [
        (theirs.files_id == ours.files_id, libc::CLONE_FILES),
        (theirs.fs_id == ours.fs_id, libc::CLONE_FS),
        (theirs.vm_id == ours.vm_id, libc::CLONE_VM),
        (
            theirs.vm_id == ours.vm_id && theirs.sighand_id == ours.sighand_id,
            libc::CLONE_SIGHAND,
        ),
    ];
    Ok(table
        .iter()
        .filter(|(shared, _)| *shared)
        .map(|(_, flag)| *flag as u64)
        .sum())
}

/// Offset of `set_tid` in `struct clone_args`.
const SET_TID_OFFSET: usize = 64;
/// Offset of `pidfd` in it.
pub const PIDFD_OFFSET: usize = 8;

/// A call of `clone3` for a new task that is traced from its first instruction, and its arguments.
pub fn clone_program(
    program: &mut Program,
    label: String,
    flags: u64,
    (numbers, exit_signal): (&[u32], i32),
) -> (CallId, BufferId) {
    let tids: Vec<u8> = numbers.iter().flat_map(|tid| tid.to_le_bytes()).collect();
    let set_tid = program.buffer(&tids);
    // flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup
    let words = [
        flags | libc::CLONE_PTRACE as u64,
        0,
        0,
        0,
        exit_signal as u64,
        0,
        0,
        0,
        0,
        numbers.len() as u64,
        0,
    ];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let size = bytes.len();
    let args = program.buffer(&bytes);
    if !numbers.is_empty() {
        program.point(args, SET_TID_OFFSET, set_tid);
    }
    let call = program.call(label, libc::SYS_clone3, &[Arg::from(args), Arg::from(size)]);
    (call, args)
}

/// A child as its parent forks it.
#[derive(Clone, Debug)]
struct Child {
    pid: u32,
    /// Of `set_tid`.
    numbers: Vec<u32>,
    place: Place,
    /// Born by itself.
    alone: Option<Rc<Alone>>,
}

/// Children that one program forks.
struct Litter {
    parent: u32,
    /// Of `clone3`.
    flags: u64,
    needs: Vec<Handle>,
    children: Vec<Child>,
}

/// Children of one program. Each has a copy of its parent's arena as it was then.
const FORKS_AT_ONCE: usize = 64;

fn plan_forks(litter: Litter, planner: &mut Planner<'_>) {
    let pids: Vec<u32> = litter.children.iter().map(|child| child.pid).collect();
    let made: Vec<Handle> = pids.iter().map(|pid| Handle::Born(*pid)).collect();
    let name = match &pids[..] {
        [pid] => format!("fork task {pid}"),
        pids => format!("fork {} tasks from {} on", pids.len(), pids[0]),
    };
    let needs = litter.needs.clone();
    planner.task_step(litter.parent, name, (&needs, &made), move |world| {
        fork(world, &litter)
    });
}

/// If one cannot be forked, those before it end with the coordinator: nobody has let them run.
fn fork(world: &mut World<'_>, litter: &Litter) -> Result<(), ExecuteError> {
    if let [child] = &litter.children[..]
        && let Some(alone) = &child.alone
    {
        return alone::fork(world, (litter, child), alone);
    }
    let mut program = Program::new();
    let mut calls = Vec::with_capacity(litter.children.len());
    let mut doors = Doors::default();
    for child in &litter.children {
        let label = format!("clone3 of task {}", child.pid);
        let flags = match child.place {
            Place::New(_) => litter.flags | libc::CLONE_NEWPID as u64,
            _ => litter.flags,
        };
        let who = (&child.numbers[..], libc::SIGCHLD);
        doors.open(world, litter.parent, child.place)?;
        doors.go(&mut program, child.place);
        calls.push((child, clone_program(&mut program, label, flags, who).0));
    }
    doors.leave(&mut program);
    let mut known = known_children(world)?;
    let puppet = world.puppet(litter.parent)?;
    let outcome = puppet.run(&program)?.expect("the program has a call");
    let (arena, parent) = (puppet.arena.clone(), puppet.pid());
    // The newest child is found first.
    for (child, call) in calls.into_iter().rev() {
        let host = match &mut known {
            // Ours are the numbers of the images.
            None if !world.images.nested.is_empty() => HostPid(child.pid.cast_signed()),
            None => HostPid(outcome.result(call) as i32),
            Some(known) => known.find_child(parent, child.pid)?,
        };
        let leader = Seized::born(host).wait_stopped()?;
        let puppet = Puppet {
            arena: arena.clone(),
            leader,
            threads: Default::default(),
        };
        keep_child(world, child, puppet)?;
    }
    Ok(())
}

/// Notes a child, and the pid namespace that it begins.
fn keep_child(world: &mut World<'_>, child: &Child, puppet: Puppet) -> Result<(), ExecuteError> {
    let host = puppet.pid();
    world.puppets.insert(child.pid, puppet);
    if let Place::New(namespace) = child.place {
        let what = || format!("pid namespace {namespace}");
        let begun = Namespace::of_task(host, NsKind::Pid).during("Opening", what)?;
        world.namespaces().keep(namespace, begun);
    }
    Ok(())
}

/// The task is in a group that it cannot name, before it has children.
fn outer_group(pid: u32) -> Handle {
    Handle::Object("outer group", u64::from(pid))
}

fn is_put_into_group(birth: &Birth) -> bool {
    matches!(birth.early_group, Some(EarlyGroup::ByParent(_)))
}

/// Has a parent put its child into a group that the child cannot name.
fn plan_early_group(birth: &Birth, planner: &mut Planner<'_>) {
    let (Some(EarlyGroup::ByParent(group)), Some(parent)) = (birth.early_group, birth.parent)
    else {
        return;
    };
    let pid = birth.pid;
    let needs = [Handle::Born(pid), Handle::Session(group)];
    let name = format!("put task {pid} into group {group}");
    planner.task_step(parent, name, (&needs, &[outer_group(pid)]), move |world| {
        let seen = |id| world.images.nested.seen_by(parent, id);
        let numbers = (seen(pid), seen(group));
        set_group(world, parent, numbers)
    });
}

/// Has a task set the group of a process; numbers are those that it knows.
fn set_group(
    world: &mut World<'_>,
    pid: u32,
    (process, group): (u32, u32),
) -> Result<(), ExecuteError> {
    let mut program = Program::new();
    program.call(
        format!("setpgid to {group}"),
        libc::SYS_setpgid,
        &[Arg::from(process), Arg::from(group)],
    );
    world.run(pid, &program).map(drop)
}

fn set_subreaper(world: &mut World<'_>, pid: u32, on: i32) -> Result<(), ExecuteError> {
    let mut program = Program::new();
    program.call(
        "prctl(PR_SET_CHILD_SUBREAPER)",
        libc::SYS_prctl,
        &[Arg::from(libc::PR_SET_CHILD_SUBREAPER), Arg::from(on)],
    );
    world.run(pid, &program).map(drop)
}

/// Ends a helper and lets its parent reap it. No other task than its adopter is a subreaper then, so its
/// orphans pass all that stand between.
fn dismiss(world: &mut World<'_>, helper: &Birth) -> Result<(), ExecuteError> {
    let (pid, Some(parent)) = (helper.pid, helper.parent) else {
        return Ok(());
    };
    if let Some(adopter) = helper.adopter {
        set_subreaper(world, adopter, 1)?;
    }
    die(world, pid, 0)?;
    let mut program = Program::new();
    // Both are in one namespace, or the parent is in that of the images.
    let depth = world.images.nested.below(parent).len();
    let number = helper.numbers.iter().rev().nth(depth).copied();
    let args = [
        Arg::from(number.unwrap_or(pid)),
        Arg::from(0),
        Arg::from(libc::__WALL),
        Arg::from(0),
    ];
    program.call(format!("wait4 for helper {pid}"), libc::SYS_wait4, &args);
    world.run(parent, &program)?;
    match helper.adopter {
        Some(adopter) => set_subreaper(world, adopter, 0),
        None => Ok(()),
    }
}

/// Ends a task with a wait status: an exit code in the second byte, or a signal in the first.
fn die(world: &mut World<'_>, pid: u32, status: u32) -> Result<(), ExecuteError> {
    let Some(mut puppet) = world.puppets.remove(&pid) else {
        return Ok(());
    };
    let signal = (status & 0x7f) as i32;
    let mut program = Program::new();
    let no_core = program.buffer(&[0; 16]);
    let args = [
        Arg::from(0),
        Arg::from(libc::RLIMIT_CORE),
        Arg::from(no_core),
        Arg::from(0),
    ];
    program.call("prlimit64(RLIMIT_CORE)", libc::SYS_prlimit64, &args);
    let core = world
        .images
        .task(pid)
        .and_then(|task| task.core.tc.as_ref());
    if let Some(core) = core.filter(|core| !core.comm.is_empty()) {
        attributes::plan_comm(&core.comm, &mut program);
    }
    puppet.run(&program)?;
    let Puppet { arena, leader, .. } = puppet;
    Ok(arena.end_task(leader, (status >> 8 & 0xff) as i32, signal)?)
}
