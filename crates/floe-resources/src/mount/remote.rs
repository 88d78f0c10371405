//! File systems that show the namespaces of the task that mounts them.

use std::os::fd::{AsFd, OwnedFd};

use floe_inject::{Arg, Program};
use floe_kernel::ids::TaskFd;
use floe_kernel::mount::mount_of_context;

use super::execute::{describe, new_fs_options};
use super::tree::NewFs;
use crate::restore::{ExecuteError, World};

/// `FSOPEN_CLOEXEC`.
const CLOEXEC: i32 = 1;

/// Has a task begin a mount, so that it shows the task's namespaces, and ends it here: in a user namespace
/// the task may do so only where the same is mounted already.
pub fn mount_in_task(world: &mut World<'_>, pid: u32, fs: &NewFs) -> Result<OwnedFd, ExecuteError> {
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
    mount_of_context(context.as_fd(), &new_fs_options(fs)).map_err(|error| {
        let (action, source) = describe(error);
        ExecuteError::Failed {
            action: "Mounting",
            object: format!("{} for {}: {action}", fs.name, fs.entry.mountpoint),
            source,
        }
    })
}
