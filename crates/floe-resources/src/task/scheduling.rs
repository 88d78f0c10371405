//! Scheduling of a thread (`sched(7)`).
//!
//! Saved:    policy, real-time priority, nice value.
//! Rebuilt:  set by each thread where it is not inherited, before limits. Needs: nothing.
//! Not kept: CPU affinity; the machine may be another.

use floe_image::messages::ThreadCoreEntry;
use floe_inject::{Arg, Program};
use floe_kernel::ids::HostPid;
use floe_kernel::thread::scheduling;

use rustix::process::setpriority_process;

use super::rebuild::TaskContext;
use crate::collect::{CollectError, Obstacle};
use crate::restore::{PlanError, TreeImages};

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

/// The lowest nice value of all tasks, had by this thread until it is dropped. Puppets inherit it, and may raise it
/// without privilege, in user namespaces too.
#[derive(Debug)]
pub struct LowestNice {
    before: Option<i32>,
}

impl LowestNice {
    /// Takes it, where that is allowed and needed.
    pub fn take(images: &TreeImages) -> Self {
        let cores = images
            .tasks
            .iter()
            .flat_map(|task| task.threads.values().chain([&task.core]));
        let threads = cores.filter_map(|core| core.thread_core.as_ref());
        let lowest = threads.filter_map(|thread| thread.sched_nice).min();
        let own = scheduling(HostPid(0)).ok().map(|own| own.nice);
        let before = own.filter(|own| lowest.is_some_and(|lowest| lowest < *own));
        let taken = before
            .zip(lowest)
            .map(|(_, lowest)| setpriority_process(None, lowest));
        LowestNice {
            // Without the right, whoever needs a call for it is told.
            before: before.filter(|_| taken == Some(Ok(()))),
        }
    }
}

impl Drop for LowestNice {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // It was there before, and raising it is always allowed.
            let _ = setpriority_process(None, before);
        }
    }
}

/// Sets policy and nice value.
pub fn plan(
    thread: &ThreadCoreEntry,
    context: &TaskContext<'_>,
    program: &mut Program,
) -> Result<(), PlanError> {
    let born = &context.birth.scheduling;
    let policy = thread.sched_policy.unwrap_or(libc::SCHED_OTHER as u32);
    let priority = thread.sched_prio.unwrap_or(0);
    let plain = (policy & !SCHED_RESET_ON_FORK).cast_signed();
    if plain == libc::SCHED_DEADLINE {
        let remedy = "give it another policy (chrt) before the checkpoint";
        return Err(context.unsupported("policy SCHED_DEADLINE", remedy));
    }
    // A policy that resets itself on fork has been reset in the puppet.
    let inherited = born.policy & SCHED_RESET_ON_FORK == 0;
    if !inherited || policy != born.policy || priority != born.priority {
        let param = program.buffer(&priority.to_le_bytes());
        let args = [Arg::from(0), Arg::from(policy), Arg::from(param)];
        let label = "sched_setscheduler";
        program.call(label, libc::SYS_sched_setscheduler, &args);
    }
    // The kernel keeps the nice value under real-time policies too.
    if let Some(nice) = thread
        .sched_nice
        .filter(|nice| *nice != born.nice || !inherited)
    {
        let args = [libc::PRIO_PROCESS as i32, 0, nice].map(Arg::from);
        program.call(format!("setpriority({nice})"), libc::SYS_setpriority, &args);
    }
    Ok(())
}
