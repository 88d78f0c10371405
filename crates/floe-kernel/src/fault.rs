//! Faults that tests ask for: the process kills itself at a step that it is about to make.
//!
//! A process that is killed cannot clean up; what then undoes its work is tested by killing it at
//! every [`point`] in turn. Nothing happens unless [`arm`] was called.

use std::sync::atomic::{AtomicU32, Ordering};

/// Steps left until the fault; zero when none is wanted.
static LEFT: AtomicU32 = AtomicU32::new(0);

/// Asks for a fault at the `step`-th point from now on, counted from 1; `None` asks for none.
pub fn arm(step: Option<u32>) {
    LEFT.store(step.unwrap_or(0), Ordering::Relaxed);
}

/// A step that is about to be made: the fault comes here, as SIGKILL, if its turn has come.
pub fn point() {
    if LEFT.load(Ordering::Relaxed) != 0 && LEFT.fetch_sub(1, Ordering::Relaxed) == 1 {
        let own = rustix::process::getpid();
        // The signal ends us before the call returns; it can only fail for other processes.
        let _ = rustix::process::kill_process(own, rustix::process::Signal::KILL);
    }
}
