//! General registers of a thread.
//!
//! Saved:    general registers and segment bases. A thread that was interrupted in a system call is put
//!           in front of it, so that it makes the call again.
//! Rebuilt:  set by ptrace. Needs: nothing.
//! Not kept: what restarts a wait with a time limit (`nanosleep` and the like answer EINTR).

use floe_image::messages::{
    CoreEntry, CoreEntryMarch, ThreadInfoX86, UserDescT, UserX86RegsEntry, UserX86RegsMode,
};
use floe_kernel::ids::{HostPid, TaskAddr};
use floe_kernel::ptrace::{self, Regs};
use floe_kernel::vm;

use super::fpu;
use super::rebuild::TaskContext;
use crate::collect::{CollectError, Obstacle};
use crate::restore::PlanError;

/// In-kernel results of interrupted calls (`include/linux/errno.h`).
const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;
/// Length of the `syscall` instruction.
const SYSCALL_LEN: u64 = 2;
/// `mov $NUMBER, %eax` in front of it, the longest form that compilers write.
const MOVE_LEN: u64 = 5;
const MOVE_TO_EAX: u8 = 0xb8;
/// The code segment of 64-bit programs.
const USER_CS: u64 = 0x33;
/// Slots for segments of `set_thread_area(2)`, which 64-bit programs do not use.
const TLS_SLOTS: u32 = 3;
const FIRST_TLS_ENTRY: u32 = 12;

/// The core of a thread with its registers; `tid_address` and all else is still to be filled in.
pub fn collect_registers(tid: HostPid, regs: &Regs) -> Result<CoreEntry, CollectError> {
    if regs.cs != USER_CS {
        let object = "a 32-bit program".to_string();
        let remedy = "only 64-bit programs are supported".to_string();
        return Err(CollectError::Unsupported(Obstacle {
            pid: tid,
            object,
            remedy,
        }));
    }
    let area = ptrace::xstate(tid).map_err(|source| CollectError::Task {
        pid: tid,
        action: "Reading the FPU state",
        source,
    })?;
    if fpu::holds_tiles(&area) {
        return Err(CollectError::Unsupported(Obstacle {
            pid: tid,
            object: "AMX tiles in use".to_string(),
            remedy: "try again when the thread has released them".to_string(),
        }));
    }
    let info = ThreadInfoX86 {
        clear_tid_addr: 0,
        gpregs: general_registers(regs, restarted_call(tid, regs)),
        fpregs: fpu::to_image(&area),
        tls: (0..TLS_SLOTS)
            .map(|slot| unused_segment(FIRST_TLS_ENTRY + slot))
            .collect(),
    };
    Ok(CoreEntry {
        mtype: CoreEntryMarch::X8664 as i32,
        thread_info: Some(info),
        ..CoreEntry::default()
    })
}

/// Registers with which a restored thread goes on, which waits in system call `call`.
fn general_registers(regs: &Regs, call: u64) -> UserX86RegsEntry {
    let (ax, ip) = restart(regs, call);
    UserX86RegsEntry {
        r15: regs.r15,
        r14: regs.r14,
        r13: regs.r13,
        r12: regs.r12,
        bp: regs.rbp,
        bx: regs.rbx,
        r11: regs.r11,
        r10: regs.r10,
        r9: regs.r9,
        r8: regs.r8,
        ax,
        cx: regs.rcx,
        dx: regs.rdx,
        si: regs.rsi,
        di: regs.rdi,
        orig_ax: regs.orig_rax,
        ip,
        cs: regs.cs,
        flags: regs.eflags,
        sp: regs.rsp,
        ss: regs.ss,
        fs_base: regs.fs_base,
        gs_base: regs.gs_base,
        ds: regs.ds,
        es: regs.es,
        fs: regs.fs,
        gs: regs.gs,
        mode: Some(UserX86RegsMode::Native as i32),
    }
}

/// The number of the call that a thread waits in. One that was interrupted before (by a round) waits in
/// `restart_syscall(2)`: then the program's own instruction tells, where it is the usual one.
fn restarted_call(tid: HostPid, regs: &Regs) -> u64 {
    if regs.orig_rax != libc::SYS_restart_syscall.cast_unsigned() {
        return regs.orig_rax;
    }
    let mut code = [0; MOVE_LEN as usize];
    let start = TaskAddr(regs.rip.wrapping_sub(SYSCALL_LEN + MOVE_LEN));
    match vm::read_exact(tid, start, &mut code) {
        Ok(()) if code[0] == MOVE_TO_EAX => {
            let number = code[1..].first_chunk().copied().unwrap_or_default();
            u64::from(u32::from_le_bytes(number))
        }
        _ => regs.orig_rax,
    }
}

/// `rax` and `rip` after what the kernel would have done on the way out of an interrupted call.
fn restart(regs: &Regs, call: u64) -> (u64, u64) {
    let in_call = regs.orig_rax.cast_signed() >= 0;
    match -regs.rax.cast_signed() {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND if in_call => {
            (regs.orig_rax, regs.rip - SYSCALL_LEN)
        }
        // Without a limit it is the same call again. Programs without a handler never see EINTR here, and
        // many take it for fatal.
        ERESTART_RESTARTBLOCK if in_call && waits_for_ever(regs, call) => {
            (call, regs.rip - SYSCALL_LEN)
        }
        ERESTART_RESTARTBLOCK if in_call => ((-i64::from(libc::EINTR)).cast_unsigned(), regs.rip),
        _ => (regs.rax, regs.rip),
    }
}

/// Whether the call is `poll(2)` with a negative number of milliseconds.
fn waits_for_ever(regs: &Regs, call: u64) -> bool {
    let limit = regs.rdx as u32;
    call == libc::SYS_poll.cast_unsigned() && limit.cast_signed() < 0
}

fn unused_segment(entry_number: u32) -> UserDescT {
    UserDescT {
        entry_number,
        read_exec_only: true,
        seg_not_present: true,
        ..UserDescT::default()
    }
}

/// The x86 part of a core, if the thread ran 64-bit code, which is all that we restore.
pub fn checked<'a>(
    core: &'a CoreEntry,
    context: &TaskContext<'_>,
) -> Result<&'a ThreadInfoX86, PlanError> {
    let info = core.thread_info.as_ref();
    let info = info.ok_or_else(|| context.damaged("it has no x86 registers"))?;
    let mode = info.gpregs.mode.unwrap_or(UserX86RegsMode::Native as i32);
    let segments = info.tls.iter().any(|segment| !segment.seg_not_present);
    if mode != UserX86RegsMode::Native as i32 || segments {
        return Err(context.unsupported("the 32-bit state", "only 64-bit programs are restored"));
    }
    Ok(info)
}

/// The registers with which a thread goes on.
pub fn from_image(entry: &UserX86RegsEntry) -> Regs {
    Regs {
        r15: entry.r15,
        r14: entry.r14,
        r13: entry.r13,
        r12: entry.r12,
        rbp: entry.bp,
        rbx: entry.bx,
        r11: entry.r11,
        r10: entry.r10,
        r9: entry.r9,
        r8: entry.r8,
        rax: entry.ax,
        rcx: entry.cx,
        rdx: entry.dx,
        rsi: entry.si,
        rdi: entry.di,
        // No call to restart: the dump has put the thread where it goes on.
        orig_rax: u64::MAX,
        rip: entry.ip,
        cs: entry.cs,
        eflags: entry.flags,
        rsp: entry.sp,
        ss: entry.ss,
        fs_base: entry.fs_base,
        gs_base: entry.gs_base,
        ds: entry.ds,
        es: entry.es,
        fs: entry.fs,
        gs: entry.gs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regs(orig: i64, ax: i64) -> Regs {
        Regs {
            r15: 0,
            r14: 0,
            r13: 0,
            r12: 0,
            rbp: 0,
            rbx: 0,
            r11: 0,
            r10: 0,
            r9: 0,
            r8: 0,
            rax: ax.cast_unsigned(),
            rcx: 0,
            rdx: 0,
            rsi: 0,
            rdi: 0,
            orig_rax: orig.cast_unsigned(),
            rip: 0x1000,
            cs: USER_CS,
            eflags: 0,
            rsp: 0,
            ss: 0,
            fs_base: 0,
            gs_base: 0,
            ds: 0,
            es: 0,
            fs: 0,
            gs: 0,
        }
    }

    #[test]
    fn interrupted_calls_are_made_again_and_others_left_alone() {
        for code in [ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND] {
            assert_eq!(restart(&regs(35, -code), 35), (35, 0xffe));
        }
        let interrupted = |orig, call, limit: i32| {
            let mut regs = regs(orig, -ERESTART_RESTARTBLOCK);
            regs.rdx = limit.cast_unsigned().into();
            restart(&regs, call)
        };
        let eintr = ((-4i64).cast_unsigned(), 0x1000);
        for (orig, call) in [(7, 7), (219, 7)] {
            assert_eq!(interrupted(orig, call, -1), (7, 0xffe));
            assert_eq!(interrupted(orig, call, 5000), eintr);
        }
        assert_eq!(interrupted(35, 35, -1), eintr);
        assert_eq!(interrupted(219, 219, -1), eintr);
        assert_eq!(restart(&regs(-1, -ERESTARTSYS), 7).1, 0x1000);
        assert_eq!(restart(&regs(0, 7), 0), (7, 0x1000));
    }
}
