//! Making a tracker for a stopped task.

use std::os::fd::OwnedFd;

use floe_inject::{InjectError, Saved, find_gate, remote_call};
use floe_kernel::fault;
use floe_kernel::ids::TaskFd;
use floe_kernel::pagemap::Pagemap;
use floe_kernel::pidfd::Pidfd;
use floe_kernel::proc::Mapping;
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
    let flags = (libc::O_CLOEXEC | USER_MODE_ONLY) as u64;
    let made = remote_call(
        leader,
        gate,
        ("userfaultfd", libc::SYS_userfaultfd),
        [flags, 0, 0, 0, 0, 0],
    );
    let result = made.and_then(|fd| {
        fault::point();
        let taken = take(pid, TaskFd(fd as i32));
        let close = ("close of the userfaultfd", libc::SYS_close);
        remote_call(leader, gate, close, [fd as u64, 0, 0, 0, 0, 0])?;
        Ok(taken)
    });
    leader.put_back()?;
    let fd = result?.map_err(DumpError::Uffd)?;
    Uffd::new(fd, TRACKING_FEATURES).map_err(DumpError::Uffd)
}

fn take(pid: floe_kernel::ids::HostPid, fd: TaskFd) -> std::io::Result<OwnedFd> {
    Pidfd::open(pid)?.duplicate_fd(fd)
}
