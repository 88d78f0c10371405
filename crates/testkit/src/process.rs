//! Processes seen from outside: families, ends, and the killing of what we started.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// Time left until `deadline`.
fn left(deadline: Instant) -> Timespec {
    let left = deadline.saturating_duration_since(Instant::now());
    Timespec {
        tv_sec: left.as_secs() as i64,
        tv_nsec: i64::from(left.subsec_nanos()),
    }
}

/// Waits until one of `fds` can be read, or the deadline: which one.
pub fn wait_readable(fds: &[&OwnedFd], deadline: Instant) -> io::Result<Option<usize>> {
    loop {
        let mut polled: Vec<_> = fds
            .iter()
            .map(|fd| PollFd::new(*fd, PollFlags::IN))
            .collect();
        match poll(&mut polled, Some(&left(deadline))) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(polled.iter().position(|fd| !fd.revents().is_empty())),
        }
    }
}

/// Makes orphans of what we start our children, so that they can be reaped and found.
pub fn adopt_orphans() -> anyhow::Result<()> {
    let any = Pid::from_raw(1);
    rustix::process::set_child_subreaper(any).context("becoming a subreaper")
}

/// A task and all that descend from it, parents first.
pub fn family(root: i32) -> Vec<i32> {
    let mut found = vec![root];
    let mut at = 0;
    while at < found.len() {
        let tasks = fs::read_dir(format!("/proc/{}/task", found[at]));
        for task in tasks.into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            found.extend(
                children
                    .split_whitespace()
                    .filter_map(|pid| pid.parse::<i32>().ok()),
            );
        }
        at += 1;
    }
    found
}

/// The parent of a task; `None` if the task is not there.
pub fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// Children of ours in the session `session`, such as orphans of a dumped tree.
pub fn orphans(session: i32) -> Vec<i32> {
    let own = std::process::id().to_string();
    let session = session.to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let words: Vec<&str> = stat
            .rsplit_once(") ")
            .map_or(Vec::new(), |(_, rest)| rest.split(' ').collect());
        if words.get(1) == Some(&own.as_str()) && words.get(3) == Some(&session.as_str()) {
            found.extend(
                entry
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse::<i32>().ok()),
            );
        }
    }
    found
}

/// Whether a task is there, be it as a zombie.
pub fn exists(pid: i32) -> bool {
    parent(pid).is_some()
}

/// Whether `pid` descends from us.
pub fn is_ours(pid: i32) -> bool {
    let own = std::process::id() as i32;
    let mut at = pid;
    while let Some(next) = parent(at) {
        if next == own {
            return true;
        }
        at = next;
    }
    false
}

/// A descriptor that can be read when the process has ended.
pub fn watch(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Waits for the ends of processes, reaps those that are ours, and makes sure that their pids
/// are free.
pub fn wait_for_ends(pids: &[i32], limit: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    let mut waiting: BTreeSet<i32> = pids.iter().copied().collect();
    while !waiting.is_empty() {
        waiting.retain(|pid| {
            if let Ok(fd) = watch(*pid) {
                // A short wait only: an orphan is ours only after its parent's end.
                let soon = (Instant::now() + Duration::from_millis(20)).min(deadline);
                let _ = wait_readable(&[&fd], soon);
            }
            let _ = crate::sys::task::reap(*pid);
            exists(*pid)
        });
        ensure!(
            Instant::now() < deadline || waiting.is_empty(),
            "tasks {waiting:?} have not ended"
        );
    }
    Ok(())
}

/// Kills those of `pids` that descend from us, and waits for their ends.
pub fn kill_ours(pids: &[i32], limit: Duration) -> anyhow::Result<()> {
    let mut doomed: Vec<i32> = pids.iter().copied().filter(|pid| is_ours(*pid)).collect();
    // What they started since.
    let more: Vec<i32> = doomed.iter().flat_map(|pid| family(*pid)).collect();
    doomed.extend(more);
    doomed.sort_unstable();
    doomed.dedup();
    for pid in &doomed {
        if let Some(pid) = Pid::from_raw(*pid) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    wait_for_ends(&doomed, limit)
}

/// One field of `/proc/PID/status`.
pub fn status_field(pid: i32, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim_start_matches(':').trim().to_owned())
}

/// Waits with a deadline until `fd` can be read.
pub fn readable_before(fd: impl AsFd, deadline: Instant) -> io::Result<bool> {
    let owned = fd.as_fd().try_clone_to_owned()?;
    Ok(wait_readable(&[&owned], deadline)?.is_some())
}

/// The most memory that any child that has ended, or a child of one, ever had resident, in bytes.
pub fn peak_of_children() -> std::io::Result<usize> {
    crate::sys::task::peak_of_children()
}
