//! Alternate signal stacks (`sigaltstack(2)`).
//!
//! Saved:    address, size and flags, of each thread.
//! Rebuilt:  set by the thread. Needs: memory.
//! Not kept: nothing.

use floe_image::messages::ThreadSasEntry;
use floe_inject::{Arg, BufferId, Outcome, Program};

use super::word;

const SS_ONSTACK: u32 = 1;

/// The remote call that reads the stack of one thread.
pub struct AltStack(BufferId);

impl AltStack {
    /// Adds the call.
    pub fn ask(program: &mut Program) -> Self {
        let buffer = program.zeroed(24);
        program.call(
            "sigaltstack",
            libc::SYS_sigaltstack,
            &[Arg::from(0), Arg::from(buffer)],
        );
        AltStack(buffer)
    }

    /// The stack. `SS_ONSTACK` only says where the stack pointer is now, so it is left out.
    pub fn read(&self, outcome: &Outcome) -> ThreadSasEntry {
        let bytes = outcome.data(self.0);
        ThreadSasEntry {
            ss_sp: word(bytes, 0),
            ss_flags: word(bytes, 8) as u32 & !SS_ONSTACK,
            ss_size: word(bytes, 16),
        }
    }
}
