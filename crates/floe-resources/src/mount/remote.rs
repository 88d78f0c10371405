//! File systems that show the namespaces of the task that mounts them.

use std::os::fd::{AsFd, OwnedFd};

use floe_inject::{Arg, Program};
use floe_kernel::ids::TaskFd;
use floe_kernel::mount::{mount_of_context, mount_of_created};

use super::formats;
use super::new_fs::{describe, new_fs_options};
use super::tree::NewFs;
use crate::restore::{ExecuteError, World};

/// `FSOPEN_CLOEXEC`.
const CLOEXEC: i32 = 1;
/// `FSCONFIG_CMD_CREATE`.
const CREATE: i32 = 6;

/// Has a task begin a mount, so that it shows the task's namespaces, and ends it here: in a user namespace
/// the task may do so only where the same is mounted already.
pub fn mount_in_task(world: &mut World<'_>, pid: u32, fs: &NewFs) -> Result<OwnedFd, ExecuteError> {
    let mut program = Program::new();
    let name: Vec<u8> = fs.name.bytes().chain([0]).collect();
    let name = program.buffer(&name);
    let args = [Arg::from(name), Arg::from(CLOEXEC)];
    let begun = program.call(format!("fsopen of {}", fs.name), libc::SYS_fsopen, &args);
    let in_task = fs.name == formats::NAME;
    if in_task {
        // The kernel wants whoever makes it to be in the user namespace that it is for.
        let args = [Arg::from(begun), Arg::from(CREATE)];
        let args = [&args[..], &[Arg::from(0), Arg::from(0), Arg::from(0)]].concat();
        program.call("fsconfig", libc::SYS_fsconfig, &args);
    }
    let outcome = world.run(pid, &program)?.expect("the program has calls");
    let number = outcome.result(begun) as i32;
    let context = world.fetch(pid, TaskFd(number))?;
    let mut program = Program::new();
    program.call("close", libc::SYS_close, &[Arg::from(number)]);
    world.run(pid, &program)?;
    let made = match in_task {
        true => mount_of_created(context.as_fd()),
        false => mount_of_context(context.as_fd(), &new_fs_options(fs)),
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
