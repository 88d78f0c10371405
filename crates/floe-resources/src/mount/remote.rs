//! File systems that show the namespaces of the task that mounts them.

use std::os::fd::{AsFd, OwnedFd};

use floe_inject::{Arg, Program};
use floe_kernel::ids::TaskFd;
use floe_kernel::mount::{begin_among, begin_inside, mount_of_context, mount_of_created};
use floe_kernel::namespace::{Namespace, NsKind};
use rustix::io::Errno;

use super::formats;
use super::new_fs::{describe, new_fs_options};
use super::tree::NewFs;
use crate::restore::{Attempt, ExecuteError, World};

/// `FSOPEN_CLOEXEC`.
const CLOEXEC: i32 = 1;
/// The name of the file system that shows processes.
const PROC: &str = "proc";

/// Begins a mount as a task would, so that it shows the task's namespaces, and ends it here: in a user namespace
/// the task may do so only where the same is mounted already.
pub fn mount_in_task(world: &mut World<'_>, pid: u32, fs: &NewFs) -> Result<OwnedFd, ExecuteError> {
    let what = || fs.name.clone();
    let made = match fs.name.as_str() {
        PROC => {
            let pids = Namespace::of_task(world.puppet(pid)?.pid(), NsKind::Pid);
            let pids = pids.during("Finding the pid namespace for", what)?;
            let context = begin_among(&pids, c"proc").during("Beginning", what)?;
            mount_of_context(context.as_fd(), &new_fs_options(fs))
        }
        formats::NAME => {
            let user = world.images.users.of_task(pid);
            let user = user.ok_or(Errno::NOENT).during("Finding users for", what)?;
            let user = world.namespaces().get(user)?;
            // The kernel wants whoever makes it to be in the user namespace that it is for.
            let context = begin_inside(&user, c"binfmt_misc", true).during("Making", what)?;
            mount_of_created(context.as_fd())
        }
        _ => {
            let context = begin_in_task(world, pid, fs)?;
            mount_of_context(context.as_fd(), &new_fs_options(fs))
        }
    };
    made.map_err(|error| {
        let (action, source) = describe(error);
        ExecuteError::Failed {
            action: "Mounting",
            object: format!("{} for {}: {action}", fs.name, fs.entry.mountpoint),
            source,
        }
    })
}

fn begin_in_task(world: &mut World<'_>, pid: u32, fs: &NewFs) -> Result<OwnedFd, ExecuteError> {
    let mut program = Program::new();
    let name: Vec<u8> = fs.name.bytes().chain([0]).collect();
    let name = program.buffer(&name);
    let args = [Arg::from(name), Arg::from(CLOEXEC)];
    let begun = program.call(format!("fsopen of {}", fs.name), libc::SYS_fsopen, &args);
    let outcome = world.run(pid, &program)?.expect("the program has calls");
    let number = outcome.result(begun) as i32;
    let context = world.fetch(pid, TaskFd(number))?;
    let mut program = Program::new();
    program.call("close", libc::SYS_close, &[Arg::from(number)]);
    world.run(pid, &program)?;
    Ok(context)
}
