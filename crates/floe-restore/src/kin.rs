//! Finding tasks that were born in another pid namespace: their makers know them by other numbers.

use std::collections::{BTreeMap, BTreeSet};

use floe_kernel::ids::HostPid;
use floe_kernel::proc::{ProcDir, ProcError, parse_status};
use floe_resources::namespace::has_own_pids;
use floe_resources::restore::{Attempt, ExecuteError, World};

/// Who exists already.
pub struct Known {
    tasks: BTreeSet<HostPid>,
    /// Which of the numbers in `/proc` is that of the root's namespace.
    depth: usize,
}

/// Who exists already; `None` where pids are those that the coordinator sees.
pub fn known_children(world: &World<'_>) -> Result<Option<Known>, ExecuteError> {
    if !has_own_pids(world.images) {
        return Ok(None);
    }
    let root = world.puppets.get(&world.images.root().pid());
    let depth = match root {
        None => Ok(None),
        Some(root) => ProcDir::open(root.pid())
            .and_then(|proc| numbers(&proc, "status"))
            .map(|numbers| Some(numbers.len().saturating_sub(1))),
    };
    Ok(Some(Known {
        tasks: world.puppets.values().map(|puppet| puppet.pid()).collect(),
        depth: found(depth, || "the root".to_string())?,
    }))
}

impl Known {
    /// The new child of a task that has the pid `number` in the root's namespace.
    pub fn find_child(&mut self, parent: HostPid, number: u32) -> Result<HostPid, ExecuteError> {
        let find = || -> Result<Option<HostPid>, ProcError> {
            let mut children = ProcDir::open(parent)?.children(parent)?;
            // The newest is the last.
            while let Some(child) = children.pop() {
                if !self.tasks.contains(&child)
                    && self.number(&ProcDir::open(child)?, "status")? == number
                {
                    return Ok(Some(child));
                }
            }
            Ok(None)
        };
        let child = found(find(), || {
            format!("task {number} among the children of {parent}")
        })?;
        self.tasks.insert(child);
        Ok(child)
    }

    /// All threads of a task by their id in the root's namespace.
    pub fn threads_by_number(
        &self,
        process: HostPid,
    ) -> Result<BTreeMap<u32, HostPid>, ExecuteError> {
        let list = || -> Result<Option<BTreeMap<u32, HostPid>>, ProcError> {
            let proc = ProcDir::open(process)?;
            let mut threads = BTreeMap::new();
            for thread in proc.threads()? {
                let number = self.number(&proc, &format!("task/{thread}/status"))?;
                threads.insert(number, thread);
            }
            Ok(Some(threads))
        };
        found(list(), || format!("threads of {process}"))
    }

    fn number(&self, proc: &ProcDir, name: &str) -> Result<u32, ProcError> {
        let numbers = numbers(proc, name)?;
        Ok(numbers.get(self.depth).copied().unwrap_or(0))
    }
}

/// The numbers of a thread, from ours to the innermost.
fn numbers(proc: &ProcDir, name: &str) -> Result<Vec<u32>, ProcError> {
    let status = parse_status(&proc.read_record(name)?).map_err(|error| proc.bad(error))?;
    let numbers = status.ns_pids.iter();
    Ok(numbers.map(|pid| pid.0.cast_unsigned()).collect())
}

fn found<T>(
    result: Result<Option<T>, ProcError>,
    what: impl FnOnce() -> String,
) -> Result<T, ExecuteError> {
    let found = match result {
        Ok(Some(found)) => Ok(found),
        Ok(None) => Err(std::io::Error::from_raw_os_error(libc::ESRCH)),
        Err(error) => Err(std::io::Error::other(error)),
    };
    found.during("Finding", what)
}
