//! Making a tracker for a stopped task.

use std::os::fd::OwnedFd;

use floe_inject::{Arena, Arg, InjectError, Program, QuietSignal, Saved, Stopped, find_gate};
use floe_kernel::fault;
use floe_kernel::ids::TaskFd;
use floe_kernel::pagemap::Pagemap;
use floe_kernel::pidfd::Pidfd;
use floe_kernel::proc::{Mapping, parse_status};
use floe_kernel::uffd::{TRACKING_FEATURES, USER_MODE_ONLY, Uffd};
use floe_memory::{Area, DirtyTracker, NoTracker, PageRun, SoftDirtyTracker, UffdTracker};
use floe_resources::task::rseq::collect_rseq;
use rustix::fs::OFlags;

use crate::error::DumpError;
use crate::freeze::FrozenTask;
use crate::keeper::Session;

/// A tracker by soft-dirty bits.
pub fn soft_dirty(
    task: &FrozenTask,
    unsure: Option<Vec<PageRun>>,
    arms: bool,
) -> Result<Box<dyn DirtyTracker>, DumpError> {
    if unsure.is_none() && !arms {
        return Ok(Box::new(NoTracker));
    }
    // Pages that were not copied for sure cannot be named to this tracker.
    let continued = unsure.is_some_and(|unsure| unsure.is_empty());
    let pagemap = Pagemap::new(task.proc.open_file("pagemap", OFlags::RDONLY)?);
    let clear_refs = task.proc.open_file("clear_refs", OFlags::WRONLY)?;
    let tracker = SoftDirtyTracker::new(task.pid, pagemap, clear_refs.into(), continued);
    Ok(Box::new(tracker))
}

/// A tracker by userfaultfd: with the descriptor of the last round, or with a new one where a new round
/// begins.
pub fn uffd(
    task: &mut FrozenTask,
    (mappings, areas): (&[Mapping], &[Area]),
    keeper: Option<&mut Session>,
    unsure: Option<Vec<PageRun>>,
    arms: bool,
) -> Result<Box<dyn DirtyTracker>, DumpError> {
    let Some(keeper) = keeper else {
        return Ok(Box::new(NoTracker));
    };
    let tracked = (task.pid.0, task.stat.start_time);
    let pagemap = || -> Result<Pagemap, DumpError> {
        let file = task.proc.open_file("pagemap", OFlags::RDONLY)?;
        Ok(Pagemap::new(file))
    };
    if let Some(fd) = keeper.fds.get(&tracked) {
        let fd = fd.try_clone().map_err(DumpError::Uffd)?;
        let mut tracker = UffdTracker::new(task.pid, pagemap()?, Uffd::adopt(fd));
        if tracker.is_alive(areas) {
            return Ok(match unsure {
                Some(unsure) => Box::new(tracker.continued(unsure)),
                None if arms => Box::new(tracker),
                None => Box::new(NoTracker),
            });
        }
        tracing::info!(
            pid = task.pid.0,
            "nothing of the task's memory is tracked since the last round (it became another program): \
             all of it is copied"
        );
    }
    if !arms {
        return Ok(Box::new(NoTracker));
    }
    let pagemap = pagemap()?;
    // The old one belongs to an address space that is gone.
    if keeper.fds.remove(&tracked).is_some() {
        keeper.release(tracked)?;
    }
    match create(task, mappings) {
        Ok(uffd) => {
            keeper.keep(tracked, &uffd)?;
            Ok(Box::new(UffdTracker::new(task.pid, pagemap, uffd)))
        }
        Err(error) => {
            tracing::warn!(
                pid = task.pid.0,
                "all memory of the task is copied every time, no userfaultfd can be made in it: {error}"
            );
            Ok(Box::new(NoTracker))
        }
    }
}

/// Has the task make a userfaultfd, takes it, and has the task close its own.
fn create(task: &mut FrozenTask, mappings: &[Mapping]) -> Result<Uffd, DumpError> {
    let pid = task.pid;
    let code = mappings
        .iter()
        .filter(|mapping| mapping.exec && mapping.read && mapping.name != b"[vsyscall]");
    let mut code: Vec<&Mapping> = code.collect();
    code.sort_by_key(|mapping| mapping.name != b"[vdso]");
    let gate = code
        .iter()
        .find_map(|mapping| find_gate(pid, mapping.start.0..mapping.end.0).ok())
        .ok_or(InjectError::NoGate { pid })?;
    let leader = task
        .threads
        .first_mut()
        .ok_or(InjectError::NoGate { pid })?;
    // As for any remote call: see `remote.rs`.
    let mut regs = leader.regs()?;
    if let Some(ip) = collect_rseq(pid, regs.rip)?.abort_ip {
        regs.rip = ip;
        let sigmask = leader.sigmask()?;
        leader.replace(Saved { regs, sigmask });
    }
    let status = parse_status(&task.proc.read("status")?).map_err(|error| task.proc.bad(error))?;
    let pending = status.private_pending | status.shared_pending;
    let arena = Arena::inject(leader, gate, QuietSignal::choose(status.caught, pending))?;
    leader.note_userfaultfd(Some(gate));
    let taken = open_and_close(&arena, leader);
    arena.remove(leader)?;
    Uffd::new(taken?, TRACKING_FEATURES).map_err(DumpError::Uffd)
}

/// The thread waits in the executor between the two calls, so that nothing but an open descriptor is left
/// in the task should we be killed; the supervisor has that closed.
fn open_and_close(arena: &Arena, leader: &mut Stopped) -> Result<OwnedFd, DumpError> {
    let mut program = Program::new();
    let flags = (libc::O_CLOEXEC | USER_MODE_ONLY) as u64;
    let open = program.call("userfaultfd", libc::SYS_userfaultfd, &[Arg::Value(flags)]);
    let fd = arena.run(leader, &program)?.result(open);
    fault::point();
    let taken = take(leader.pid(), TaskFd(fd as i32));
    let mut program = Program::new();
    program.call(
        "close of the userfaultfd",
        libc::SYS_close,
        &[Arg::Value(fd as u64)],
    );
    arena.run(leader, &program)?;
    fault::point();
    leader.note_userfaultfd(None);
    taken.map_err(DumpError::Uffd)
}

fn take(pid: floe_kernel::ids::HostPid, fd: TaskFd) -> std::io::Result<OwnedFd> {
    Pidfd::open(pid)?.duplicate_fd(fd)
}
