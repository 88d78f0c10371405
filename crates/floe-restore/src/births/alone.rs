//! A child that is born by itself: its parent may not choose all of its numbers, or it is born in a user namespace
//! that its parent does not enter, at least not yet.
//!
//! Into the latter goes a midwife: a child of the parent, which has the child there as its sibling, and ends.

use std::os::fd::{AsFd, AsRawFd};

use floe_inject::{Arena, Arg, Program, Seized, Stopped};
use floe_kernel::ids::HostPid;
use floe_kernel::proc::ProcDir;
use floe_resources::namespace::user_births::Arrival;
use floe_resources::restore::{Attempt, ExecuteError, Puppet, World};
use rustix::io::Errno;

use super::choice::{Choice, TRIES};
use super::doors::Doors;
use super::{Child, Litter, clone_program, keep_child};
use crate::tree::Place;

/// How such a child is born.
#[derive(Debug)]
pub struct Alone {
    pub choice: Choice,
    /// How a midwife comes where it is born.
    pub arrival: Option<Arrival>,
}

/// Has the child born, again and again until it has its numbers.
pub(super) fn fork(
    world: &mut World<'_>,
    (litter, child): (&Litter, &Child),
    alone: &Alone,
) -> Result<(), ExecuteError> {
    let parent = litter.parent;
    for _ in 0..TRIES {
        let leader = match &alone.arrival {
            None => by_parent(world, (litter, child), alone)?,
            Some(arrival) => by_midwife(world, (litter, child), (alone, arrival))?,
        };
        let proc = open(leader.pid())?;
        let arena = world.puppet(parent)?.arena.clone();
        if alone.choice.is_met(&proc, "status")? {
            let puppet = Puppet {
                arena,
                leader,
                threads: Default::default(),
            };
            return keep_child(world, child, puppet);
        }
        arena.end_task(leader, 0, 0)?;
        reap(world, parent)?;
    }
    Err(Errno::EXIST).during("Making", || {
        format!("task {}: its number is taken", child.pid)
    })
}

fn flags(litter: &Litter, child: &Child) -> u64 {
    match child.place {
        Place::New(_) => litter.flags | libc::CLONE_NEWPID as u64,
        _ => litter.flags,
    }
}

fn by_parent(
    world: &mut World<'_>,
    (litter, child): (&Litter, &Child),
    alone: &Alone,
) -> Result<Stopped, ExecuteError> {
    let mut program = Program::new();
    let mut doors = Doors::default();
    doors.open(world, litter.parent, child.place)?;
    doors.go(&mut program, child.place);
    let label = format!("clone3 of task {}", child.pid);
    let who = (&alone.choice.chosen[..], libc::SIGCHLD);
    clone_program(&mut program, label, flags(litter, child), who);
    doors.leave(&mut program);
    alone.choice.prepare(world)?;
    world.run(litter.parent, &program)?;
    newborn(world, litter.parent, None)
}

fn by_midwife(
    world: &mut World<'_>,
    (litter, child): (&Litter, &Child),
    (alone, arrival): (&Alone, &Arrival),
) -> Result<Stopped, ExecuteError> {
    let parent = litter.parent;
    let there = world.namespaces().get(arrival.user())?;
    let there = world.hand_over(parent, there.as_fd().as_raw_fd())?;
    let mut program = Program::new();
    let label = format!("clone3 of a midwife for task {}", child.pid);
    clone_program(&mut program, label, 0, (&[], libc::SIGCHLD));
    program.call("close", libc::SYS_close, &[Arg::from(there)]);
    world.run(parent, &program)?;
    let mut midwife = newborn(world, parent, None)?;
    let arena: Arena = world.puppet(parent)?.arena.clone();
    let mut program = Program::new();
    let planned = arrival.plan(there, &mut program);
    planned.map_err(ExecuteError::from_plan)?;
    program.call("close", libc::SYS_close, &[Arg::from(there)]);
    let label = format!("clone3 of task {}", child.pid);
    let flags = flags(litter, child) | libc::CLONE_PARENT as u64;
    // The kernel takes the signal of its end from the midwife.
    clone_program(&mut program, label, flags, (&alone.choice.chosen, 0));
    alone.choice.prepare(world)?;
    arena.run(&mut midwife, &program)?;
    let born = newborn(world, parent, Some(midwife.pid()))?;
    arena.end_task(midwife, 0, 0)?;
    reap(world, parent)?;
    Ok(born)
}

/// The child of a task that nobody knows yet.
fn newborn(
    world: &mut World<'_>,
    parent: u32,
    other: Option<HostPid>,
) -> Result<Stopped, ExecuteError> {
    let parent = world.puppet(parent)?.pid();
    let what = || format!("the children of {parent}");
    let children = open(parent)?.children(parent);
    let children = children
        .map_err(std::io::Error::other)
        .during("Listing", what)?;
    let is_known = |child: &HostPid| {
        let mut known = world.puppets.values().map(Puppet::pid).chain(other);
        known.any(|known| known == *child)
    };
    // The newest is the last.
    let child = children.into_iter().rev().find(|child| !is_known(child));
    let child = child
        .ok_or(Errno::SRCH)
        .during("Finding a new one among", what)?;
    Ok(Seized::born(child).wait_stopped()?)
}

/// Has a task reap the one child that has ended.
fn reap(world: &mut World<'_>, parent: u32) -> Result<(), ExecuteError> {
    let mut program = Program::new();
    let args = [
        Arg::from(-1),
        Arg::from(0),
        Arg::from(libc::__WALL),
        Arg::from(0),
    ];
    program.call("wait4 for a midwife", libc::SYS_wait4, &args);
    world.run(parent, &program).map(drop)
}

fn open(pid: HostPid) -> Result<ProcDir, ExecuteError> {
    ProcDir::open(pid)
        .map_err(std::io::Error::other)
        .during("Opening", || format!("/proc/{pid}"))
}
