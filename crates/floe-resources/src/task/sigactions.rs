//! Signal actions (`sigaction(2)`).
//!
//! Saved:    handler, flags, restorer and mask of signals 1 to 64 but SIGKILL and SIGSTOP.
//! Rebuilt:  set by the task. Needs: nothing.
//! Not kept: nothing.

use floe_image::messages::SaEntry;
use floe_inject::{Arg, BufferId, Outcome, Program};

use super::word;

/// Bytes of the kernel's `struct sigaction` on x86-64: handler, flags, restorer, mask.
const ACTION: usize = 32;
const LAST_SIGNAL: i32 = 64;

/// Remote calls that read the actions.
pub struct SignalActions(Vec<BufferId>);

impl SignalActions {
    /// Adds the calls.
    pub fn ask(program: &mut Program) -> Self {
        let saved =
            (1..=LAST_SIGNAL).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP].contains(signal));
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
        SignalActions(saved.map(ask_one).collect())
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
