//! Attributes that have a `prctl(2)` or small call of their own.
//!
//! Saved:    of a task: brk, dumpable, THP setting, child subreaper, membarrier registrations;
//!           of a thread: address cleared at its end, parent-death signal, securebits.
//! Rebuilt:  set by task and thread at the end, parent-death signal after credentials. Needs: memory.
//! Not kept: nothing.

use floe_inject::{Arg, BufferId, CallId, Outcome, Program};

/// `MEMBARRIER_CMD_GET_REGISTRATIONS` (Linux 6.3+).
const GET_REGISTRATIONS: i32 = 1 << 9;
const PR_GET_TID_ADDRESS: i32 = 40;

/// Remote calls about a whole task.
pub struct TaskAttributes {
    brk: CallId,
    dumpable: CallId,
    thp_disabled: CallId,
    subreaper: BufferId,
    membarrier: CallId,
}

/// The answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskAttributeValues {
    /// End of the heap.
    pub brk: u64,
    pub dumpable: i32,
    pub thp_disabled: bool,
    pub child_subreaper: bool,
    /// `MEMBARRIER_CMD_REGISTER_*` in force.
    pub membarrier: u32,
}

fn prctl(program: &mut Program, label: &'static str, option: i32, argument: Arg) -> CallId {
    program.call(label, libc::SYS_prctl, &[Arg::from(option), argument])
}

impl TaskAttributes {
    /// Adds the calls.
    pub fn ask(program: &mut Program) -> Self {
        let subreaper = program.zeroed(8);
        let zero = Arg::from(0);
        prctl(
            program,
            "prctl(PR_GET_CHILD_SUBREAPER)",
            libc::PR_GET_CHILD_SUBREAPER,
            subreaper.into(),
        );
        let barrier = [Arg::from(GET_REGISTRATIONS)];
        TaskAttributes {
            brk: program.call("brk", libc::SYS_brk, &[zero]),
            dumpable: prctl(
                program,
                "prctl(PR_GET_DUMPABLE)",
                libc::PR_GET_DUMPABLE,
                zero,
            ),
            thp_disabled: prctl(
                program,
                "prctl(PR_GET_THP_DISABLE)",
                libc::PR_GET_THP_DISABLE,
                zero,
            ),
            subreaper,
            membarrier: program.try_call("membarrier", libc::SYS_membarrier, &barrier),
        }
    }

    /// Reads the answers.
    pub fn read(&self, outcome: &Outcome) -> TaskAttributeValues {
        TaskAttributeValues {
            brk: outcome.result(self.brk).cast_unsigned(),
            dumpable: outcome.result(self.dumpable) as i32,
            thp_disabled: outcome.result(self.thp_disabled) != 0,
            child_subreaper: outcome.data(self.subreaper)[..4] != [0; 4],
            // Kernels without the command have no way to tell; their registrations are lost.
            membarrier: outcome.result(self.membarrier).max(0) as u32,
        }
    }
}

/// Remote calls about one thread.
pub struct ThreadAttributes {
    tid_address: BufferId,
    death_signal: BufferId,
    securebits: CallId,
}

/// The answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadAttributeValues {
    /// Cleared and woken when the thread ends (`set_tid_address(2)`).
    pub tid_address: u64,
    /// 0 for none.
    pub death_signal: u32,
    pub securebits: u32,
}

impl ThreadAttributes {
    /// Adds the calls.
    pub fn ask(program: &mut Program) -> Self {
        let (tid_address, death_signal) = (program.zeroed(8), program.zeroed(8));
        prctl(
            program,
            "prctl(PR_GET_TID_ADDRESS)",
            PR_GET_TID_ADDRESS,
            tid_address.into(),
        );
        prctl(
            program,
            "prctl(PR_GET_PDEATHSIG)",
            libc::PR_GET_PDEATHSIG,
            death_signal.into(),
        );
        let securebits = prctl(
            program,
            "prctl(PR_GET_SECUREBITS)",
            libc::PR_GET_SECUREBITS,
            Arg::from(0),
        );
        ThreadAttributes {
            tid_address,
            death_signal,
            securebits,
        }
    }

    /// Reads the answers.
    pub fn read(&self, outcome: &Outcome) -> ThreadAttributeValues {
        ThreadAttributeValues {
            tid_address: outcome.word(self.tid_address, 0),
            death_signal: outcome.word(self.death_signal, 0) as u32,
            securebits: super::small(outcome, self.securebits),
        }
    }
}
