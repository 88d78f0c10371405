//! Steps that give tasks and threads the state that is theirs alone.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use floe_image::ImageKind;
use floe_image::messages::{CoreEntry, SeccompEntry, SeccompFilter};
use floe_inject::{Arg, Program, Stopped};
use floe_kernel::features::KernelFeatures;
use floe_options::DetachMode;
use floe_plan::Handle;
use floe_resources::fd::unix::Listeners;
use floe_resources::mount;
use floe_resources::namespace::user_births::{self, Entry};
use floe_resources::namespace::{self, OwnerMap};
use floe_resources::restore::{
    Attempt, ExecuteError, PlanError, Planner, Puppet, TaskImages, TreeImages, World,
};
use floe_resources::task::rebuild::{self, Birth, TaskContext};

use crate::labels::TreeLabels;
use crate::tree::is_zombie;

/// Where programs that run at once begin in the arena.
const PLACE: usize = 64;

/// What all threads of a tree are rebuilt from, beside their own images.
pub struct Background<'i> {
    /// What puppets are born with.
    pub birth: Birth,
    /// What those have instead that come into a user namespace, at birth or later.
    inside: BTreeMap<u32, Birth>,
    images: &'i TreeImages,
    /// Whether this program, the parent of the root, ends once the tree runs.
    leaves: bool,
    own_owners: BTreeMap<u32, OwnerMap>,
    seccomp: Vec<SeccompFilter>,
    features: &'i KernelFeatures,
}

impl<'i> Background<'i> {
    /// Reads what this process hands down and what the images keep for all tasks at once.
    pub fn new(planner: &Planner<'i>) -> Result<Self, PlanError> {
        let mut birth = Birth::of_this_thread()
            .map_err(|error| PlanError::damaged("/proc/thread-self", error.to_string()))?;
        let images = planner.images;
        if images.users.birth_of(images.root().pid()).is_some() {
            // See the midwife.
            birth.loginuid = birth.loginuid.map(|_| u32::MAX);
        }
        let inside = user_births::inside(images, &birth);
        let tasks = images.tasks.iter().map(TaskImages::pid);
        let own_owners = tasks.map(|pid| (pid, images.users.map(images.users.of_task(pid))));
        let seccomp: Option<SeccompEntry> = images.dir.read_optional(ImageKind::Seccomp, 0)?;
        Ok(Background {
            birth,
            inside,
            images,
            leaves: planner.options.detach == DetachMode::Detached,
            own_owners: own_owners.collect(),
            seccomp: seccomp.unwrap_or_default().seccomp_filters,
            features: planner.features,
        })
    }

    /// What a task has before it gets its own state.
    fn birth_of(&self, pid: u32) -> &Birth {
        self.inside.get(&pid).unwrap_or(&self.birth)
    }

    /// The context of one thread.
    pub fn of<'a>(&'a self, task: &'a TaskImages, tid: u32) -> TaskContext<'a> {
        TaskContext {
            tid,
            features: self.features,
            birth: self.birth_of(task.pid()),
            mm: task.mm.as_ref(),
            loses_parent: self.leaves && task.pid() == self.images.root().pid(),
            seccomp: &self.seccomp,
            nested: &self.images.nested,
            owners: &self.images.owners,
            own_owners: &self.own_owners[&task.pid()],
        }
    }
}

/// A thread of a task with its image: the leader comes last.
fn threads(task: &TaskImages) -> impl Iterator<Item = (u32, &CoreEntry)> {
    let others = task.threads.iter().map(|(tid, core)| (*tid, core));
    others.chain(std::iter::once((task.pid(), &task.core)))
}

/// The programs of some threads, with the task that they belong to.
type Programs = Vec<(u32, Program)>;

/// What the leader's program before its threads makes, where there are threads.
pub fn shared(pid: u32) -> Handle {
    Handle::Object("shared state", u64::from(pid))
}

/// Adds the steps that give every task and thread its state.
pub fn plan<'i>(
    planner: &mut Planner<'i>,
    background: &Rc<Background<'i>>,
    labels: Rc<TreeLabels>,
) -> Result<(), PlanError> {
    let images = planner.images;
    let tasks: Vec<&'i TaskImages> = images
        .tasks
        .iter()
        .filter(|task| !is_zombie(images, task.pid()))
        .collect();
    let mut last = Vec::new();
    let listeners = Listeners::of(planner);
    for task in tasks {
        last.push((task, plan_task(task, planner, (background, &listeners))?));
    }
    let everything = planner.made(|_| true);
    planner.step(
        "all is there but the last state",
        (&everything, &[Handle::Ready]),
        |_| Ok(()),
    );
    planner.step_at_home(
        "signals, timers, limits, credentials, labels of all tasks",
        (&[Handle::Ready], &[]),
        move |world| {
            labels.prepare(world)?;
            finish_all(world, &last)?;
            labels.execute(world)
        },
    );
    Ok(())
}

/// Gives all tasks their last state. Nobody waits for it, so they get it at the same time.
fn finish_all(world: &mut World<'_>, last: &[(&TaskImages, Programs)]) -> Result<(), ExecuteError> {
    let mut spaces = BTreeSet::new();
    let mut started = Vec::new();
    for (task, programs) in last {
        let pid = task.pid();
        if let Some(core) = &task.core.tc {
            let host = world.puppet(pid)?.pid();
            rebuild::attributes::write_proc(host, core)?;
        }
        // Tasks in one address space have one arena, and take turns.
        let space = task.ids.as_ref().map_or(pid, |ids| ids.vm_id);
        if !spaces.insert(space) {
            finish_started(world, &mut started)?;
        }
        close_kept(world, pid)?;
        let puppet = world.puppet(pid)?;
        run_others(puppet, pid, programs)?;
        let leaders = programs.iter().find(|(tid, _)| *tid == pid);
        if let Some((_, program)) = leaders.filter(|(_, program)| !program.is_empty()) {
            puppet.arena.start(&mut puppet.leader, program, 0)?;
            started.push((pid, program));
        }
    }
    finish_started(world, &mut started)
}

/// Waits for the ends of the programs of leaders.
fn finish_started(
    world: &mut World<'_>,
    started: &mut Vec<(u32, &Program)>,
) -> Result<(), ExecuteError> {
    for (pid, program) in started.drain(..) {
        let puppet = world.puppet(pid)?;
        puppet.arena.finish(&mut puppet.leader, program, 0)?;
    }
    Ok(())
}

/// Closes what tasks had for us; of those that share their descriptors, the first does.
fn close_kept(world: &mut World<'_>, pid: u32) -> Result<(), ExecuteError> {
    let Some(kept) = world.kept_in_tasks() else {
        return Ok(());
    };
    let mut program = Program::new();
    program.try_call("close", libc::SYS_close, &[Arg::from(kept)]);
    world.run(pid, &program).map(drop)
}

/// Adds the steps of one task but the last one, for which it answers the programs.
fn plan_task<'i>(
    task: &'i TaskImages,
    planner: &mut Planner<'i>,
    (background, listeners): (&Background<'i>, &Listeners),
) -> Result<Programs, PlanError> {
    let (pid, images) = (task.pid(), planner.images);
    let object = |name| Handle::Object(name, u64::from(pid));
    let run = |program: Program| move |world: &mut World<'i>| world.run(pid, &program).map(drop);
    let early = rebuild::plan_task(&task.core, &background.of(task, pid))?;
    let name = "settings before memory";
    planner.task_step(pid, name, (&[], &[object("early")]), move |world| {
        world.defer(pid, early)
    });
    let born = background.birth.loginuid;
    if let Some(uid) = rebuild::attributes::loginuid(&task.core, born, &images.owners) {
        let (needs, makes) = ([Handle::Tree, object("early")], [object("loginuid")]);
        planner.task_step(pid, "login uid", (&needs, &makes), move |world| {
            rebuild::attributes::write_loginuid(world, pid, uid)
        });
    }
    let mut ready = vec![Handle::Tree, object("early")];
    ready.extend(plan_entry(task, planner, background)?);
    let mut birth = background.birth_of(pid).clone();
    if !task.threads.is_empty() {
        let cores = threads(task).map(|(_, core)| core);
        let program;
        (program, birth) = rebuild::plan_shared(cores, &background.of(task, pid))?;
        let name = "what threads inherit";
        planner.task_step(pid, name, (&ready, &[shared(pid)]), run(program));
    }
    let (mut state, mut last) = (Programs::new(), Programs::new());
    for (tid, core) in threads(task) {
        let context = TaskContext {
            birth: &birth,
            ..background.of(task, tid)
        };
        rebuild::registers::checked(core, &context)?;
        state.push((tid, rebuild::plan_thread(core, &context)?));
        let mut program = rebuild::plan_last(core, &context)?;
        if tid == pid {
            listeners.plan(pid, &mut program);
        }
        last.push((tid, program));
    }
    planner.task_step(
        pid,
        "state of threads",
        (&[Handle::Threads(pid)], &[object("thread state")]),
        move |world| run_all(world, pid, state),
    );
    Ok(last)
}

/// Adds the step by which a task enters its user namespace, behind all that needs rights outside.
fn plan_entry<'i>(
    task: &'i TaskImages,
    planner: &mut Planner<'i>,
    background: &Background<'i>,
) -> Result<Option<Handle>, PlanError> {
    let (pid, images) = (task.pid(), planner.images);
    let entry = Entry::of(images, task, &background.birth)?;
    let (Some(entry), Some(entered)) = (entry, user_births::entered(images, pid)) else {
        return Ok(None);
    };
    let own = [Handle::Memory(pid), Handle::Descriptors(pid), Handle::Tree];
    let mut needs = [&own[..], &[Handle::Object("early", u64::from(pid))]].concat();
    let loginuid = Handle::Object("loginuid", u64::from(pid));
    needs.extend(planner.made(|handle| *handle == loginuid));
    let elsewhere = [namespace::entered(images, pid), mount::entered(images, pid)];
    needs.extend(planner.made(|handle| elsewhere.contains(&Some(*handle))));
    let name = "enter the user namespace";
    planner.task_step(pid, name, (&needs, &[entered]), move |world| {
        entry.go(world)
    });
    Ok(Some(entered))
}

/// Runs the programs of the other threads at once, then that of the leader.
fn run_all(world: &mut World<'_>, pid: u32, mut programs: Programs) -> Result<(), ExecuteError> {
    if programs.iter().any(|(tid, _)| *tid != pid) {
        run_others(world.puppet(pid)?, pid, &programs)?;
    }
    let leaders = programs.iter().position(|(tid, _)| *tid == pid);
    match leaders.map(|at| programs.swap_remove(at)) {
        Some((_, program)) => world.defer(pid, program),
        None => Ok(()),
    }
}

/// Runs the programs of the threads beside the leader at once.
fn run_others(puppet: &mut Puppet, pid: u32, programs: &Programs) -> Result<(), ExecuteError> {
    let others = programs.iter().filter(|(tid, _)| *tid != pid);
    let mut others = others.filter(|(_, program)| !program.is_empty()).peekable();
    while others.peek().is_some() {
        let mut started = Vec::new();
        let mut used = 0;
        while let Some((tid, program)) = others.next_if(|(_, program)| {
            started.is_empty() || used + program.arena_bytes() <= puppet.arena.capacity()
        }) {
            let thread = thread(&mut puppet.threads, *tid)?;
            puppet.arena.start(thread, program, used)?;
            started.push((tid, program, used));
            used += program.arena_bytes().next_multiple_of(PLACE);
        }
        for (tid, program, offset) in started {
            let thread = thread(&mut puppet.threads, *tid)?;
            puppet.arena.finish(thread, program, offset)?;
        }
    }
    Ok(())
}

fn thread(threads: &mut BTreeMap<u32, Stopped>, tid: u32) -> Result<&mut Stopped, ExecuteError> {
    let thread = threads.get_mut(&tid);
    thread
        .ok_or(rustix::io::Errno::SRCH)
        .during("Finding thread", || tid.to_string())
}
