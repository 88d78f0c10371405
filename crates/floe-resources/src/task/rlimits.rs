//! Resource limits (`setrlimit(2)`).
//!
//! Saved:    soft and hard value of all 16, read by the task itself: that needs no capability.
//! Rebuilt:  set at the end, before credentials. Needs: memory and files.
//! Not kept: nothing.

use floe_image::messages::{RlimitEntry, TaskRlimitsEntry};
use floe_inject::{Arg, BufferId, Outcome, Program};

use super::word;

const LIMITS: u64 = 16;

/// Remote calls that read the limits.
pub struct ResourceLimits(Vec<BufferId>);

impl ResourceLimits {
    /// Adds the calls.
    pub fn ask(program: &mut Program) -> Self {
        let ask_one = |limit| {
            let buffer = program.zeroed(16);
            let args = [
                Arg::from(0),
                Arg::from(limit),
                Arg::from(0),
                Arg::from(buffer),
            ];
            program.call("prlimit64", libc::SYS_prlimit64, &args);
            buffer
        };
        ResourceLimits((0..LIMITS).map(ask_one).collect())
    }

    /// The limits in the order of `RLIMIT_*`; all bits set for none.
    pub fn read(&self, outcome: &Outcome) -> TaskRlimitsEntry {
        let entry = |buffer: &BufferId| {
            let bytes = outcome.data(*buffer);
            RlimitEntry {
                cur: word(bytes, 0),
                max: word(bytes, 8),
            }
        };
        TaskRlimitsEntry {
            rlimits: self.0.iter().map(entry).collect(),
        }
    }
}
