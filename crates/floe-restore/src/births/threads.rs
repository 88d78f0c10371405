//! The threads of tasks that exist already.

use std::collections::{BTreeMap, BTreeSet};

use floe_inject::{Program, Seized, Stopped};
use floe_kernel::ids::HostPid;
use floe_kernel::proc::ProcDir;
use floe_plan::Handle;
use floe_resources::namespace::user_births;
use floe_resources::restore::{Attempt, ExecuteError, Planner, World};

use super::choice::{Choice, TRIES};
use super::clone_program;
use crate::kin::known_children;
use crate::labels::TreeLabels;
use crate::tree::is_zombie;

/// Adds the steps that make the threads of every task.
pub fn plan_threads(planner: &mut Planner<'_>, labels: &TreeLabels) {
    let images = planner.images;
    for task in images
        .tasks
        .iter()
        .filter(|task| !is_zombie(images, task.pid()))
    {
        let pid = task.pid();
        let tids: Vec<u32> = task.threads.keys().copied().collect();
        let mut needs = vec![Handle::Memory(pid), Handle::Descriptors(pid)];
        if !tids.is_empty() {
            needs.push(crate::state::shared(pid));
            needs.extend(labels.before_threads(pid));
        }
        // Threads are where the task is when they are made.
        needs.extend(floe_resources::namespace::entered(images, pid));
        needs.extend(user_births::entered(images, pid));
        let name = format!("make {} threads", tids.len());
        planner.task_step(pid, name, (&needs, &[Handle::Threads(pid)]), move |world| {
            make_threads(world, pid, &tids)
        });
    }
}

/// Threads made by one program; the arena has room for some thousands.
const THREADS_AT_ONCE: usize = 2000;

fn make_threads(world: &mut World<'_>, pid: u32, tids: &[u32]) -> Result<(), ExecuteError> {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    if tids.is_empty() {
        return Ok(());
    }
    let images = world.images;
    let user = images.users.of_task(pid);
    let place = images.nested.namespace_of(pid);
    let choice = |tid: u32| Choice::new(images, user, (&images.nested.numbers(tid), place));
    if !choice(pid).is_free() {
        return tids
            .iter()
            .try_for_each(|tid| make_thread(world, pid, (*tid, &choice(*tid)), flags as u64));
    }
    let own_pids = known_children(world)?;
    let puppet = world.puppet(pid)?;
    for some in tids.chunks(THREADS_AT_ONCE) {
        let mut program = Program::new();
        let calls: Vec<_> = some
            .iter()
            .map(|tid| {
                clone_program(
                    &mut program,
                    format!("clone3 of thread {tid}"),
                    flags as u64,
                    (&images.nested.numbers(*tid), 0),
                )
                .0
            })
            .collect();
        let outcome = puppet.run(&program)?.expect("chunks are not empty");
        let hosts = match &own_pids {
            Some(known) => known.threads_by_number(puppet.pid())?,
            None => BTreeMap::new(),
        };
        for (tid, call) in some.iter().zip(calls) {
            let number = match images.nested.is_empty() {
                true => outcome.result(call) as i32,
                false => tid.cast_signed(),
            };
            let host = hosts.get(tid).copied().unwrap_or(HostPid(number));
            let thread = Seized::born(host).wait_stopped()?;
            puppet.threads.insert(*tid, thread);
        }
    }
    Ok(())
}

/// Makes a thread whose numbers its process may not choose.
fn make_thread(
    world: &mut World<'_>,
    pid: u32,
    (tid, choice): (u32, &Choice),
    flags: u64,
) -> Result<(), ExecuteError> {
    for _ in 0..TRIES {
        let mut program = Program::new();
        let label = format!("clone3 of thread {tid}");
        clone_program(&mut program, label, flags, (&choice.chosen, 0));
        let process = world.puppet(pid)?.pid();
        let proc = ProcDir::open(process)
            .map_err(std::io::Error::other)
            .during("Opening", || format!("/proc/{process}"))?;
        choice.prepare(world)?;
        world.run(pid, &program)?;
        let puppet = world.puppet(pid)?;
        let known: BTreeSet<HostPid> = puppet.threads.values().map(Stopped::pid).collect();
        let threads = proc.threads().map_err(std::io::Error::other);
        let threads = threads.during("Listing", || format!("the threads of {process}"))?;
        let is_new = |thread: &HostPid| *thread != process && !known.contains(thread);
        let made = threads.into_iter().find(is_new);
        let host = made
            .ok_or(rustix::io::Errno::SRCH)
            .during("Finding", || format!("thread {tid}"))?;
        let thread = Seized::born(host).wait_stopped()?;
        if choice.is_met(&proc, &format!("task/{host}/status"))? {
            puppet.threads.insert(tid, thread);
            return Ok(());
        }
        puppet.arena.end_thread(thread)?;
    }
    Err(rustix::io::Errno::EXIST).during("Making", || format!("thread {tid}: its number is taken"))
}
