//! Requests of `ptrace(2)` that read or change one stopped tracee.
//!
//! Contract relied on: a tracee is driven by the thread that seized it; every request but `seize` and
//! `interrupt` needs the tracee in ptrace-stop and answers `ESRCH` otherwise; the kernel reads and
//! writes only the structure that a request names.

use std::io;
use std::mem::{size_of, zeroed};

use crate::ids::HostPid;

pub use libc::user_regs_struct as Regs;

/// Requests and register sets that the libc crate lacks (`linux/ptrace.h`, `linux/elf.h`).
mod raw {
    pub const GET_RSEQ_CONFIGURATION: u32 = 0x420f;
    pub const SET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4210;
    pub const GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
    pub const SECCOMP_GET_FILTER: u32 = 0x420c;
    pub const SECCOMP_GET_METADATA: u32 = 0x420d;
    pub const NT_X86_XSTATE: usize = 0x202;
    /// Larger than any xsave area so far (AMX needs 11 KiB).
    pub const MAX_XSTATE: usize = 64 * 1024;
}

/// Options of [`seize`] and [`set_options`], as the kernel numbers them.
pub mod options {
    pub const TRACE_FORK: u32 = libc::PTRACE_O_TRACEFORK as u32;
    pub const TRACE_CLONE: u32 = libc::PTRACE_O_TRACECLONE as u32;
    pub const TRACE_SYSGOOD: u32 = libc::PTRACE_O_TRACESYSGOOD as u32;
    pub const EXIT_KILL: u32 = libc::PTRACE_O_EXITKILL as u32;
    pub const SUSPEND_SECCOMP: u32 = 1 << 21;
}

/// Which pending queue [`peek_siginfo`] reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignalQueue {
    /// Signals for this thread alone.
    Private,
    /// Signals for the whole process.
    Shared,
}

/// A siginfo as the kernel keeps it: 128 opaque bytes.
pub type RawSiginfo = [u8; 128];

/// What `waitpid` reported of a tracee.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitStatus {
    /// A signal is about to be delivered.
    Signal(i32),
    /// Entry to or exit from a system call (needs `TRACE_SYSGOOD`).
    Syscall,
    /// A `PTRACE_EVENT_*` stop; `signal` is `SIGTRAP`, or the stopping signal of a group-stop.
    Event { event: i32, signal: i32 },
    /// The task exited with this code.
    Exited(i32),
    /// The task was killed by this signal.
    Killed(i32),
}

/// `PTRACE_EVENT_STOP`: the stop after `interrupt`, of a new child, or a group-stop.
pub const EVENT_STOP: i32 = 128;

/// The restartable-sequence registration of a thread (`PTRACE_GET_RSEQ_CONFIGURATION`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RseqConfiguration {
    pub rseq_abi_pointer: u64,
    pub rseq_abi_size: u32,
    pub signature: u32,
    pub flags: u32,
    pub pad: u32,
}

/// Syscall user dispatch of a thread (`PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyscallUserDispatch {
    pub mode: u64,
    pub selector: u64,
    pub offset: u64,
    pub len: u64,
}

fn request(request: u32, pid: HostPid, addr: usize, data: usize) -> io::Result<i64> {
    // SAFETY: callers pass in `addr` and `data` only what the request documents: integers, or
    // pointers to live structures of the request's own type and size.
    let result = unsafe { libc::syscall(libc::SYS_ptrace, request as usize, pid.0, addr, data) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Becomes the tracer of a running task without stopping it.
pub fn seize(pid: HostPid, options: u32) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, pid, 0, options as usize).map(drop)
}

/// Replaces the options given at `seize`.
pub fn set_options(pid: HostPid, options: u32) -> io::Result<()> {
    request(libc::PTRACE_SETOPTIONS, pid, 0, options as usize).map(drop)
}

/// Asks a running tracee to stop; `wait` then reports `EVENT_STOP`.
pub fn interrupt(pid: HostPid) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, pid, 0, 0).map(drop)
}

/// Lets a stopped tracee run; a non-zero `signal` is delivered to it.
pub fn cont(pid: HostPid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, pid, 0, signal as usize).map(drop)
}

/// Lets a stopped tracee run until the next entry to or exit from a system call.
pub fn cont_to_syscall(pid: HostPid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, pid, 0, signal as usize).map(drop)
}

/// Gives up a stopped tracee; it runs on, or stays stopped when its group is.
pub fn detach(pid: HostPid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, pid, 0, signal as usize).map(drop)
}

/// The message of the last event: the new task's id after fork and clone.
pub fn event_message(pid: HostPid) -> io::Result<u64> {
    let mut message: libc::c_ulong = 0;
    request(libc::PTRACE_GETEVENTMSG, pid, 0, &raw mut message as usize)?;
    Ok(message)
}

/// General registers.
pub fn regs(pid: HostPid) -> io::Result<Regs> {
    // SAFETY: `user_regs_struct` is plain integers, for which zero is a value.
    let mut regs: Regs = unsafe { zeroed() };
    request(libc::PTRACE_GETREGS, pid, 0, &raw mut regs as usize)?;
    Ok(regs)
}

/// Replaces the general registers.
pub fn set_regs(pid: HostPid, regs: &Regs) -> io::Result<()> {
    request(libc::PTRACE_SETREGS, pid, 0, &raw const *regs as usize).map(drop)
}

/// The xsave area in the kernel's standard format, as long as this CPU's features make it.
pub fn xstate(pid: HostPid) -> io::Result<Vec<u8>> {
    let mut area = vec![0u8; raw::MAX_XSTATE];
    let mut iov = libc::iovec {
        iov_base: area.as_mut_ptr().cast(),
        iov_len: area.len(),
    };
    request(
        libc::PTRACE_GETREGSET,
        pid,
        raw::NT_X86_XSTATE,
        &raw mut iov as usize,
    )?;
    area.truncate(iov.iov_len);
    Ok(area)
}

/// Replaces the xsave area; its length must be what [`xstate`] gave on this machine.
pub fn set_xstate(pid: HostPid, area: &[u8]) -> io::Result<()> {
    let mut iov = libc::iovec {
        iov_base: area.as_ptr().cast_mut().cast(),
        iov_len: area.len(),
    };
    request(
        libc::PTRACE_SETREGSET,
        pid,
        raw::NT_X86_XSTATE,
        &raw mut iov as usize,
    )
    .map(drop)
}

/// The mask of blocked signals, bit 0 for signal 1.
pub fn sigmask(pid: HostPid) -> io::Result<u64> {
    let mut mask = 0u64;
    request(
        libc::PTRACE_GETSIGMASK,
        pid,
        size_of::<u64>(),
        &raw mut mask as usize,
    )?;
    Ok(mask)
}

/// Replaces the mask of blocked signals.
pub fn set_sigmask(pid: HostPid, mask: u64) -> io::Result<()> {
    request(
        libc::PTRACE_SETSIGMASK,
        pid,
        size_of::<u64>(),
        &raw const mask as usize,
    )
    .map(drop)
}

/// The siginfo of the signal that stopped the tracee.
pub fn siginfo(pid: HostPid) -> io::Result<RawSiginfo> {
    let mut info = [0u8; 128];
    request(libc::PTRACE_GETSIGINFO, pid, 0, info.as_mut_ptr() as usize)?;
    Ok(info)
}

/// Every signal in one pending queue, oldest first, without removing it.
pub fn peek_siginfo(pid: HostPid, queue: SignalQueue) -> io::Result<Vec<RawSiginfo>> {
    const BATCH: usize = 32;
    let mut all: Vec<RawSiginfo> = Vec::new();
    loop {
        let mut batch = [[0u8; 128]; BATCH];
        let mut args = libc::ptrace_peeksiginfo_args {
            off: all.len() as u64,
            flags: if queue == SignalQueue::Shared {
                libc::PTRACE_PEEKSIGINFO_SHARED
            } else {
                0
            },
            nr: BATCH as i32,
        };
        let count = request(
            libc::PTRACE_PEEKSIGINFO,
            pid,
            &raw mut args as usize,
            batch.as_mut_ptr() as usize,
        )? as usize;
        all.extend_from_slice(&batch[..count]);
        if count < BATCH {
            return Ok(all);
        }
    }
}

/// The restartable-sequence registration; a zero pointer means none.
pub fn rseq_configuration(pid: HostPid) -> io::Result<RseqConfiguration> {
    let mut conf = RseqConfiguration::default();
    request(
        raw::GET_RSEQ_CONFIGURATION,
        pid,
        size_of::<RseqConfiguration>(),
        &raw mut conf as usize,
    )?;
    Ok(conf)
}

/// Syscall user dispatch of a thread.
pub fn syscall_user_dispatch(pid: HostPid) -> io::Result<SyscallUserDispatch> {
    let mut conf = SyscallUserDispatch::default();
    request(
        raw::GET_SYSCALL_USER_DISPATCH_CONFIG,
        pid,
        size_of::<SyscallUserDispatch>(),
        &raw mut conf as usize,
    )?;
    Ok(conf)
}

/// Sets syscall user dispatch of a thread.
pub fn set_syscall_user_dispatch(pid: HostPid, conf: &SyscallUserDispatch) -> io::Result<()> {
    request(
        raw::SET_SYSCALL_USER_DISPATCH_CONFIG,
        pid,
        size_of::<SyscallUserDispatch>(),
        &raw const *conf as usize,
    )
    .map(drop)
}

/// The instructions (`sock_filter`, 8 bytes each) of the seccomp filter at `index`, oldest first;
/// `None` past the newest.
pub fn seccomp_filter(pid: HostPid, index: u64) -> io::Result<Option<Vec<u8>>> {
    let count = match request(raw::SECCOMP_GET_FILTER, pid, index as usize, 0) {
        Ok(count) => count as usize,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut program = vec![0u8; count * 8];
    request(
        raw::SECCOMP_GET_FILTER,
        pid,
        index as usize,
        program.as_mut_ptr() as usize,
    )?;
    Ok(Some(program))
}

/// The `SECCOMP_FILTER_FLAG_*` of the filter at `index`.
pub fn seccomp_filter_flags(pid: HostPid, index: u64) -> io::Result<u64> {
    let mut metadata = [index, 0u64];
    request(
        raw::SECCOMP_GET_METADATA,
        pid,
        size_of::<[u64; 2]>(),
        metadata.as_mut_ptr() as usize,
    )?;
    Ok(metadata[1])
}

/// Waits until this tracee (or child) changes state; `Ok(None)` only with `WNOHANG` in `flags`.
pub fn wait(pid: HostPid, flags: i32) -> io::Result<Option<(HostPid, WaitStatus)>> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a live integer that waitpid writes.
        let found = unsafe { libc::waitpid(pid.0, &raw mut status, libc::__WALL | flags) };
        if found > 0 {
            return Ok(Some((HostPid(found), decode_status(status))));
        }
        if found == 0 {
            return Ok(None);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn decode_status(status: i32) -> WaitStatus {
    if libc::WIFEXITED(status) {
        return WaitStatus::Exited(libc::WEXITSTATUS(status));
    }
    if libc::WIFSIGNALED(status) {
        return WaitStatus::Killed(libc::WTERMSIG(status));
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        0 if signal == libc::SIGTRAP | 0x80 => WaitStatus::Syscall,
        0 => WaitStatus::Signal(signal),
        event => WaitStatus::Event { event, signal },
    }
}
