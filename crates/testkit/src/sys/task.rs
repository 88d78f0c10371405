//! Tasks: forks, credentials, filters, registrations with the kernel, waiting.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use super::check;

/// Runs `body` in a child that shares what `share` (`CLONE_*`) says, and ends it with its answer.
///
/// The caller has one thread, or `body` only makes system calls.
pub fn fork(share: i32, body: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: without CLONE_VM the call is a fork: the child goes on here in a copy of this
    // memory, and leaves by `_exit` below.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone,
            i64::from(share | libc::SIGCHLD),
            0_usize,
            0_usize,
            0_usize,
            0_usize,
        )
    })?;
    if pid != 0 {
        return Ok(pid as i32);
    }
    let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(101);
    // SAFETY: ends this process without running what its parent registered.
    unsafe { libc::_exit(code) }
}

/// Sleeps until a signal ends the process.
pub fn sleep_forever() -> i32 {
    loop {
        // SAFETY: takes nothing; handlers of this program may run at any time.
        unsafe { libc::pause() };
    }
}

/// Waits for a child with `waitid`'s `options`, and answers `si_code` and `si_status`;
/// `None` if none is ready.
pub fn wait_id(pid: i32, options: i32) -> io::Result<Option<(i32, i32)>> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: the call writes `info` only, which is valid zeroed.
    let info = unsafe {
        check(i64::from(libc::waitid(
            libc::P_PID,
            pid as u32,
            info.as_mut_ptr(),
            options,
        )))?;
        info.assume_init()
    };
    // SAFETY: the kernel filled the fields of SIGCHLD, or left all zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    Ok((pid != 0).then_some((info.si_code, status)))
}

/// Reaps a child if it has ended; answers the most memory it held, in bytes, and its raw status.
pub fn reap(pid: i32) -> io::Result<Option<(u64, i32)>> {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    let mut status = 0;
    // SAFETY: the call writes `status` and `usage` only.
    let (got, usage) = unsafe {
        let got = libc::wait4(pid, &mut status, libc::WNOHANG, usage.as_mut_ptr());
        (check(i64::from(got))?, usage.assume_init())
    };
    Ok((got != 0).then_some((usage.ru_maxrss as u64 * 1024, status)))
}

/// One `prctl` with plain numbers.
pub fn control(option: i32, argument: u64) -> io::Result<i64> {
    // SAFETY: the callers' options take numbers only.
    check(i64::from(unsafe { libc::prctl(option, argument, 0, 0, 0) }))
}

/// Becomes another user: groups, gid and uid (real, effective and saved), keeping `capabilities`
/// (bits) permitted and effective.
pub fn become_user(uid: u32, gid: u32, groups: &[u32], capabilities: u32) -> io::Result<()> {
    control(libc::PR_SET_KEEPCAPS, 1)?;
    // SAFETY: the raw calls change this thread only, of which the program has one; `groups`
    // lives through its call.
    unsafe {
        check(libc::syscall(
            libc::SYS_setgroups,
            groups.len(),
            groups.as_ptr(),
        ))?;
        check(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        check(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
    }
    let header: [u32; 2] = [0x2008_0522, 0];
    let sets: [[u32; 3]; 2] = [[capabilities, capabilities, 0], [0; 3]];
    // SAFETY: a version 3 header and its two words of sets, both live.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) }).map(drop)
}

/// Installs a seccomp filter by which the system call `number` answers `errno`.
pub fn forbid(number: u32, errno: u32) -> io::Result<()> {
    control(libc::PR_SET_NO_NEW_PRIVS, 1)?;
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut filter = [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number),
        op(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | errno,
        ),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: a whole program of four instructions, which the kernel copies.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &program,
        )
    };
    check(result).map(drop)
}

/// The errno of `getpriority` with a valid argument, if it fails.
pub fn priority_errno() -> Option<i32> {
    // SAFETY: plain values; the raw call answers no negative number but an error.
    let result = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, 0) };
    check(result).err().and_then(|error| error.raw_os_error())
}

/// The head of this thread's robust list and its length.
pub fn robust_list() -> io::Result<(usize, usize)> {
    let (mut head, mut length) = (0_usize, 0_usize);
    // SAFETY: the call writes both words only.
    check(unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &mut head, &mut length) })?;
    Ok((head, length))
}

/// The address that the kernel clears when this thread ends.
pub fn tid_address() -> io::Result<usize> {
    let mut address = 0_usize;
    // SAFETY: the call writes one word.
    check(i64::from(unsafe {
        libc::prctl(libc::PR_GET_TID_ADDRESS, &mut address, 0, 0, 0)
    }))?;
    Ok(address)
}

/// The CPU that the kernel wrote to this thread's rseq area; `None` without a registration.
pub fn rseq_cpu() -> Option<u32> {
    unsafe extern "C" {
        static __rseq_offset: isize;
        static __rseq_size: u32;
    }
    // SAFETY: glibc 2.35 and newer define both; the area lies at that offset from the thread
    // pointer (whose first word is its own address) for the life of the thread.
    unsafe {
        if __rseq_size == 0 {
            return None;
        }
        let thread: usize;
        std::arch::asm!("mov {}, fs:0", out(reg) thread);
        let area = thread.wrapping_add_signed(__rseq_offset) as *const u32;
        Some(area.add(1).read_volatile())
    }
}

/// Counts in a register and in memory at once until the two differ, which only somebody else can bring
/// about; returns the register's count.
pub fn count_twice(shown: &AtomicU64) -> u64 {
    let mut count = shown.load(Ordering::Relaxed);
    // SAFETY: writes nothing but `shown`, which is atomic and has no other writer.
    unsafe {
        std::arch::asm!(
            "2: inc {count}",
            "inc qword ptr [{shown}]",
            "pause",
            "cmp [{shown}], {count}",
            "je 2b",
            count = inout(reg) count,
            shown = in(reg) shown.as_ptr(),
            options(nostack),
        );
    }
    count
}

/// Moves this thread to one CPU.
pub fn pin(cpu: usize) -> io::Result<()> {
    let mut set = [0_u64; 16];
    set[cpu / 64] |= 1 << (cpu % 64);
    // SAFETY: the set lives through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            0,
            size_of_val(&set),
            set.as_ptr(),
        )
    };
    check(result).map(drop)
}

/// Changes the personality, or asks for it with `u32::MAX`.
pub fn personality(persona: u32) -> i32 {
    // SAFETY: plain values.
    unsafe { libc::personality(u64::from(persona)) }
}

/// Waits by `poll(2)` itself, not `ppoll(2)`, until the file can be read.
pub fn poll_readable(file: impl AsFd) -> io::Result<()> {
    let mut fd = libc::pollfd {
        fd: file.as_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: the structure lives through the call, which writes into it alone.
    match unsafe { libc::poll(&raw mut fd, 1, -1) } {
        1 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits while the word is `expected`; errors as the kernel's.
pub fn futex_wait(word: &AtomicI32, expected: i32) -> io::Result<()> {
    // SAFETY: the word lives through the call; no time limit.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            expected,
            0_usize,
        )
    };
    check(result).map(drop)
}

/// Changes the word and wakes who waits for it.
pub fn futex_wake(word: &AtomicI32, value: i32) {
    word.store(value, Ordering::SeqCst);
    // SAFETY: the word lives through the call.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            i32::MAX,
        )
    };
}

/// Makes a pty the controlling terminal of this session.
pub fn take_terminal(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: a valid descriptor and a plain number.
    check(i64::from(unsafe {
        libc::ioctl(fd.as_raw_fd(), libc::TIOCSCTTY, 0)
    }))
    .map(drop)
}

/// An OFD lock (`write`) on `length` bytes from `start`, or a lease, by `fcntl` number.
pub fn lock_range(
    fd: std::os::fd::BorrowedFd<'_>,
    command: i32,
    kind: i32,
    range: (i64, i64),
) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: all zero is a valid flock.
    let mut lock: libc::flock = unsafe { MaybeUninit::zeroed().assume_init() };
    lock.l_type = kind as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    (lock.l_start, lock.l_len) = range;
    // SAFETY: a valid descriptor; the commands of the callers take a flock.
    check(i64::from(unsafe {
        libc::fcntl(fd.as_raw_fd(), command, &lock)
    }))
    .map(drop)
}

/// Takes a lease of the kind on an open file.
pub fn lease(fd: std::os::fd::BorrowedFd<'_>, kind: i32) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: a valid descriptor and a plain number.
    check(i64::from(unsafe {
        libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, kind)
    }))
    .map(drop)
}

/// A descriptor from which the `signals` are read.
pub fn signal_fd(signals: &[i32]) -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::{FromRawFd, OwnedFd};
    let bits: u64 = signals.iter().map(|signal| 1_u64 << (signal - 1)).sum();
    // SAFETY: the kernel's set is one word, which lives through the call.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_signalfd4, -1, &bits, 8_usize, libc::SFD_NONBLOCK)
    })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The most memory that any child that was waited for, or a child of one, ever had resident, in bytes.
pub fn peak_of_children() -> std::io::Result<usize> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel writes a whole `rusage` where the pointer leads, which has room for one.
    let result = unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr()) };
    super::check(i64::from(result))?;
    // SAFETY: it was all zeros before, which is a valid value, and the kernel has filled it.
    let usage = unsafe { usage.assume_init() };
    Ok(usage.ru_maxrss as usize * 1024)
}
