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
    let started = Instant::now();
    // The end of the first task of a pid namespace is reported after that of all others in there.
    for task in tree.into_tasks_to_end().into_iter().rev() {
        // The leader's end is reported after that of all other threads.
        for thread in task.threads.into_iter().rev() {
            let tid = thread.pid();
            thread.forget();
            wait_for_end(tid, started).map_err(|source| DumpError::Kill { pid: tid, source })?;
        }
    }
    Ok(())
}

fn wait_for_end(tid: HostPid, started: Instant) -> std::io::Result<()> {
    loop {
        match ptrace::wait(tid, libc::WNOHANG) {
            Ok(Some((_, WaitStatus::Exited(_) | WaitStatus::Killed(_)))) => return Ok(()),
            Ok(Some(_)) => continue,
            Ok(None) if started.elapsed() > END_DEADLINE => {
                return Err(std::io::ErrorKind::TimedOut.into());
            }
            Ok(None) => std::thread::sleep(Duration::from_micros(100)),
            // No child of ours any more: its end was reported to its parent.
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}
