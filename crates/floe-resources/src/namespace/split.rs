//! Network namespaces that tasks below the root have of their own.
//!
//! All of them are made and filled with those of the root; a task enters its own when the whole tree is born,
//! so that it does not matter where its children are.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd};

use floe_inject::{Arg, Program};
use floe_kernel::namespace::{Namespace, NsKind};
use floe_plan::Handle;

use super::{READY, filled, ids, made, own_of_root};
use crate::net;
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, TaskImages, TreeImages, World};

/// The number of a task's network namespace, where it is not the root's.
pub(super) fn split_network(images: &TreeImages, task: &TaskImages) -> Option<u32> {
    let of = |task: &TaskImages| ids::get(task.ids.as_ref()?, NsKind::Net);
    of(task).filter(|number| Some(*number) != of(images.root()))
}

/// The task is in its own network namespace; `None` for one that stays in the root's.
pub fn entered(images: &TreeImages, pid: u32) -> Option<Handle> {
    let task = images.task(pid)?;
    split_network(images, task).map(|_| Handle::Object("network of task", u64::from(pid)))
}

/// Adds the steps that make such namespaces, fill them, and take tasks there. Handles of what has to be there
/// before files are opened.
pub(super) fn plan_split(planner: &mut Planner<'_>) -> Result<Vec<Handle>, PlanError> {
    let images = planner.images;
    let tasks = images.tasks.iter();
    let split = tasks.filter_map(|task| Some((task.pid(), split_network(images, task)?)));
    let split: Vec<(u32, u32)> = split.collect();
    let numbers: BTreeSet<u32> = split.iter().map(|(_, number)| *number).collect();
    let host = images.inventory.root_ids.as_ref();
    let host = host.and_then(|host| ids::get(host, NsKind::Net));
    let own_users = own_of_root(images, NsKind::User).is_some();
    for (pid, number) in &split {
        if own_users || Some(*number) == host {
            return Err(PlanError::Unsupported {
                object: format!("The network namespace of task {pid}"),
                remedy: "only the whole tree may be in another one than its caller, or in a user namespace",
            });
        }
    }
    for number in &numbers {
        let number = *number;
        let name = format!("make network namespace {number}");
        planner.step_at_home(name, (&[], &[made(number)]), move |world| {
            make(world, number)
        });
        net::plan(number, planner)?;
    }
    for (pid, number) in split {
        let handle = entered(images, pid).expect("it is one of them");
        let needs = [Handle::Tree, READY, filled(number)];
        let name = format!("enter network namespace {number}");
        planner.task_step(pid, name, (&needs, &[handle]), move |world| {
            enter(world, pid, number)
        });
    }
    Ok(numbers.into_iter().map(filled).collect())
}

fn make(world: &mut World<'_>, number: u32) -> Result<(), ExecuteError> {
    let home = world.namespaces().home()?;
    let what = || number.to_string();
    let _visit = home
        .visit_new(&[NsKind::Net])
        .during("Making network namespace", what)?;
    let namespace = Namespace::own(NsKind::Net).during("Opening network namespace", what)?;
    world.namespaces().keep(number, namespace);
    Ok(())
}

fn enter(world: &mut World<'_>, pid: u32, number: u32) -> Result<(), ExecuteError> {
    let namespace = world.namespaces().get(number)?;
    let there = world.hand_over(pid, namespace.as_fd().as_raw_fd())?;
    let mut program = Program::new();
    let args = [Arg::from(there), Arg::from(libc::CLONE_NEWNET)];
    program.call("setns to its network namespace", libc::SYS_setns, &args);
    program.call("close", libc::SYS_close, &[Arg::from(there)]);
    world.run(pid, &program)?;
    Ok(())
}
