//! Scheduling of a thread (`sched(7)`).
//!
//! Saved:    policy, real-time priority, nice value.
//! Rebuilt:  set by each thread. Needs: nothing.
//! Not kept: CPU affinity; the machine may be another.

use floe_image::messages::ThreadCoreEntry;
use floe_kernel::ids::HostPid;
use floe_kernel::thread::scheduling;

use crate::collect::{CollectError, Obstacle};

const SCHED_RESET_ON_FORK: u32 = 0x4000_0000;

/// Fills in the scheduling fields.
pub fn collect_scheduling(tid: HostPid, core: &mut ThreadCoreEntry) -> Result<(), CollectError> {
    let found = scheduling(tid).map_err(|source| CollectError::Task {
        pid: tid,
        action: "Asking for the scheduling",
        source,
    })?;
    let policy = (found.policy & !SCHED_RESET_ON_FORK).cast_signed();
    if policy == libc::SCHED_DEADLINE {
        let remedy = "give it another policy (chrt) for the checkpoint".to_string();
        return Err(CollectError::Unsupported(Obstacle {
            pid: tid,
            object: "policy SCHED_DEADLINE".to_string(),
            remedy,
        }));
    }
    core.sched_policy = Some(found.policy);
    core.sched_nice = Some(found.nice);
    core.sched_prio = matches!(policy, libc::SCHED_FIFO | libc::SCHED_RR).then_some(found.priority);
    Ok(())
}
