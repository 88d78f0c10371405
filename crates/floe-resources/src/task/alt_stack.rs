//! Alternate signal stacks (`sigaltstack(2)`).
//!
//! Saved:    address, size and flags, of each thread.
//! Rebuilt:  set by the thread. Needs: memory.
//! Not kept: nothing.

use floe_image::messages::{ThreadCoreEntry, ThreadSasEntry};
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

/// Sets the alternate stack. A leader inherits one, threads do not.
pub fn plan(thread: &ThreadCoreEntry, leader: bool, program: &mut Program) {
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
