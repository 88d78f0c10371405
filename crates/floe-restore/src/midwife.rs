//! The birth of the root task, in a pid namespace of its own or not.
//!
//! A pid namespace belongs to the user namespace that its maker is in. The coordinator cannot enter a
//! user namespace and come back, so there a midwife does: a puppet that enters it, clones the root as a
//! child of its own parent, and ends.

use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;

use floe_inject::{Arena, Arg, Program, RootSpawn, Seized, Stopped, spawn_root};
use floe_kernel::ids::{HostPid, TaskFd};
use floe_kernel::namespace::{Namespace, NsKind, enter, own_proc_path};
use floe_kernel::pidfd::Pidfd;
use floe_kernel::proc::parse_fdinfo;
use floe_resources::namespace::user_births::Arrival;
use floe_resources::namespace::{has_own_pids, own_of_root};
use floe_resources::restore::{Attempt, ExecuteError, World};

use crate::births::{PIDFD_OFFSET, clone_program};

/// Clones the root from where the coordinator is; `spawn` says all but about namespaces.
/// It is born in the user namespace that it arrives in, where it does.
pub fn root(
    world: &mut World<'_>,
    spawn: RootSpawn,
    arrival: Option<&Arrival>,
) -> Result<(Arena, Stopped), ExecuteError> {
    let given = own_of_root(world.images, NsKind::Pid);
    let given = given.and_then(|id| world.namespaces().get(id).ok());
    let pids = match has_own_pids(world.images) && given.is_none() {
        true => libc::CLONE_NEWPID as u64,
        false => 0,
    };
    match arrival {
        None => {
            let spawn = RootSpawn {
                flags: spawn.flags | pids,
                ..spawn
            };
            among(given.as_deref(), || Ok(spawn_root(&spawn)?))
        }
        Some(arrival) => {
            let number = world.images.root().pid();
            let _unset = UnsetLogin::begin();
            let midwife = spawn_root(&RootSpawn {
                set_tid: Vec::new(),
                ..spawn
            })?;
            born_of(midwife, world, (number, pids, arrival, given))
        }
    }
}

/// Has children of the coordinator born in a pid namespace that was there before.
fn among<T>(
    pids: Option<&Namespace>,
    work: impl FnOnce() -> Result<T, ExecuteError>,
) -> Result<T, ExecuteError> {
    let Some(pids) = pids else {
        return work();
    };
    let what = || "a pid namespace for the tree".to_string();
    let home = Namespace::own(NsKind::Pid).during("Opening", || "our own pid namespace".into())?;
    enter(pids).during("Entering", what)?;
    let done = work();
    enter(&home).during("Coming home from", what)?;
    done
}

fn born_of(
    (arena, mut midwife): (Arena, Stopped),
    world: &mut World<'_>,
    (number, pids, arrival, given): (u32, u64, &Arrival, Option<Rc<Namespace>>),
) -> Result<(Arena, Stopped), ExecuteError> {
    let namespace = world.namespaces().get(arrival.user())?;
    let mut program = Program::new();
    if let Some(given) = &given {
        let args = [
            Arg::from(given.as_fd().as_raw_fd()),
            Arg::from(NsKind::Pid.flag()),
        ];
        program.call("setns to the pid namespace", libc::SYS_setns, &args);
    }
    arrival
        .plan(namespace.as_fd().as_raw_fd(), &mut program)
        .map_err(ExecuteError::from_plan)?;
    let flags = pids | (libc::CLONE_PARENT | libc::CLONE_PIDFD) as u64;
    let label = format!("clone3 of the root, pid {number}");
    let (_, args) = clone_program(&mut program, label, flags, (&[number], 0));
    let pidfd = program.zeroed(8);
    program.point(args, PIDFD_OFFSET, pidfd);
    let outcome = arena.run(&mut midwife, &program)?;
    let pidfd = TaskFd(outcome.word(pidfd, 0) as i32);
    let host = process_of(midwife.pid(), pidfd).during("Finding", || "the root".to_string())?;
    let leader = Seized::born(host).wait_stopped()?;
    // Its copy of the arena is the root's too.
    arena.end_task(midwife, 0, 0)?;
    Ok((arena, leader))
}

const LOGINUID: &str = "/proc/thread-self/loginuid";

/// Who is logged in is not handed down as long as this lives: a task in a user namespace can only set a login
/// uid that is not set.
struct UnsetLogin(Option<String>);

impl UnsetLogin {
    fn begin() -> UnsetLogin {
        let unset = u32::MAX.to_string();
        let own = std::fs::read_to_string(LOGINUID).ok();
        let own = own.filter(|own| own.trim() != unset);
        if own.is_some()
            && let Err(error) = std::fs::write(LOGINUID, unset)
        {
            tracing::warn!(%error, "the tasks cannot have login uids of their own");
        }
        UnsetLogin(own)
    }
}

impl Drop for UnsetLogin {
    fn drop(&mut self) {
        if let Some(own) = &self.0
            && let Err(error) = std::fs::write(LOGINUID, own)
        {
            tracing::warn!(%error, "this process is not logged in any more");
        }
    }
}

/// Which process a pidfd of a task stands for.
fn process_of(task: HostPid, pidfd: TaskFd) -> std::io::Result<HostPid> {
    let pidfd = Pidfd::open(task)?.duplicate_fd(pidfd)?;
    let path = own_proc_path(&format!("self/fdinfo/{}", pidfd.as_raw_fd()));
    let invalid = || std::io::Error::from(std::io::ErrorKind::InvalidData);
    let info = parse_fdinfo(std::fs::read(path)?).map_err(|_| invalid())?;
    let pid = info.value("Pid").map(String::from_utf8_lossy);
    let pid = pid.and_then(|pid| pid.trim().parse().ok());
    pid.map(HostPid).ok_or_else(invalid)
}
