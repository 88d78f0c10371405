//! Giving a puppet its label.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use floe_inject::{Arg, Program};
use floe_kernel::security::SecurityModule;

use super::{Label, Labels};
use crate::restore::{Attempt, ExecuteError, World};

/// Where tasks have our `/proc`: they may have another, or none.
#[derive(Debug, Default)]
struct OurProc(BTreeMap<u32, RawFd>);

/// Gives a task a descriptor of our `/proc`, while it may still take one.
pub fn hand_over_proc(world: &mut World<'_>, pid: u32) -> Result<(), ExecuteError> {
    if world.state::<OurProc>().0.contains_key(&pid) {
        return Ok(());
    }
    let proc = File::open("/proc").during("Opening", || "/proc".to_string())?;
    let number = world.hand_over(pid, proc.as_raw_fd())?;
    world.state::<OurProc>().0.insert(pid, number);
    Ok(())
}

/// Where a task has it.
pub fn our_proc(world: &mut World<'_>, pid: u32) -> RawFd {
    world.state::<OurProc>().0.get(&pid).copied().unwrap_or(-1)
}

/// What a thread writes to become `wanted`; it has `born` now. Empty where that is right.
pub fn program(
    (labels, wanted, born): (&Labels, &Label, Option<&str>),
    (proc, world_tid): (RawFd, u32),
) -> Program {
    let mut program = Program::new();
    let mut write = |name: &str, label: &str| {
        let (directory, text) = (labels.here.directory(), in_words(labels.here, name, label));
        let path = program.buffer(format!("thread-self/{directory}/{name}\0").as_bytes());
        let bytes = program.buffer(text.as_bytes());
        let about = format!(
            "{} label {label} of thread {world_tid} ({name})",
            labels.here.name()
        );
        let args = [Arg::from(proc), path.into(), Arg::from(libc::O_WRONLY)];
        let file = program.call(format!("open for the {about}"), libc::SYS_openat, &args);
        let args = [file.into(), bytes.into(), text.len().into()];
        program.call(format!("write of the {about}"), libc::SYS_write, &args);
        program.call("close", libc::SYS_close, &[file.into()]);
    };
    // What a context allows is judged by the one that the thread has, so the current one comes last.
    let others = [
        ("sockcreate", &wanted.sockcreate),
        ("exec", &wanted.exec),
        ("fscreate", &wanted.fscreate),
        ("keycreate", &wanted.keycreate),
    ];
    for (name, label) in others {
        if let Some(label) = label {
            write(name, label);
        }
    }
    if let Some(label) = labels.change(wanted, born) {
        write("current", &label);
    }
    program
}

/// What the module wants to read.
fn in_words(module: SecurityModule, name: &str, label: &str) -> String {
    match (module, name) {
        (SecurityModule::AppArmor, "current") => format!("changeprofile {label}"),
        _ => label.to_string(),
    }
}
