//! Interval timers (`setitimer(2)`).
//!
//! Saved:    time left and interval of the three timers.
//! Rebuilt:  set at the end. Needs: signal actions.
//! Not kept: the time that passes between dump and restore does not count.

use floe_image::messages::ItimerEntry;
use floe_inject::{Arg, BufferId, Outcome, Program};

use super::word;

/// Remote calls that read the three timers.
pub struct IntervalTimers([BufferId; 3]);

impl IntervalTimers {
    /// Adds the calls.
    pub fn ask(program: &mut Program) -> Self {
        IntervalTimers([0u64, 1, 2].map(|which| {
            let buffer = program.zeroed(32);
            program.call(
                "getitimer",
                libc::SYS_getitimer,
                &[Arg::from(which), Arg::from(buffer)],
            );
            buffer
        }))
    }

    /// Real, virtual and profiling timer.
    pub fn read(&self, outcome: &Outcome) -> [ItimerEntry; 3] {
        self.0.map(|buffer| {
            let bytes = outcome.data(buffer);
            ItimerEntry {
                isec: word(bytes, 0),
                iusec: word(bytes, 8),
                vsec: word(bytes, 16),
                vusec: word(bytes, 24),
            }
        })
    }
}
