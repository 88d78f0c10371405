//! Finding tasks that were born in another pid namespace: their makers know them by other numbers.

use std::collections::{BTreeMap, BTreeSet};

use floe_kernel::ids::HostPid;
use floe_kernel::proc::{ProcDir, ProcError, parse_status};
use floe_resources::namespace::has_own_pids;
use floe_resources::restore::{Attempt, ExecuteError, World};

/// Who exists already; `None` where pids are those that the coordinator sees.
pub fn known_children(world: &World<'_>) -> Option<BTreeSet<HostPid>> {
    has_own_pids(world.images).then(|| world.puppets.values().map(|puppet| puppet.pid()).collect())
}

/// The new child of a task that has the pid `number` in the innermost namespace.
pub fn find_child(
    parent: HostPid,
    number: u32,
    known: &BTreeSet<HostPid>,
) -> Result<HostPid, ExecuteError> {
    let find = || -> Result<Option<HostPid>, ProcError> {
        let mut children = ProcDir::open(parent)?.children(parent)?;
        // The newest is the last.
        while let Some(child) = children.pop() {
            if !known.contains(&child) && inner_number(&ProcDir::open(child)?, "status")? == number
            {
                return Ok(Some(child));
            }
        }
        Ok(None)
    };
    found(find(), || {
        format!("task {number} among the children of {parent}")
    })
}

/// All threads of a task by their id in the innermost namespace.
pub fn threads_by_number(process: HostPid) -> Result<BTreeMap<u32, HostPid>, ExecuteError> {
    let list = || -> Result<Option<BTreeMap<u32, HostPid>>, ProcError> {
        let proc = ProcDir::open(process)?;
        let mut threads = BTreeMap::new();
        for thread in proc.threads()? {
            let number = inner_number(&proc, &format!("task/{thread}/status"))?;
            threads.insert(number, thread);
        }
        Ok(Some(threads))
    };
    found(list(), || format!("threads of {process}"))
}

fn inner_number(proc: &ProcDir, name: &str) -> Result<u32, ProcError> {
    let status = parse_status(&proc.read_record(name)?).map_err(|error| proc.bad(error))?;
    Ok(status.ns_pids.last().map_or(0, |pid| pid.0.cast_unsigned()))
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
