//! Descriptors, directories and umask of every task.

use std::collections::BTreeSet;

use floe_image::messages::FdinfoEntry;
use floe_inject::{Arg, Program};
use floe_plan::Handle;
use floe_resources::mount;
use floe_resources::restore::{ExecuteError, PlanError, Planner, World};

use crate::tree::is_zombie;

/// `fdinfo_entry.flags`: close-on-exec.
const CLOSE_ON_EXEC: u32 = 1;
/// Descriptors moved by one program; the arena has room for some more.
const MOVES_AT_ONCE: usize = 8000;
/// Moves beside which there is room for closing, which takes a call for each at most.
const CLOSES_BESIDE: usize = 4000;

/// Adds the steps that give each task its directories, then its descriptors.
pub fn plan(planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let images = planner.images;
    let mut tables = BTreeSet::new();
    for task in images
        .tasks
        .iter()
        .filter(|task| !is_zombie(images, task.pid()))
    {
        plan_directories(planner, task.pid())?;
        let pid = task.pid();
        let mut needs = vec![
            Handle::Tree,
            Handle::Memory(pid),
            Handle::Object("directories", u64::from(pid)),
        ];
        if !tables.insert(task.files_id()) {
            planner.task_step(
                pid,
                "share a table of descriptors",
                (&needs, &[Handle::Descriptors(pid)]),
                |_| Ok(()),
            );
            continue;
        }
        // Tasks that share the table still need the inherited descriptors for memory and directories.
        for sharer in images
            .tasks
            .iter()
            .filter(|other| other.files_id() == task.files_id() && !is_zombie(images, other.pid()))
        {
            needs.extend([
                Handle::Memory(sharer.pid()),
                Handle::Object("directories", u64::from(sharer.pid())),
            ]);
        }
        let files: BTreeSet<u32> = task.fds.iter().map(|fd| fd.id).collect();
        needs.extend(files.into_iter().map(Handle::File));
        let fds = &task.fds;
        let name = format!("install {} descriptors", fds.len());
        planner.task_step(
            pid,
            name,
            (&needs, &[Handle::Descriptors(pid)]),
            move |world| install(world, pid, fds),
        );
    }
    Ok(())
}

fn install(world: &mut World<'_>, pid: u32, fds: &[FdinfoEntry]) -> Result<(), ExecuteError> {
    let mut moves = Vec::with_capacity(fds.len());
    for fd in fds {
        moves.push((world.number_in_task(pid, fd.id)?, fd));
    }
    let kept = world.kept_in_tasks().map(i32::cast_unsigned);
    let mut program = Program::new();
    for some in moves.chunks(MOVES_AT_ONCE) {
        if !program.is_empty() {
            world.run(pid, &std::mem::take(&mut program))?;
        }
        for (source, fd) in some {
            let flags = if fd.flags & CLOSE_ON_EXEC != 0 {
                libc::O_CLOEXEC
            } else {
                0
            };
            program.call(
                "dup3 to a final descriptor",
                libc::SYS_dup3,
                &[Arg::from(*source), Arg::from(fd.fd), Arg::from(flags)],
            );
        }
    }
    // Each program is a stop of the task: one does both where there is room.
    if program.len() > CLOSES_BESIDE {
        world.run(pid, &std::mem::take(&mut program))?;
    }
    close_all_others(&mut program, fds, kept);
    world.defer(pid, program)
}

/// Closes every descriptor that the task did not have, but one that is `kept` for later.
fn close_all_others(program: &mut Program, fds: &[FdinfoEntry], kept: Option<u32>) {
    let mut numbers: Vec<u32> = fds.iter().map(|fd| fd.fd).chain(kept).collect();
    numbers.sort_unstable();
    let mut first_free = 0;
    for number in numbers {
        if number > first_free {
            close_range(program, first_free, number - 1);
        }
        first_free = number + 1;
    }
    close_range(program, first_free, u32::MAX);
}

fn close_range(program: &mut Program, first: u32, last: u32) {
    program.call(
        "close_range",
        libc::SYS_close_range,
        &[Arg::from(first), Arg::from(last), Arg::from(0)],
    );
}

fn plan_directories(planner: &mut Planner<'_>, pid: u32) -> Result<(), PlanError> {
    let Some(fs) = planner.images.task(pid).and_then(|task| task.fs.as_ref()) else {
        return Err(PlanError::damaged(format!("fs-{pid}.img"), "it is missing"));
    };
    let (cwd, root, umask) = (fs.cwd_id, fs.root_id, fs.umask);
    let root_is_ours = planner
        .images
        .files
        .get(&root)
        .and_then(|file| file.reg.as_ref())
        .is_some_and(|file| file.name == "/");
    // After other settings of the same task, so that one program does both.
    let early = Handle::Object("early", u64::from(pid));
    let mut needs = vec![Handle::Files, Handle::File(cwd), Handle::File(root), early];
    needs.extend(mount::entered(planner.images, pid));
    let makes = [Handle::Object("directories", u64::from(pid))];
    planner.task_step(
        pid,
        "chdir, chroot, umask",
        (&needs, &makes),
        move |world| {
            let mut program = Program::new();
            let cwd = world.number_in_task(pid, cwd)?;
            if !root_is_ours {
                let root = world.number_in_task(pid, root)?;
                let here = program.buffer(b".\0");
                program.call("fchdir to the root", libc::SYS_fchdir, &[Arg::from(root)]);
                program.call("chroot", libc::SYS_chroot, &[Arg::from(here)]);
            }
            program.call("fchdir", libc::SYS_fchdir, &[Arg::from(cwd)]);
            if let Some(umask) = umask {
                program.call("umask", libc::SYS_umask, &[Arg::from(umask)]);
            }
            world.defer(pid, program)
        },
    );
    Ok(())
}
