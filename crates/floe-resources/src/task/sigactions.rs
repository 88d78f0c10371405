//! Signal actions (`sigaction(2)`).
//!
//! Saved:    handler, flags, restorer and mask of signals 1 to 64 but SIGKILL and SIGSTOP.
//! Rebuilt:  set by the task at the end: an ignored SIGCHLD would reap zombies. Needs: dead zombies.
//! Not kept: nothing.

use floe_image::messages::{SaEntry, TaskCoreEntry};
use floe_inject::{Arg, BufferId, Outcome, Program};

use super::rebuild::TaskContext;
use super::word;
use crate::restore::PlanError;

/// Bytes of the kernel's `struct sigaction` on x86-64: handler, flags, restorer, mask.
const ACTION: usize = 32;
const LAST_SIGNAL: i32 = 64;
/// Bytes of the kernel's `sigset_t`.
const SIGSET: usize = 8;

/// Signals whose action can be set, in the order of the images.
fn settable() -> impl Iterator<Item = i32> {
    (1..=LAST_SIGNAL).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP].contains(signal))
}

/// Remote calls that read the actions.
pub struct SignalActions(Vec<BufferId>);

impl SignalActions {
    /// Adds the calls.
    pub fn ask(program: &mut Program) -> Self {
        let ask_one = |signal| {
            let buffer = program.zeroed(ACTION);
            let args = [
                Arg::from(signal),
                Arg::from(0),
                Arg::from(buffer),
                Arg::from(8),
            ];
            program.call("rt_sigaction", libc::SYS_rt_sigaction, &args);
            buffer
        };
        SignalActions(settable().map(ask_one).collect())
    }

    /// The actions in the order of their signals, as the images have them.
    pub fn read(&self, outcome: &Outcome) -> Vec<SaEntry> {
        let entry = |buffer: &BufferId| {
            let bytes = outcome.data(*buffer);
            SaEntry {
                sigaction: word(bytes, 0),
                flags: word(bytes, 8),
                restorer: word(bytes, 16),
                mask: word(bytes, 24),
                compat_sigaction: Some(false),
                mask_extended: None,
            }
        };
        self.0.iter().map(entry).collect()
    }
}

/// Sets the action of every signal; those that the image lacks become the default.
///
/// A signal that is ignored leaves the queues, so this comes before they are filled.
pub fn plan(
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
