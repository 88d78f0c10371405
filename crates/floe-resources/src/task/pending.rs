//! Pending signals.
//!
//! Saved:    the private queue of each thread and the shared one of the process, with siginfo, in order.
//! Rebuilt:  queued again by the thread itself, while all is blocked. Needs: actions, dead zombies.
//! Not kept: siginfo of a pending SIGURG and SIGSTOP, which our own work cannot block.

use floe_image::messages::{SiginfoEntry, SignalQueueEntry, TaskCoreEntry, ThreadCoreEntry};
use floe_inject::{Arg, Program};
use floe_kernel::ids::HostPid;
use floe_kernel::ptrace::{SignalQueue, peek_siginfo};

use super::rebuild::TaskContext;
use crate::collect::CollectError;
use crate::restore::PlanError;

/// Highest signal number.
const LAST_SIGNAL: i32 = 64;
/// Bytes of the kernel's `sigset_t`.
const SIGSET: usize = 8;
/// Bytes of `siginfo_t`.
const SIGINFO: usize = 128;
/// How many signals the restore itself may have caused: SIGCHLD, and SIGIO or SIGHUP of a terminal.
const UNINVITED: usize = 4;

/// Whether a process is in a group-stop (state `T`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupStop {
    Yes,
    No,
}

const STOP_SIGNALS: [i32; 4] = [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];

/// Copies a queue of a stopped thread; the signals stay pending.
///
/// Stop signals that are pending in a process that is stopped already can never have an effect, as the
/// SIGCONT that wakes it takes them away: they are left out.
pub fn collect_pending(
    pid: HostPid,
    queue: SignalQueue,
    group_stop: GroupStop,
) -> Result<SignalQueueEntry, CollectError> {
    let has_effect = |info: &[u8; SIGINFO]| {
        let signal = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        group_stop == GroupStop::No || !STOP_SIGNALS.contains(&signal)
    };
    let signals = peek_siginfo(pid, queue).map_err(|source| CollectError::Task {
        pid,
        action: "Reading the pending signals",
        source,
    })?;
    let signals = signals
        .into_iter()
        .filter(has_effect)
        .map(|info| SiginfoEntry {
            siginfo: info.to_vec(),
        })
        .collect();
    Ok(SignalQueueEntry { signals })
}

/// Empties the queues of what the restore has caused and fills the shared one. For the leader.
pub fn plan_shared(
    task: &TaskCoreEntry,
    context: &TaskContext<'_>,
    program: &mut Program,
) -> Result<(), PlanError> {
    let all = program.buffer(&u64::MAX.to_le_bytes());
    let now = program.zeroed(16);
    let args = [
        Arg::from(all),
        Arg::from(0),
        Arg::from(now),
        Arg::from(SIGSET),
    ];
    for _ in 0..UNINVITED {
        program.try_call("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, &args);
    }
    for (signal, info) in raw(task.signals_s.as_ref(), context)? {
        let pid = program.call("getpid", libc::SYS_getpid, &[]);
        let info = program.buffer(info);
        let args = [Arg::from(pid), Arg::from(signal), Arg::from(info)];
        let label = format!("rt_sigqueueinfo({signal})");
        program.call(label, libc::SYS_rt_sigqueueinfo, &args);
    }
    Ok(())
}

/// Fills the queue of a thread, which only the thread itself may do.
pub fn plan_private(
    thread: &ThreadCoreEntry,
    context: &TaskContext<'_>,
    program: &mut Program,
) -> Result<(), PlanError> {
    let signals = raw(thread.signals_p.as_ref(), context)?;
    if signals.is_empty() {
        return Ok(());
    }
    let pid = program.call("getpid", libc::SYS_getpid, &[]);
    let tid = program.call("gettid", libc::SYS_gettid, &[]);
    for (signal, info) in signals {
        let info = program.buffer(info);
        let args = [
            Arg::from(pid),
            Arg::from(tid),
            Arg::from(signal),
            Arg::from(info),
        ];
        let label = format!("rt_tgsigqueueinfo({signal})");
        program.call(label, libc::SYS_rt_tgsigqueueinfo, &args);
    }
    Ok(())
}

/// Number and raw siginfo of each signal in a queue.
fn raw<'a>(
    queue: Option<&'a SignalQueueEntry>,
    context: &TaskContext<'_>,
) -> Result<Vec<(i32, &'a [u8])>, PlanError> {
    let mut signals = Vec::new();
    for entry in queue.map_or(&[][..], |queue| &queue.signals) {
        let info = entry.siginfo.as_slice();
        let number = info.first_chunk().map(|number| i32::from_le_bytes(*number));
        match number {
            Some(signal @ 1..=LAST_SIGNAL) if info.len() == SIGINFO => signals.push((signal, info)),
            _ => return Err(context.damaged("a pending signal is no siginfo")),
        }
    }
    Ok(signals)
}
