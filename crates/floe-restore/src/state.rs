//! Steps that give tasks and threads the state that is theirs alone.

use std::rc::Rc;

use floe_image::ImageKind;
use floe_image::messages::{CoreEntry, SeccompEntry, SeccompFilter};
use floe_inject::Program;
use floe_kernel::features::KernelFeatures;
use floe_plan::Handle;
use floe_resources::restore::{Attempt, ExecuteError, PlanError, Planner, TaskImages, World};
use floe_resources::task::rebuild::{self, Birth, TaskContext};

use crate::tree::is_zombie;

/// What all threads of a tree are rebuilt from, beside their own images.
pub struct Background<'i> {
    /// What puppets are born with.
    pub birth: Birth,
    seccomp: Vec<SeccompFilter>,
    features: &'i KernelFeatures,
}

impl<'i> Background<'i> {
    /// Reads what this process hands down and what the images keep for all tasks at once.
    pub fn new(planner: &Planner<'i>) -> Result<Self, PlanError> {
        let birth = Birth::of_this_thread()
            .map_err(|error| PlanError::damaged("/proc/thread-self", error.to_string()))?;
        let seccomp: Option<SeccompEntry> =
            planner.images.dir.read_optional(ImageKind::Seccomp, 0)?;
        Ok(Background {
            birth,
            seccomp: seccomp.unwrap_or_default().seccomp_filters,
            features: planner.features,
        })
    }

    /// The context of one thread.
    pub fn of<'a>(&'a self, task: &'a TaskImages, tid: u32) -> TaskContext<'a> {
        TaskContext {
            tid,
            features: self.features,
            birth: &self.birth,
            mm: task.mm.as_ref(),
            seccomp: &self.seccomp,
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

/// Adds the steps that give every task and thread its state.
pub fn plan<'i>(
    planner: &mut Planner<'i>,
    background: &Rc<Background<'i>>,
) -> Result<(), PlanError> {
    let images = planner.images;
    let tasks: Vec<&'i TaskImages> = images
        .tasks
        .iter()
        .filter(|task| !is_zombie(images, task.pid()))
        .collect();
    for task in &tasks {
        let pid = task.pid();
        let early = rebuild::plan_task(&task.core, &background.of(task, pid))?;
        planner.task_step(
            pid,
            "settings before memory",
            (&[], &[Handle::Object("early", u64::from(pid))]),
            move |world| world.run(pid, &early).map(drop),
        );
        let mut programs = Programs::new();
        for (tid, core) in threads(task) {
            rebuild::registers::checked(core, &background.of(task, tid))?;
            programs.push((tid, rebuild::plan_thread(core, &background.of(task, tid))?));
        }
        let handle = Handle::Object("thread state", u64::from(pid));
        planner.task_step(
            pid,
            "state of threads",
            (&[Handle::Threads(pid)], &[handle]),
            move |world| run_all(world, pid, &programs),
        );
    }
    let everything = planner.made(|_| true);
    planner.step(
        "all is there but the last state",
        (&everything, &[Handle::Ready]),
        |_| Ok(()),
    );
    for task in tasks {
        let pid = task.pid();
        let mut programs = Programs::new();
        for (tid, core) in threads(task) {
            programs.push((tid, rebuild::plan_last(core, &background.of(task, tid))?));
        }
        planner.task_step(
            pid,
            "signals, timers, limits, credentials",
            (&[Handle::Ready], &[]),
            move |world| {
                if let Some(core) = &task.core.tc {
                    let host = world.puppet(pid)?.pid();
                    rebuild::attributes::write_proc(host, core)?;
                }
                run_all(world, pid, &programs)
            },
        );
    }
    Ok(())
}

fn run_all(world: &mut World<'_>, pid: u32, programs: &Programs) -> Result<(), ExecuteError> {
    let puppet = world.puppet(pid)?;
    for (tid, program) in programs.iter().filter(|(_, program)| !program.is_empty()) {
        if *tid == pid {
            puppet.run(program)?;
            continue;
        }
        let thread = puppet
            .threads
            .get_mut(tid)
            .ok_or(rustix::io::Errno::SRCH)
            .during("Finding thread", || tid.to_string())?;
        puppet.arena.run(thread, program)?;
    }
    Ok(())
}
