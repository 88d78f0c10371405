//! Attributes that have a `prctl(2)` or small call of their own.
//!
//! Saved:    of a task: brk, personality, dumpable, THP setting, child subreaper, membarrier registrations,
//!           loginuid, oom_score_adj; of a thread: name, robust futexes, address cleared at its end,
//!           parent-death signal, securebits.
//! Rebuilt:  set by task and thread, parent-death signal and dumpable after credentials. Needs: memory.
//! Not kept: dumpable 2, which no program can set: it becomes 0, which protects the same;
//!           `READ_IMPLIES_EXEC` in threads other than the leader.

use std::fs;
use std::os::fd::AsRawFd;

use floe_image::messages::{CoreEntry, MmEntry, TaskCoreEntry, ThreadCoreEntry};
use floe_inject::{Arg, BufferId, CallId, Outcome, Program};
use floe_kernel::ids::HostPid;

use super::rebuild::TaskContext;
use crate::namespace::OwnerMap;
use crate::restore::{Attempt, ExecuteError, World};

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

/// Longest name of a thread, without its end.
const MAX_COMM: usize = 15;

/// THP setting and membarrier registrations.
pub fn plan_early(task: &TaskCoreEntry, mm: Option<&MmEntry>, program: &mut Program) {
    let disabled = mm.and_then(|mm| mm.thp_disabled).unwrap_or(false);
    let label = "prctl(PR_SET_THP_DISABLE)";
    // A program does not notice this setting: without support for it, restore goes on.
    let args = [libc::PR_SET_THP_DISABLE, i32::from(disabled)].map(Arg::from);
    if disabled {
        program.call(label, libc::SYS_prctl, &args);
    } else {
        program.try_call(label, libc::SYS_prctl, &args);
    }
    let registered = task.membarrier_registration_mask.unwrap_or(0);
    for bit in (0..u32::BITS).filter(|bit| registered & (1 << bit) != 0) {
        let label = format!("membarrier(command {:#x})", 1u32 << bit);
        program.call(label, libc::SYS_membarrier, &[Arg::from(1u32 << bit)]);
    }
}

/// CRIU reads the kernel's hexadecimal text as decimal and never restores it. We do, so what has digits
/// above 9 is kept as it is, marked by the top bit.
pub fn encode_personality(value: u64) -> u32 {
    format!("{value:x}").parse().unwrap_or(value as u32 | PLAIN)
}

fn decode_personality(image: u32) -> u32 {
    match image & PLAIN != 0 {
        true => image & !PLAIN,
        false => u32::from_str_radix(&image.to_string(), 16).unwrap_or(0),
    }
}

/// Marks a personality in an image that is a number and not digits.
const PLAIN: u32 = 1 << 31;
/// Bit of a personality: readable memory is executable, which memory still to be mapped would become.
const READ_IMPLIES_EXEC: u32 = 0x0040_0000;

/// The execution domain, in force for threads that are still to be made.
pub fn plan_personality(task: &TaskCoreEntry, program: &mut Program) {
    call_personality(
        decode_personality(task.personality) & !READ_IMPLIES_EXEC,
        program,
    );
}

/// What of the execution domain must wait for memory, in the leader.
pub fn plan_late_personality(task: &TaskCoreEntry, program: &mut Program) {
    let personality = decode_personality(task.personality);
    if personality & READ_IMPLIES_EXEC != 0 {
        call_personality(personality, program);
    }
}

fn call_personality(personality: u32, program: &mut Program) {
    let label = format!("personality({personality:#x})");
    program.call(label, libc::SYS_personality, &[Arg::from(personality)]);
}

/// The name of a thread.
pub fn plan_comm(comm: &str, program: &mut Program) {
    let mut name = comm.as_bytes()[..comm.len().min(MAX_COMM)].to_vec();
    name.push(0);
    let name = program.buffer(&name);
    prctl(
        program,
        "prctl(PR_SET_NAME)",
        libc::PR_SET_NAME,
        Arg::from(name),
    );
}

/// Addresses that the kernel writes to when the thread ends.
pub fn plan_addresses(core: &CoreEntry, program: &mut Program) {
    if let Some(thread) = core.thread_core.as_ref().filter(|it| it.futex_rla != 0) {
        let args = [Arg::from(thread.futex_rla), Arg::from(thread.futex_rla_len)];
        program.call("set_robust_list", libc::SYS_set_robust_list, &args);
    }
    let info = core.thread_info.as_ref();
    if let Some(info) = info.filter(|info| info.clear_tid_addr != 0) {
        let args = [Arg::from(info.clear_tid_addr)];
        program.call("set_tid_address", libc::SYS_set_tid_address, &args);
    }
}

/// The signal at the death of the parent; it also replaces the one that the first puppet is made with.
/// Where the parent is about to end by plan, it would come at once and mean nothing.
pub fn plan_death_signal(
    thread: &ThreadCoreEntry,
    context: &TaskContext<'_>,
    program: &mut Program,
) {
    let mut signal = thread.pdeath_sig.unwrap_or(0);
    if signal != 0 && context.loses_parent {
        tracing::warn!(
            "task {} does not get signal {signal} at its parent's death any more: that parent would be this program, \
             which ends now. Restore without --restore-detached, or with --restore-sibling, to have it kept",
            context.tid
        );
        signal = 0;
    }
    let label = "prctl(PR_SET_PDEATHSIG)";
    prctl(program, label, libc::PR_SET_PDEATHSIG, Arg::from(signal));
}

/// Whether the process adopts orphans among its descendants; the restore may have used it for that.
pub fn plan_subreaper(task: &TaskCoreEntry, program: &mut Program) {
    let wanted = Arg::from(u32::from(task.child_subreaper == Some(true)));
    let label = "prctl(PR_SET_CHILD_SUBREAPER)";
    prctl(program, label, libc::PR_SET_CHILD_SUBREAPER, wanted);
}

/// Whether the process can be traced and leaves core files; images without the flag keep the default.
pub fn plan_dumpable(mm: Option<&MmEntry>, program: &mut Program) {
    let wanted = mm.and_then(|mm| mm.dumpable).unwrap_or(1);
    let label = "prctl(PR_SET_DUMPABLE)";
    prctl(
        program,
        label,
        libc::PR_SET_DUMPABLE,
        Arg::from(i32::from(wanted == 1)),
    );
}

/// The login uid that a task must be given, as we see it: audit records of the task bear it, and children
/// inherit it, so where it is as in this process, it is right already.
pub fn loginuid(core: &CoreEntry, born: Option<u32>, owners: &OwnerMap) -> Option<u32> {
    let wanted = core.tc.as_ref()?.loginuid?;
    let wanted = match wanted {
        u32::MAX => wanted,
        uid => owners.uid_outside(uid),
    };
    // A kernel without audit has no login uids, so each is unset.
    (Some(wanted) != born && (born.is_some() || wanted != u32::MAX)).then_some(wanted)
}

/// Gives a task its login uid. Only the task itself may write it, through a file that we open: in a user
/// namespace its own is root's outside.
pub fn write_loginuid(world: &mut World<'_>, pid: u32, wanted: u32) -> Result<(), ExecuteError> {
    let path = format!("/proc/{}/loginuid", world.puppet(pid)?.pid());
    let file = fs::File::options().write(true).open(&path);
    let file = file.during("Opening", || path)?;
    let fd = world.hand_over(pid, file.as_raw_fd())?;
    let mut program = Program::new();
    let digits = wanted.to_string();
    let text = program.buffer(digits.as_bytes());
    let args = [fd.into(), text.into(), digits.len().into()];
    let label = format!("write of {wanted} to its loginuid");
    program.call(label, libc::SYS_write, &args);
    program.call("close of its loginuid", libc::SYS_close, &[fd.into()]);
    world.run(pid, &program).map(drop)
}

/// Sets from outside how soon the OOM killer takes the task.
pub fn write_proc(pid: HostPid, task: &TaskCoreEntry) -> Result<(), ExecuteError> {
    let Some(adjust) = task.oom_score_adj else {
        return Ok(());
    };
    let path = format!("/proc/{pid}/oom_score_adj");
    let wanted = adjust.to_string();
    if fs::read_to_string(&path).is_ok_and(|text| text.trim() == wanted) {
        return Ok(());
    }
    fs::write(&path, &wanted).during("Writing", || format!("{wanted} to {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn personalities_survive_the_format() {
        for value in [0, 8, 0x40000, 0x440000, 0xc0_0000, 0x4c0_0008, 0x9999_9999] {
            assert_eq!(
                u64::from(decode_personality(encode_personality(value))),
                value
            );
        }
        // As CRIU writes it.
        assert_eq!(encode_personality(0x40000), 40000);
        assert_eq!(encode_personality(0xc4_0000), 0x80c4_0000);
    }
}
