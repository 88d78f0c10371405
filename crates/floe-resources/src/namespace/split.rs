//! Namespaces that tasks below the root have of their own.
//!
//! All of them are made and filled with those of the root; a task enters its own when the whole tree is born,
//! so that it does not matter where its children are. Those of mounts are entered with their mounts
//! ([`crate::mount`]).

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd};

use floe_inject::{Arg, Program};
use floe_kernel::namespace::{Namespace, NsKind};
use floe_kernel::placeholder::Placeholder;
use floe_plan::Handle;

use super::{READY, filled, ids, made, uts};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, TaskImages, TreeImages, World};
use crate::{cgroup, ipc, net};

/// Kinds in which a task may differ from the root, but for mounts.
pub(super) const SPLIT: [NsKind; 4] = [NsKind::Net, NsKind::Ipc, NsKind::Uts, NsKind::Cgroup];

/// The numbers of a task's namespaces that are not the root's.
pub(super) fn split_of(images: &TreeImages, task: &TaskImages) -> Vec<(NsKind, u32)> {
    let of = |task: &TaskImages, kind| ids::get(task.ids.as_ref()?, kind);
    let split = SPLIT.into_iter().filter_map(|kind| {
        let number = of(task, kind)?;
        (Some(number) != of(images.root(), kind)).then_some((kind, number))
    });
    split.collect()
}

/// The task is in its own namespaces; `None` for one that stays in the root's.
pub fn entered(images: &TreeImages, pid: u32) -> Option<Handle> {
    let task = images.task(pid)?;
    let stays = split_of(images, task).is_empty();
    (!stays).then_some(Handle::Object("namespaces of task", u64::from(pid)))
}

/// Adds the steps that make such namespaces, fill them, and take tasks there. Handles of what has to be there
/// before files are opened.
pub(super) fn plan_split(planner: &mut Planner<'_>) -> Result<Vec<Handle>, PlanError> {
    let images = planner.images;
    let tasks = images.tasks.iter();
    let split: Vec<(u32, Vec<(NsKind, u32)>)> = tasks
        .map(|task| (task.pid(), split_of(images, task)))
        .filter(|(_, split)| !split.is_empty())
        .collect();
    let host = images.inventory.root_ids.as_ref();
    for (pid, namespaces) in &split {
        let of_host = |(kind, number): &&(NsKind, u32)| {
            host.and_then(|host| ids::get(host, *kind)) == Some(*number)
        };
        if let Some((kind, _)) = namespaces.iter().find(of_host) {
            return Err(PlanError::Unsupported {
                object: format!("The {kind} namespace of task {pid}"),
                remedy: "only the whole tree may be in that of its caller",
            });
        }
    }
    let all: BTreeSet<(NsKind, u32)> = split.iter().flat_map(|(_, split)| split.clone()).collect();
    for (kind, number) in &all {
        let (kind, number) = (*kind, *number);
        if kind == NsKind::Cgroup {
            cgroup::plan_namespace(number, planner)?;
            continue;
        }
        let name = format!("make {kind} namespace {number}");
        let needs: Vec<Handle> = images
            .users
            .owner_of(number)
            .map(made)
            .into_iter()
            .collect();
        planner.step_at_home(name, (&needs, &[made(number)]), move |world| {
            make_beside(world, kind, number)
        });
        match kind {
            NsKind::Net => net::plan(number, planner)?,
            NsKind::Ipc => ipc::plan(number, planner)?,
            _ => uts::plan(number, planner)?,
        }
    }
    for (pid, namespaces) in split {
        let handle = entered(images, pid).expect("it is one of them");
        let mut needs = vec![Handle::Tree, READY];
        needs.extend(namespaces.iter().map(|(_, number)| filled(*number)));
        let name = format!("enter {} namespaces of its own", namespaces.len());
        planner.task_step(pid, name, (&needs, &[handle]), move |world| {
            let mut all = namespaces.iter();
            all.try_for_each(|(kind, number)| enter(world, pid, (*kind, *number)))
        });
    }
    Ok(all.into_iter().map(|(_, number)| filled(number)).collect())
}

/// Makes a namespace that is not the root's.
pub(crate) fn make_beside(
    world: &mut World<'_>,
    kind: NsKind,
    number: u32,
) -> Result<(), ExecuteError> {
    let what = || format!("{kind} namespace {number}");
    let owner = world.images.users.owner_of(number);
    let namespace = match owner {
        Some(user) => {
            let user = world.namespaces().get(user)?;
            let maker = Placeholder::start_inside(&user, &[kind]).during("Making", what)?;
            Namespace::of_task(maker.pid(), kind)
        }
        None => {
            let home = world.namespaces().home()?;
            let _visit = home.visit_new(&[kind]).during("Making", what)?;
            Namespace::own(kind)
        }
    };
    let namespace = namespace.during("Opening the new", what)?;
    let files = owner.and_then(|user| world.images.users.files_of(user));
    let files = files.filter(|_| kind == NsKind::Mnt);
    let namespaces = world.namespaces();
    namespaces.keep(number, namespace.with_files_of(files));
    Ok(())
}

fn enter(
    world: &mut World<'_>,
    pid: u32,
    (kind, number): (NsKind, u32),
) -> Result<(), ExecuteError> {
    let namespace = world.namespaces().get(number)?;
    let there = world.hand_over(pid, namespace.as_fd().as_raw_fd())?;
    let mut program = Program::new();
    let args = [Arg::from(there), Arg::from(kind.flag())];
    let label = format!("setns to {kind} namespace {number}");
    program.call(label, libc::SYS_setns, &args);
    program.call("close", libc::SYS_close, &[Arg::from(there)]);
    world.run(pid, &program).map(drop)
}
