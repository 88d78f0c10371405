//! Probes of tasks, ptrace and prctl.
//!
//! Kernel contract: each request fails with EINVAL, ENOSYS, EIO or ENOTTY where it is unknown.

use std::fs;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::ProbeContext;

pub(super) fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// CAP_SYS_ADMIN is bit 21, CAP_CHECKPOINT_RESTORE bit 40 of the effective set.
pub(super) fn checkpoint_restore_cap(_: &ProbeContext) -> bool {
    let Ok(status) = fs::read_to_string("/proc/self/status") else {
        return false;
    };
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    effective & ((1 << 21) | (1 << 40)) != 0
}

/// Asks for a pid that is taken (our own): EEXIST comes only after the request was understood,
/// and EPERM means that it was, but is not allowed to us.
pub(super) fn clone3_set_tid(_: &ProbeContext) -> bool {
    let taken = [std::process::id() as libc::pid_t];
    // SAFETY: an all-zero clone_args is valid: no flags, no stack, no signal.
    let mut args: libc::clone_args = unsafe { mem::zeroed() };
    args.exit_signal = libc::SIGCHLD as u64;
    args.set_tid = taken.as_ptr() as u64;
    args.set_tid_size = 1;
    // SAFETY: `args` and the array it points at outlive the call. Our own pid is in use, so no
    // child can come of it; if one did, it would be a plain fork and leaves at once below.
    let result =
        unsafe { libc::syscall(libc::SYS_clone3, &raw const args, mem::size_of_val(&args)) };
    if result == 0 {
        // SAFETY: ends the impossible child without running anything of the parent's.
        unsafe { libc::_exit(0) };
    }
    result < 0 && matches!(errno(), libc::EEXIST | libc::EPERM)
}

fn own_pidfd() -> Option<OwnedFd> {
    // SAFETY: no pointers; a good result is a descriptor that nobody else owns.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
    // SAFETY: checked to be a new descriptor.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

pub(super) fn pidfd_open(_: &ProbeContext) -> bool {
    own_pidfd().is_some()
}

pub(super) fn pidfd_getfd(_: &ProbeContext) -> bool {
    let Some(pidfd) = own_pidfd() else {
        return false;
    };
    // SAFETY: no pointers; a good result is a new descriptor.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_pidfd_getfd,
            pidfd.as_raw_fd(),
            pidfd.as_raw_fd(),
            0,
        )
    };
    if fd >= 0 {
        // SAFETY: checked to be a new descriptor; taken over to be closed.
        drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    }
    fd >= 0
}

pub(super) fn pidfs(_: &ProbeContext) -> bool {
    const PID_FS_MAGIC: u64 = 0x5049_4446;
    own_pidfd().is_some_and(|fd| {
        rustix::fs::fstatfs(&fd).is_ok_and(|stat| stat.f_type as u64 == PID_FS_MAGIC)
    })
}

/// Compares our own descriptor tables: equal is 0.
pub(super) fn kcmp(_: &ProbeContext) -> bool {
    const KCMP_FILES: libc::c_long = 2;
    // SAFETY: no pointers for this kind of comparison.
    unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            libc::getpid(),
            libc::getpid(),
            KCMP_FILES,
            0,
            0,
        ) == 0
    }
}

/// An unknown kind is EINVAL; a known one dereferences the slot and says EFAULT.
pub(super) fn kcmp_epoll(_: &ProbeContext) -> bool {
    const KCMP_EPOLL_TFD: libc::c_long = 7;
    // SAFETY: the slot pointer is null, which the kernel refuses to read.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            libc::getpid(),
            libc::getpid(),
            KCMP_EPOLL_TFD,
            0,
            0,
        )
    };
    result < 0 && matches!(errno(), libc::EFAULT | libc::EBADF)
}

pub(super) fn ns_pid(_: &ProbeContext) -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| status.contains("\nNSpid:"))
}

pub(super) fn ptrace_peek_siginfo(context: &ProbeContext) -> bool {
    const PTRACE_PEEKSIGINFO: libc::c_long = 0x4209;
    #[repr(C)]
    struct Args {
        offset: u64,
        flags: u32,
        count: i32,
    }
    let args = Args {
        offset: 0,
        flags: 0,
        count: 1,
    };
    // SAFETY: siginfo_t is plain old data, zero is a valid value of it.
    let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
    let (args, info) = (&raw const args as usize, &raw mut info as usize);
    context
        .tracee()
        .is_some_and(|tracee| tracee.request(PTRACE_PEEKSIGINFO, args, info).is_ok())
}

/// The kernel wants to know the size of the structure and returns its own.
pub(super) fn ptrace_rseq_config(context: &ProbeContext) -> bool {
    const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_long = 0x420f;
    let mut config = [0u64; 3];
    let size = mem::size_of_val(&config);
    let pointer = config.as_mut_ptr() as usize;
    context.tracee().is_some_and(|tracee| {
        tracee
            .request(PTRACE_GET_RSEQ_CONFIGURATION, size, pointer)
            .is_ok()
    })
}

pub(super) fn ptrace_suspend_seccomp(context: &ProbeContext) -> bool {
    const PTRACE_O_SUSPEND_SECCOMP: usize = 1 << 21;
    let options = PTRACE_O_SUSPEND_SECCOMP | libc::PTRACE_O_EXITKILL as usize;
    let set = libc::PTRACE_SETOPTIONS as libc::c_long;
    context
        .tracee()
        .is_some_and(|tracee| tracee.request(set, 0, options).is_ok())
}

/// The child has one filter of one instruction.
pub(super) fn ptrace_seccomp_filters(context: &ProbeContext) -> bool {
    const PTRACE_SECCOMP_GET_FILTER: libc::c_long = 0x420c;
    context.tracee().is_some_and(|tracee| {
        tracee
            .request(PTRACE_SECCOMP_GET_FILTER, 0, 0)
            .is_ok_and(|len| len == 1)
    })
}

pub(super) fn ptrace_syscall_dispatch(context: &ProbeContext) -> bool {
    const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_long = 0x4211;
    let mut config = [0u64; 4];
    let size = mem::size_of_val(&config);
    let pointer = config.as_mut_ptr() as usize;
    context.tracee().is_some_and(|tracee| {
        tracee
            .request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, size, pointer)
            .is_ok()
    })
}

/// The xsave area on x86, the vector state elsewhere; at most 16 KiB today (with AMX).
pub(super) fn ptrace_xstate(context: &ProbeContext) -> bool {
    #[cfg(target_arch = "x86_64")]
    const REGSET: usize = 0x202; // NT_X86_XSTATE
    #[cfg(not(target_arch = "x86_64"))]
    const REGSET: usize = 2; // NT_PRFPREG
    let mut area = vec![0u8; 16 * 1024];
    let mut iov = libc::iovec {
        iov_base: area.as_mut_ptr().cast(),
        iov_len: area.len(),
    };
    let pointer = &raw mut iov as usize;
    let get = libc::PTRACE_GETREGSET as libc::c_long;
    context
        .tracee()
        .is_some_and(|tracee| tracee.request(get, REGSET, pointer).is_ok())
}

pub(super) fn membarrier_registrations(_: &ProbeContext) -> bool {
    const MEMBARRIER_CMD_GET_REGISTRATIONS: libc::c_long = 1 << 9;
    // SAFETY: no pointers.
    unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0) >= 0 }
}

pub(super) fn timer_restore_ids(_: &ProbeContext) -> bool {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    const GET: libc::c_ulong = 2;
    // SAFETY: no pointers; the call only reads a flag of ours.
    unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, 0, 0, 0) >= 0 }
}

pub(super) fn shadow_stack(_: &ProbeContext) -> bool {
    const ARCH_SHSTK_STATUS: libc::c_long = 0x5005;
    let mut status = 0u64;
    arch_prctl(ARCH_SHSTK_STATUS, &raw mut status as usize).is_ok()
}

pub(super) fn time_namespace(_: &ProbeContext) -> bool {
    fs::exists("/proc/self/ns/time_for_children").unwrap_or(false)
}

/// PR_SET_MM_MAP_SIZE writes the size of the structure and changes nothing.
pub(super) fn prctl_mm_map(_: &ProbeContext) -> bool {
    const PR_SET_MM_MAP_SIZE: libc::c_ulong = 15;
    let mut size = 0u32;
    // SAFETY: the kernel writes one u32 into `size`, which is live.
    unsafe {
        libc::prctl(libc::PR_SET_MM, PR_SET_MM_MAP_SIZE, &raw mut size, 0, 0) == 0 && size > 0
    }
}

fn arch_prctl(code: libc::c_long, argument: usize) -> io::Result<()> {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: the codes used here write at most one u64 at `argument` or map nothing, since
        // the process has its vDSO already.
        let result = unsafe { libc::syscall(libc::SYS_arch_prctl, code, argument) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (code, argument);
        Err(io::Error::from_raw_os_error(libc::EINVAL))
    }
}

/// A process that has its vDSO is told EEXIST; an unknown code is EINVAL.
pub(super) fn map_vdso(_: &ProbeContext) -> bool {
    const ARCH_MAP_VDSO_64: libc::c_long = 0x2003;
    arch_prctl(ARCH_MAP_VDSO_64, 0).is_err_and(|error| error.raw_os_error() == Some(libc::EEXIST))
}

pub(super) fn map_vdso_32(_: &ProbeContext) -> bool {
    const ARCH_MAP_VDSO_32: libc::c_long = 0x2002;
    arch_prctl(ARCH_MAP_VDSO_32, 0).is_err_and(|error| error.raw_os_error() == Some(libc::EEXIST))
}

/// Sets and clears the first debug register of the child.
pub(super) fn breakpoints(context: &ProbeContext) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let register = |n: usize| mem::offset_of!(libc::user, u_debugreg) + 8 * n;
        let poke = libc::PTRACE_POKEUSER as libc::c_long;
        context.tracee().is_some_and(|tracee| {
            let set = tracee.request(poke, register(0), 0x1000).is_ok()
                && tracee.request(poke, register(7), 1).is_ok();
            let cleared = tracee.request(poke, register(7), 0).is_ok();
            set && cleared
        })
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = context;
        false
    }
}
