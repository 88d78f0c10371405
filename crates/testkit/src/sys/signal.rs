//! Signals: sets, actions, queues, alternate stacks.

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

use super::check;

/// A signal that was taken from a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Taken {
    /// Its number.
    pub signal: i32,
    /// `si_code`.
    pub code: i32,
    /// `si_value`.
    pub value: i32,
    /// The sender.
    pub pid: i32,
}

/// What the kernel keeps of one action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Action {
    /// Handler, `SIG_DFL` or `SIG_IGN`.
    pub handler: usize,
    /// `SA_*`.
    pub flags: i32,
    /// Signals blocked meanwhile, as bits.
    pub mask: u64,
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the whole set; sigaddset only sets bits in it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

fn bits(set: &libc::sigset_t) -> u64 {
    (1..=64).fold(0, |bits, signal| {
        // SAFETY: `set` is a whole set; the numbers are valid.
        let is_in = unsafe { libc::sigismember(set, signal) } == 1;
        bits | u64::from(is_in) << (signal - 1)
    })
}

/// Blocks signals in this thread.
pub fn block(signals: &[i32]) {
    let set = set_of(signals);
    // SAFETY: `set` lives through the call.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
}

/// The signals that this thread blocks, as bits.
pub fn blocked() -> u64 {
    let mut set = set_of(&[]);
    // SAFETY: writes the old set only.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut set) };
    bits(&set)
}

/// Takes one of `signals` from the queues, waiting for at most `limit` (forever without).
pub fn take(signals: &[i32], limit: Option<Duration>) -> io::Result<Taken> {
    let set = set_of(signals);
    loop {
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        let time = limit.map(|limit| libc::timespec {
            tv_sec: limit.as_secs() as i64,
            tv_nsec: i64::from(limit.subsec_nanos()),
        });
        let time = time
            .as_ref()
            .map_or(std::ptr::null(), |time| time as *const _);
        // SAFETY: all pointers are to live values of the right types.
        let got = unsafe { libc::sigtimedwait(&set, info.as_mut_ptr(), time) };
        match check(i64::from(got)) {
            Ok(_) => {
                // SAFETY: zeroed is a valid siginfo_t, and the kernel filled it.
                let info = unsafe { info.assume_init() };
                return Ok(Taken {
                    signal: info.si_signo,
                    code: info.si_code,
                    // SAFETY: reads the union's words; the bytes are initialised in any case.
                    value: unsafe { info.si_value().sival_ptr } as usize as i32,
                    // SAFETY: as above.
                    pid: unsafe { info.si_pid() },
                });
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Sends a signal with a value to the queue that a process shares.
pub fn queue(pid: i32, signal: i32, value: i32) -> io::Result<()> {
    let value = libc::sigval {
        sival_ptr: value as usize as *mut _,
    };
    // SAFETY: plain values.
    check(i64::from(unsafe { libc::sigqueue(pid, signal, value) })).map(drop)
}

/// Sends a signal to this thread's own queue.
pub fn raise_in_thread(signal: i32) {
    // SAFETY: plain values.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal) };
}

/// The signals that wait for this thread or process, as bits.
pub fn pending() -> u64 {
    let mut set = set_of(&[]);
    // SAFETY: writes the set only.
    unsafe { libc::sigpending(&mut set) };
    bits(&set)
}

/// Sets an action; the handler must be safe to run at any time.
pub fn handle(signal: i32, handler: extern "C" fn(i32), flags: i32, mask: &[i32]) {
    set_action(signal, handler as usize, flags, mask);
}

/// Ignores a signal.
pub fn ignore(signal: i32) {
    set_action(signal, libc::SIG_IGN, 0, &[]);
}

fn set_action(signal: i32, handler: usize, flags: i32, mask: &[i32]) {
    // SAFETY: all zero is a valid action.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    action.sa_mask = set_of(mask);
    // SAFETY: a whole action, whose handler is one of this program's `extern "C"` functions.
    unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
}

/// The action of a signal; `None` for numbers that the C library keeps.
pub fn action(signal: i32) -> Option<Action> {
    // SAFETY: all zero is a valid action.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: writes the old action only.
    let result = unsafe { libc::sigaction(signal, std::ptr::null(), &mut action) };
    (result == 0).then(|| Action {
        handler: action.sa_sigaction,
        flags: action.sa_flags,
        mask: bits(&action.sa_mask),
    })
}

/// Gives this thread an alternate stack for the rest of its life.
pub fn set_alternate_stack(bytes: usize) {
    let stack = Box::leak(vec![0_u8; bytes].into_boxed_slice());
    let stack = libc::stack_t {
        ss_sp: stack.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: bytes,
    };
    // SAFETY: the stack is leaked, so it outlives the thread.
    unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) };
}

/// The alternate stack of this thread: address, flags, size.
pub fn alternate_stack() -> (usize, i32, usize) {
    // SAFETY: all zero is a valid stack_t, and the call only writes it.
    let stack = unsafe {
        let mut stack: libc::stack_t = MaybeUninit::zeroed().assume_init();
        libc::sigaltstack(std::ptr::null(), &mut stack);
        stack
    };
    (stack.ss_sp as usize, stack.ss_flags, stack.ss_size)
}
