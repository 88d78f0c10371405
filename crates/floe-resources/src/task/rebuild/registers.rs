//! General registers of a thread.
//!
//! Saved:    general registers and segment bases. A thread that was interrupted in a system call is put
//!           in front of it, so that it makes the call again.
//! Rebuilt:  set by ptrace. Needs: nothing.
//! Not kept: what restarts a timed wait (`nanosleep` and the like answer EINTR).

use floe_image::messages::{CoreEntry, ThreadInfoX86, UserX86RegsEntry, UserX86RegsMode};
use floe_kernel::ptrace::Regs;

use super::TaskContext;
use crate::restore::PlanError;

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
