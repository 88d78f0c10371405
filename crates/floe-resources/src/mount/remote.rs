//! File systems that show the namespaces of the task that mounts them.

use std::os::fd::OwnedFd;

use floe_inject::{Arg, Program};
use floe_kernel::ids::TaskFd;
use floe_kernel::mount::FsOption;

use super::execute::new_fs_options;
use super::tree::NewFs;
use crate::restore::{ExecuteError, World};

/// `fsconfig(2)`.
const FSCONFIG_SET_FLAG: i32 = 0;
const FSCONFIG_SET_STRING: i32 = 1;
const FSCONFIG_CMD_CREATE: i32 = 6;
/// `FSOPEN_CLOEXEC` and `FSMOUNT_CLOEXEC`.
const CLOEXEC: i32 = 1;

/// Has a task mount a file system, and takes the mount over.
pub fn mount_in_task(world: &mut World<'_>, pid: u32, fs: &NewFs) -> Result<OwnedFd, ExecuteError> {
    let mut program = Program::new();
    let text = |program: &mut Program, text: &str| {
        let bytes: Vec<u8> = text.bytes().chain([0]).collect();
        Arg::from(program.buffer(&bytes))
    };
    let name = text(&mut program, &fs.name);
    let label = format!("fsopen of {}", fs.name);
    let context = program.call(label, libc::SYS_fsopen, &[name, Arg::from(CLOEXEC)]);
    for option in new_fs_options(fs) {
        let (command, key, value) = match &option {
            FsOption::Flag(key) => (FSCONFIG_SET_FLAG, key, None),
            FsOption::Text(key, value) => (FSCONFIG_SET_STRING, key, Some(value)),
        };
        let label = format!("fsconfig of {} with {option:?}", fs.name);
        let key = text(&mut program, key);
        let value = value.map_or(Arg::from(0), |value| text(&mut program, value));
        let args = [
            Arg::from(context),
            Arg::from(command),
            key,
            value,
            Arg::from(0),
        ];
        program.call(label, libc::SYS_fsconfig, &args);
    }
    let args = [
        Arg::from(context),
        Arg::from(FSCONFIG_CMD_CREATE),
        Arg::from(0),
        Arg::from(0),
        Arg::from(0),
    ];
    program.call(format!("mount of {}", fs.name), libc::SYS_fsconfig, &args);
    let args = [Arg::from(context), Arg::from(CLOEXEC), Arg::from(0)];
    let mount = program.call(format!("fsmount of {}", fs.name), libc::SYS_fsmount, &args);
    program.call("close", libc::SYS_close, &[Arg::from(context)]);
    let outcome = world.run(pid, &program)?.expect("the program has calls");
    let number = outcome.result(mount) as i32;
    let fetched = world.fetch(pid, TaskFd(number))?;
    let mut program = Program::new();
    program.call("close", libc::SYS_close, &[Arg::from(number)]);
    world.run(pid, &program)?;
    Ok(fetched)
}
