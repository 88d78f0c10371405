//! Signal actions, pending signals and alternate stacks (`signal(7)`).
//!
//! Saved:    handler, flags, restorer and mask of signals 1 to 64 but SIGKILL and SIGSTOP; the private
//!           queue of each thread and the shared one of the process, with siginfo, in order; the stack.
//! Rebuilt:  actions, then queues, by the task while all is blocked. Needs: memory, dead zombies.
//! Not kept: siginfo of a pending SIGURG and SIGSTOP, which our own work cannot block.

use floe_image::messages::{SaEntry, SignalQueueEntry, TaskCoreEntry, ThreadCoreEntry};
use floe_inject::{Arg, Program};

use super::TaskContext;
use crate::restore::PlanError;

/// Highest signal number.
const LAST: i32 = 64;
/// Bytes of the kernel's `struct sigaction` on x86-64: handler, flags, restorer, mask.
const ACTION: usize = 32;
/// Bytes of the kernel's `sigset_t`.
const SIGSET: usize = 8;
/// Bytes of `siginfo_t`.
const SIGINFO: usize = 128;
/// How many signals the restore itself may have caused: SIGCHLD, and SIGIO or SIGHUP of a terminal.
const UNINVITED: usize = 4;

/// Signals whose action can be set, in the order of the images.
fn settable() -> impl Iterator<Item = i32> {
    (1..=LAST).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP].contains(signal))
}

/// Sets the action of every signal; those that the image lacks become the default.
///
/// A signal that is ignored leaves the queues, so this comes before they are filled.
pub fn plan_actions(
    task: &TaskCoreEntry,
    context: &TaskContext<'_>,
    program: &mut Program,
) -> Result<(), PlanError> {
    let signals: Vec<i32> = settable().collect();
    if task.sigactions.len() > signals.len() {
        return Err(context.damaged(format!("it has {} signal actions", task.sigactions.len())));
    }
    if task
        .sigactions
        .iter()
        .any(|it| it.compat_sigaction == Some(true))
    {
        return Err(context.unsupported("the 32-bit signal actions", "run a 64-bit program"));
    }
    let actions = task.sigactions.iter().flat_map(action_bytes);
    let mut bytes: Vec<u8> = actions.collect();
    bytes.resize(signals.len() * ACTION, 0);
    let buffer = program.buffer(&bytes);
    for (index, signal) in signals.into_iter().enumerate() {
        let args = [
            Arg::from(signal),
            Arg::At(buffer, (index * ACTION) as u64),
            Arg::from(0),
            Arg::from(SIGSET),
        ];
        program.call(
            format!("rt_sigaction({signal})"),
            libc::SYS_rt_sigaction,
            &args,
        );
    }
    Ok(())
}

fn action_bytes(entry: &SaEntry) -> [u8; ACTION] {
    let words = [entry.sigaction, entry.flags, entry.restorer, entry.mask];
    let bytes = words.map(u64::to_le_bytes).concat();
    bytes.try_into().expect("four words are an action")
}

/// Empties the queues of what the restore has caused and fills the shared one. For the leader.
pub fn plan_shared_queue(
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
pub fn plan_private_queue(
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
            Some(signal @ 1..=LAST) if info.len() == SIGINFO => signals.push((signal, info)),
            _ => return Err(context.damaged("a pending signal is no siginfo")),
        }
    }
    Ok(signals)
}

/// Sets the alternate stack. A leader inherits one, threads do not.
pub fn plan_alt_stack(thread: &ThreadCoreEntry, leader: bool, program: &mut Program) {
    const SS_AUTODISARM: u32 = 1 << 31;
    let disabled = libc::SS_DISABLE as u32;
    let (at, size, flags) = match &thread.sas {
        // SS_ONSTACK tells of the stack pointer, and is not a setting.
        Some(it) => (
            it.ss_sp,
            it.ss_size,
            it.ss_flags & (disabled | SS_AUTODISARM),
        ),
        None => (0, 0, disabled),
    };
    if flags & disabled != 0 && !leader {
        return;
    }
    let stack = [at, u64::from(flags), size].map(u64::to_le_bytes).concat();
    let stack = program.buffer(&stack);
    program.call("sigaltstack", libc::SYS_sigaltstack, &[Arg::from(stack)]);
}
