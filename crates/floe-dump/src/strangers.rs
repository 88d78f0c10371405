//! Tasks in the pid namespace of a tree that are not of the tree: who was put there beside its first process
//! (`runc exec`, `podman exec`) ends with that, and is in no image.

use floe_kernel::ids::HostPid;
use floe_kernel::proc::{ProcDir, ProcError, Status, parse_status};
use rustix::fs::Stat;

/// As many are named.
const MOST_NAMED: usize = 8;

/// Says who of the running system would be lost with the tree.
pub fn warn_of(root: HostPid) {
    match find(root) {
        Ok(strangers) if strangers.is_empty() => {}
        Ok(strangers) => {
            let mut names: Vec<String> = strangers.iter().take(MOST_NAMED).map(show).collect();
            if strangers.len() > MOST_NAMED {
                names.push(format!("{} more", strangers.len() - MOST_NAMED));
            }
            tracing::warn!(
                "in the tree's pid namespace but not of the tree: {}; they are not saved, and end with its first \
                 process. Wait until they have ended, or have that process start them",
                names.join(", ")
            );
        }
        Err(error) => tracing::debug!(%error, "who is beside the tree is not known"),
    }
}

/// The first tasks of what is beside the tree: their parents are in another pid namespace.
fn find(root: HostPid) -> Result<Vec<ProcDir>, ProcError> {
    let tree = ProcDir::open(root)?;
    let own = ProcDir::open(HostPid(std::process::id().cast_signed()))?;
    let inside = tree.stat("ns/pid")?;
    // Only with the first process of a namespace its other tasks end; ours is not dumped.
    if is_same(&inside, &own.stat("ns/pid")?)
        || status(&tree)?.ns_pids.last().map(|pid| pid.0) != Some(1)
    {
        return Ok(Vec::new());
    }
    let is_inside = |task: &ProcDir| {
        task.stat("ns/pid")
            .is_ok_and(|found| is_same(&found, &inside))
    };
    let mut strangers = Vec::new();
    for pid in all_processes()? {
        // Whoever ends meanwhile is not missed.
        let Ok(task) = ProcDir::open(pid) else {
            continue;
        };
        if pid == root || !is_inside(&task) {
            continue;
        }
        let Ok(found) = status(&task) else { continue };
        let parent = found.ppid.and_then(|parent| ProcDir::open(parent).ok());
        if !parent.is_some_and(|parent| is_inside(&parent)) {
            strangers.push(task);
        }
    }
    Ok(strangers)
}

fn is_same(one: &Stat, other: &Stat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

fn status(task: &ProcDir) -> Result<Status, ProcError> {
    parse_status(&task.read_record("status")?).map_err(|error| task.bad(error))
}

fn all_processes() -> Result<Vec<HostPid>, ProcError> {
    let own = ProcDir::open(HostPid(std::process::id().cast_signed()))?;
    Ok(own.list("..")?.into_iter().map(HostPid).collect())
}

/// `12 (sleep 100)`: its command line, or its name.
fn show(task: &ProcDir) -> String {
    const LONGEST: usize = 60;
    let line = task.read("cmdline").unwrap_or_default();
    let line = match line.is_empty() {
        true => task.read("comm").unwrap_or_default(),
        false => line,
    };
    let words = String::from_utf8_lossy(&line).replace(['\0', '\n'], " ");
    let words: String = words.trim_end().chars().take(LONGEST).collect();
    format!("{} ({words})", task.pid())
}
