//! The executor and the system call convention of x86-64.
//!
//! Contract relied on: `syscall` clobbers rax, rcx and r11 only; the executor touches no stack, no
//! vector or x87 register, and no memory but its own entries, so restoring the general registers
//! restores the task.

use std::arch::{asm, global_asm};

use floe_kernel::ptrace::Regs;

use crate::program::{CHECK_OFFSET, ENTRY_SIZE, INDIRECT_OFFSET, RESULT_OFFSET};

/// One past the highest address that a 4-level task can map.
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// The `syscall` instruction.
pub const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];

// Registers: rbx current entry, r12 end of the entries, rbp the signal that reports the end.
//
// At the end the task sends itself that signal: its tracer sees a signal-delivery-stop and drops it.
// With the tracer gone the signal is one that the task ignores, and the task waits in pause(2) until
// the guardian repairs it. A trap instruction would kill it then, and it would reset SIGTRAP's action.
global_asm!(
    ".pushsection .rodata.floe_executor, \"a\"",
    // The code that refers to them may be in another object file.
    ".globl floe_executor_start, floe_executor_idle, floe_executor_end",
    ".hidden floe_executor_start, floe_executor_idle, floe_executor_end",
    "floe_executor_start:",
    "2:  cmp rbx, r12",
    "    jae 9f",
    "    mov r13, [rbx + {indirect}]",
    "    mov rdi, [rbx + 8]",
    "    test r13b, 1",
    "    jz 3f",
    "    mov rdi, [rdi]",
    "3:  mov rsi, [rbx + 16]",
    "    test r13b, 2",
    "    jz 3f",
    "    mov rsi, [rsi]",
    "3:  mov rdx, [rbx + 24]",
    "    test r13b, 4",
    "    jz 3f",
    "    mov rdx, [rdx]",
    "3:  mov r10, [rbx + 32]",
    "    test r13b, 8",
    "    jz 3f",
    "    mov r10, [r10]",
    "3:  mov r8, [rbx + 40]",
    "    test r13b, 16",
    "    jz 3f",
    "    mov r8, [r8]",
    "3:  mov r9, [rbx + 48]",
    "    test r13b, 32",
    "    jz 3f",
    "    mov r9, [r9]",
    "3:  mov rax, [rbx]",
    "    syscall",
    "    mov [rbx + {result}], rax",
    "    cmp qword ptr [rbx + {check}], 0",
    "    je 4f",
    "    cmp rax, -4095",
    "    jae 9f",
    "4:  add rbx, {size}",
    "    jmp 2b",
    "9:  mov eax, 39", // getpid
    "    syscall",
    "    mov r14, rax",
    "    mov eax, 186", // gettid
    "    syscall",
    "    mov rdi, r14",
    "    mov rsi, rax",
    "    mov rdx, rbp",
    "    mov eax, 234", // tgkill
    "    syscall",
    "floe_executor_idle:",
    "    mov eax, 34", // pause
    "    syscall",
    "    jmp floe_executor_idle",
    "floe_executor_end:",
    ".popsection",
    indirect = const INDIRECT_OFFSET,
    result = const RESULT_OFFSET,
    check = const CHECK_OFFSET,
    size = const ENTRY_SIZE,
);

unsafe extern "C" {
    static floe_executor_start: u8;
    static floe_executor_idle: u8;
    static floe_executor_end: u8;
}

/// The executor's machine code: position independent, to be copied to the start of an arena.
pub fn executor_code() -> &'static [u8] {
    let start = &raw const floe_executor_start;
    let end = &raw const floe_executor_end;
    // SAFETY: both labels are in the one read-only section emitted above, start before end.
    unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
}

/// Offset in the executor of the loop in which a finished task waits.
pub fn idle_offset() -> u64 {
    (&raw const floe_executor_idle).addr() as u64 - (&raw const floe_executor_start).addr() as u64
}

/// Bytes from there to behind the call in which it waits: a `mov` and the `syscall`.
pub const IDLE_CALL: u64 = 7;

/// Offset in the executor of a `syscall` instruction that is followed by code of the executor.
pub fn gate_offset() -> u64 {
    let code = executor_code();
    let at = code.windows(2).position(|pair| pair == SYSCALL_INSTRUCTION);
    at.expect("the executor makes system calls") as u64
}

/// Points a stopped task at the executor of the arena at `code`.
pub fn aim_at_program(regs: &mut Regs, code: u64, entries: std::ops::Range<u64>, signal: i32) {
    regs.rip = code;
    regs.rbx = entries.start;
    regs.r12 = entries.end;
    regs.rbp = signal as u64;
    forget_interrupted_call(regs);
}

/// Points a stopped task at one system call made by the instruction at `gate`.
pub fn aim_at_call(regs: &mut Regs, gate: u64, number: i64, args: [u64; 6]) {
    regs.rip = gate;
    regs.rax = number as u64;
    [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
    forget_interrupted_call(regs);
}

/// Without this the kernel would restart the call in which the task was stopped, at our address.
fn forget_interrupted_call(regs: &mut Regs) {
    regs.orig_rax = u64::MAX;
}

/// The result of the system call from which the task has just returned.
pub fn call_result(regs: &Regs) -> i64 {
    regs.rax as i64
}

/// The instruction pointer.
pub fn instruction_pointer(regs: &Regs) -> u64 {
    regs.rip
}

/// The address of the entry at which the executor stopped.
pub fn current_entry(regs: &Regs) -> u64 {
    regs.rbx
}

/// `clone3(2)` whose child goes straight into the executor at `code` and never returns here.
///
/// Returns the child's pid, or a negative errno.
///
/// # Safety
/// `code` must be the executor, `entries` its program, all mapped in this process; the clone must
/// not share this process's memory (`CLONE_VM`).
pub unsafe fn clone3_into_executor(
    args: &libc::clone_args,
    code: u64,
    entries: std::ops::Range<u64>,
    signal: i32,
) -> i64 {
    let result: i64;
    // SAFETY: the parent's side is a plain system call. The child's side jumps away at once with the
    // registers that the executor needs, on a copy of this memory, and uses no stack.
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov rbx, r14",
            "mov rbp, r15",
            "jmp r13",
            "2:",
            "pop rbp",
            "pop rbx",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") &raw const *args,
            in("rsi") size_of::<libc::clone_args>(),
            in("r12") entries.end,
            in("r13") code,
            in("r14") entries.start,
            in("r15") i64::from(signal),
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}
