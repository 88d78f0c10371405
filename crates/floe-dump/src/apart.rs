//! What a thread has for itself that is the process's in the images: it is refused, for it would be lost.

use std::cmp::Ordering;

use floe_kernel::ids::HostPid;
use floe_kernel::kcmp::{TaskResource, compare_tasks};
use floe_kernel::proc::{ProcDir, ProcError};
use floe_resources::{CollectError, Collector, Obstacle};

/// Namespaces that a thread can leave alone (`setns(2)`, `unshare(2)`).
const NAMESPACES: [&str; 5] = ["net", "uts", "ipc", "mnt", "cgroup"];

/// The namespaces of a thread, by their inodes.
pub type Namespaces = [u64; NAMESPACES.len()];

/// Reads them; 0 for those that the kernel does not have.
pub fn namespaces(proc: &ProcDir, tid: HostPid) -> Result<Namespaces, ProcError> {
    let mut found = Namespaces::default();
    for (kind, inode) in NAMESPACES.iter().zip(&mut found) {
        *inode = match proc.stat(&format!("task/{tid}/ns/{kind}")) {
            Ok(stat) => stat.st_ino,
            Err(error) if error.is_gone() => 0,
            Err(error) => return Err(error),
        };
    }
    Ok(found)
}

/// Adds an obstacle for all that sets a thread apart from the leader; both with their namespaces and umasks.
pub fn refuse(
    proc: &ProcDir,
    [leader, thread]: [(HostPid, &Namespaces, Option<u32>); 2],
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let tid = thread.0;
    let mut refuse = |what: String| {
        collector.obstacle(Obstacle {
            pid: proc.pid(),
            object: format!("thread {tid} with {what} of its own"),
            remedy: "let that thread end before the checkpoint: threads are saved with what the process has".to_string(),
        });
    };
    let kinds = NAMESPACES.iter().zip(leader.1.iter().zip(thread.1));
    for (kind, _) in kinds.filter(|(_, (leader, thread))| leader != thread) {
        refuse(format!("a {kind} namespace"));
    }
    let shares = |resource| {
        let compared = compare_tasks(leader.0, tid, resource);
        compared
            .map(|order| order == Ordering::Equal)
            .map_err(|source| CollectError::Task {
                pid: tid,
                action: "Comparing a thread with its process",
                source,
            })
    };
    if !shares(TaskResource::Files)? {
        refuse("a table of descriptors".to_string());
    }
    // Its own may still be what the process has, and then nothing is lost.
    if !shares(TaskResource::Fs)? {
        for (what, name) in [("a working directory", "cwd"), ("a root", "root")] {
            let [leaders, own] =
                [leader.0, tid].map(|tid| proc.read_link(&format!("task/{tid}/{name}")));
            if leaders? != own? {
                refuse(what.to_string());
            }
        }
        if leader.2 != thread.2 {
            refuse("a umask".to_string());
        }
    }
    Ok(())
}
