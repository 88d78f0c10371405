//! Attributes that have a `prctl(2)` or small call of their own.
//!
//! Saved:    of a task: personality, dumpable, THP setting, child subreaper, membarrier registrations,
//!           loginuid, oom_score_adj; of a thread: name, robust futexes, address cleared at its end,
//!           parent-death signal.
//! Rebuilt:  set by task and thread, parent-death signal and dumpable after credentials. Needs: memory.
//! Not kept: dumpable 2, which no program can set: it becomes 0, which protects the same.

use std::fs;
use std::io;

use floe_image::messages::{CoreEntry, MmEntry, TaskCoreEntry, ThreadCoreEntry};
use floe_inject::{Arg, Program};
use floe_kernel::ids::HostPid;

use crate::restore::{Attempt, ExecuteError};

/// Longest name of a thread, without its end.
const MAX_COMM: usize = 15;

fn prctl(program: &mut Program, label: &'static str, option: i32, argument: impl Into<Arg>) {
    program.call(
        label,
        libc::SYS_prctl,
        &[Arg::from(option), argument.into()],
    );
}

/// THP setting, child subreaper and membarrier registrations.
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
    if task.child_subreaper == Some(true) {
        let label = "prctl(PR_SET_CHILD_SUBREAPER)";
        prctl(program, label, libc::PR_SET_CHILD_SUBREAPER, 1);
    }
    let registered = task.membarrier_registration_mask.unwrap_or(0);
    for bit in (0..u32::BITS).filter(|bit| registered & (1 << bit) != 0) {
        let label = format!("membarrier(command {:#x})", 1u32 << bit);
        program.call(label, libc::SYS_membarrier, &[Arg::from(1u32 << bit)]);
    }
}

/// The execution domain, where it is not the one that the thread was born with.
pub fn plan_personality(wanted: u32, born: u32, program: &mut Program) {
    if wanted != born {
        let label = format!("personality({wanted:#x})");
        program.call(label, libc::SYS_personality, &[Arg::from(wanted)]);
    }
}

/// The name of a thread.
pub fn plan_comm(comm: &str, program: &mut Program) {
    let mut name = comm.as_bytes()[..comm.len().min(MAX_COMM)].to_vec();
    name.push(0);
    let name = program.buffer(&name);
    prctl(program, "prctl(PR_SET_NAME)", libc::PR_SET_NAME, name);
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
pub fn plan_death_signal(thread: &ThreadCoreEntry, program: &mut Program) {
    let signal = thread.pdeath_sig.unwrap_or(0);
    let label = "prctl(PR_SET_PDEATHSIG)";
    prctl(program, label, libc::PR_SET_PDEATHSIG, signal);
}

/// Whether the process can be traced and leaves core files; images without the flag keep the default.
pub fn plan_dumpable(mm: Option<&MmEntry>, program: &mut Program) {
    let wanted = mm.and_then(|mm| mm.dumpable).unwrap_or(1);
    let label = "prctl(PR_SET_DUMPABLE)";
    prctl(
        program,
        label,
        libc::PR_SET_DUMPABLE,
        i32::from(wanted == 1),
    );
}

/// Sets what only `/proc` can set, from outside: login uid and how soon the OOM killer takes the task.
pub fn write_proc(pid: HostPid, task: &TaskCoreEntry) -> Result<(), ExecuteError> {
    if let Some(adjust) = task.oom_score_adj {
        write_if_other(pid, "oom_score_adj", &adjust.to_string())?;
    }
    if let Some(uid) = task.loginuid {
        write_if_other(pid, "loginuid", &uid.to_string())?;
    }
    Ok(())
}

fn write_if_other(pid: HostPid, name: &str, wanted: &str) -> Result<(), ExecuteError> {
    const UNSET: &str = "4294967295";
    let path = format!("/proc/{pid}/{name}");
    match fs::read_to_string(&path) {
        Ok(text) if text.trim() == wanted => return Ok(()),
        // A kernel without audit has no login uids, so each is unset.
        Err(error) if error.kind() == io::ErrorKind::NotFound && wanted == UNSET => return Ok(()),
        _ => {}
    }
    fs::write(&path, wanted).during("Writing", || format!("{wanted} to {path}"))
}
