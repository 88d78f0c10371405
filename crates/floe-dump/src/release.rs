//! Giving the tree back, or ending it.

use std::time::{Duration, Instant};

use floe_kernel::ids::HostPid;
use floe_kernel::pidfd::{Pidfd, tgkill};
use floe_kernel::ptrace::{self, WaitStatus};

use crate::error::DumpError;
use crate::freeze::FrozenTree;

/// The longest time for tasks to end after SIGKILL; one that is stuck in the kernel takes longer.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// Lets every task run on as before.
pub fn resume(tree: FrozenTree) -> Result<(), DumpError> {
    let mut first_error = None;
    // Children first, so that no parent acts on a child that is still stopped.
    for task in tree.into_tasks_to_release().into_iter().rev() {
        for thread in task.threads {
            if let Err(error) = thread.release() {
                first_error.get_or_insert(error);
            }
        }
    }
    first_error.map_or(Ok(()), |error| Err(error.into()))
}

/// Lets every task go with a stop signal pending.
pub fn stop(tree: FrozenTree) -> Result<(), DumpError> {
    for task in tree.living() {
        // To the process: one that only its leader had to take would let the other threads run first.
        let sent = Pidfd::open(task.pid).and_then(|process| process.kill(libc::SIGSTOP));
        sent.map_err(|source| DumpError::Kill {
            pid: task.pid,
            source,
        })?;
    }
    resume(tree)
}

/// Kills every task and waits until all are gone.
pub fn kill(tree: FrozenTree) -> Result<(), DumpError> {
    for task in tree.living() {
        match tgkill(task.pid, libc::SIGKILL) {
            Err(source) if source.raw_os_error() != Some(libc::ESRCH) => {
                return Err(DumpError::Kill {
                    pid: task.pid,
                    source,
                });
            }
            _ => {}
        }
    }
    let tasks = tree.into_tasks_to_end();
    let threads = tasks.into_iter().flat_map(|task| task.threads);
    let tids: Vec<HostPid> = threads
        .map(|thread| {
            let tid = thread.pid();
            thread.forget();
            tid
        })
        .collect();
    wait_for_ends(tids)
}

/// Takes the ends of all threads as they come.
///
/// None may be waited for alone: a leader's end is reported after that of its other threads, and the last
/// thread of a pid namespace's first task ends only when all others in there were waited for.
fn wait_for_ends(mut tids: Vec<HostPid>) -> Result<(), DumpError> {
    let started = Instant::now();
    while !tids.is_empty() {
        let before = tids.len();
        let mut error = None;
        tids.retain(|&tid| match has_ended(tid) {
            Ok(ended) => !ended,
            Err(source) => {
                error.get_or_insert(DumpError::Kill { pid: tid, source });
                true
            }
        });
        if let Some(error) = error {
            return Err(error);
        }
        if let Some(&pid) = tids.first().filter(|_| started.elapsed() > END_DEADLINE) {
            let source = std::io::ErrorKind::TimedOut.into();
            return Err(DumpError::Kill { pid, source });
        }
        if tids.len() == before {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    Ok(())
}

/// Whether the end of `tid` was reported, to us or to its parent.
fn has_ended(tid: HostPid) -> std::io::Result<bool> {
    loop {
        match ptrace::wait(tid, libc::WNOHANG) {
            Ok(Some((_, WaitStatus::Exited(_) | WaitStatus::Killed(_)))) => return Ok(true),
            Ok(Some(_)) => continue,
            Ok(None) => return Ok(false),
            // No child of ours any more.
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => return Ok(true),
            Err(error) => return Err(error),
        }
    }
}
