//! Traced threads as types: [`Seized`] runs, [`Stopped`] does not.

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use floe_kernel::fault;
use floe_kernel::ids::HostPid;
use floe_kernel::proc::{ProcDir, parse_status};
use floe_kernel::ptrace::{self, EVENT_STOP, Regs, WaitStatus};

use crate::error::{InjectError, OnTask};
use crate::supervisor::{Executor, Journal, SlotId};

/// How long a stop may take before the task counts as stuck. A task in an uninterruptible call
/// (a dead NFS server) stops only when the call ends.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// How long to poll before sleeping: most stops come within microseconds.
const SPIN: Duration = Duration::from_micros(200);
/// How often a tracee that does not stop is looked after.
const LOOK: Duration = Duration::from_millis(10);

/// A traced thread that runs.
#[derive(Debug)]
pub struct Seized {
    pid: HostPid,
    on_drop: OnDrop,
}

/// What becomes of a stopped thread that nobody released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnDrop {
    /// It was there before us: it runs on.
    Release,
    /// It is half a task, made by us: it must not run.
    Kill,
}

fn is_refused(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EPERM)
}

fn is_filtered(pid: HostPid) -> bool {
    let filtered = |proc: ProcDir| {
        let text = proc.read("status").ok()?;
        Some(parse_status(&text).ok()?.seccomp != 0)
    };
    ProcDir::open(pid).ok().and_then(filtered).unwrap_or(true)
}

fn seize_unsuspended(pid: HostPid, options: u32) -> io::Result<()> {
    ptrace::seize(pid, options & !ptrace::options::SUSPEND_SECCOMP)
}

impl Seized {
    /// Becomes the tracer of a thread; `options` are those of [`ptrace::options`].
    ///
    /// System call filters are suspended only for one who has CAP_SYS_ADMIN and no filter himself: without
    /// that, a thread is seized when it has none.
    pub fn new(pid: HostPid, options: u32) -> Result<Self, InjectError> {
        match ptrace::seize(pid, options) {
            Err(error) if is_refused(&error) && !is_filtered(pid) => {
                seize_unsuspended(pid, options)
            }
            other => other,
        }
        .on(pid, "seize")?;
        Ok(Self {
            pid,
            on_drop: OnDrop::Release,
        })
    }

    /// A puppet that the kernel attached by itself (a clone of a puppet with `CLONE_PTRACE`).
    pub fn born(pid: HostPid) -> Self {
        Self {
            pid,
            on_drop: OnDrop::Kill,
        }
    }

    /// Becomes the tracer of a puppet: dropped before its release, it is killed. The filter that it may have
    /// is ours too, so it allows our calls.
    pub(crate) fn puppet(pid: HostPid, options: u32) -> Result<Self, InjectError> {
        match ptrace::seize(pid, options) {
            Err(error) if is_refused(&error) => seize_unsuspended(pid, options),
            other => other,
        }
        .on(pid, "seize")?;
        Ok(Self {
            pid,
            on_drop: OnDrop::Kill,
        })
    }

    /// The thread.
    pub fn pid(&self) -> HostPid {
        self.pid
    }

    /// Asks the thread to stop, without waiting for it.
    pub fn interrupt(&self) -> Result<(), InjectError> {
        ptrace::interrupt(self.pid).on(self.pid, "interrupt")
    }

    /// Waits for the stop that `interrupt` or birth causes.
    ///
    /// A signal that arrives first is delivered: it was dequeued, so it would be in no image.
    pub fn wait_stopped(self) -> Result<Stopped, InjectError> {
        self.wait_stopped_unless(|| false)
    }

    /// As [`Self::wait_stopped`]; where that takes long, asks now and then whether there is a reason to give up.
    pub fn wait_stopped_unless(
        self,
        mut is_in_vain: impl FnMut() -> bool,
    ) -> Result<Stopped, InjectError> {
        let pid = self.pid;
        let mut look = || match is_in_vain() {
            true => Err(InjectError::GivenUp { pid }),
            false => Ok(()),
        };
        let stop_signal = loop {
            match wait_for_stop_beside(pid, &mut look)? {
                WaitStatus::Event {
                    event: EVENT_STOP,
                    signal,
                } => break (signal != libc::SIGTRAP).then_some(signal),
                WaitStatus::Event { .. } => ptrace::cont(pid, 0).on(pid, "cont")?,
                WaitStatus::Signal(signal) => {
                    // The trap of `interrupt` stays pending and is reported next.
                    ptrace::cont(pid, signal).on(pid, "cont")?;
                }
                status => {
                    return Err(InjectError::UnexpectedStop {
                        pid,
                        status,
                        expected: "a stop on request",
                    });
                }
            }
        };
        Ok(Stopped {
            pid,
            stop_signal,
            saved: None,
            seen_regs: Cell::new(None),
            seen_mask: Cell::new(None),
            put_off: Vec::new(),
            released: false,
            on_drop: self.on_drop,
            journal: None,
            note: None,
        })
    }
}

/// Waits for the next stop of one tracee.
pub(crate) fn wait_for_stop(pid: HostPid) -> Result<WaitStatus, InjectError> {
    wait_for_stop_beside(pid, || Ok(()))
}

/// As [`wait_for_stop`]; looks after the tracee by `beside` every now and then where that takes long.
pub(crate) fn wait_for_stop_beside(
    pid: HostPid,
    mut beside: impl FnMut() -> Result<(), InjectError>,
) -> Result<WaitStatus, InjectError> {
    let start = Instant::now();
    let mut look = LOOK;
    loop {
        if let Some((_, status)) = ptrace::wait(pid, libc::WNOHANG).on(pid, "wait")? {
            return match status {
                WaitStatus::Exited(_) | WaitStatus::Killed(_) => {
                    Err(InjectError::Died { pid, status })
                }
                stop => Ok(stop),
            };
        }
        let waited = start.elapsed();
        if waited > STOP_DEADLINE {
            return Err(InjectError::Stuck {
                pid,
                seconds: STOP_DEADLINE.as_secs(),
            });
        }
        if waited > look {
            beside()?;
            look = waited + LOOK;
        }
        if waited < SPIN {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// What a thread was before it ran code of ours.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    pub regs: Regs,
    pub sigmask: u64,
}

/// A traced thread in ptrace-stop.
///
/// Releasing it restores registers and mask and lets it run on. Dropping it does the same and logs
/// what fails; a puppet that is dropped is killed.
#[derive(Debug)]
pub struct Stopped {
    pid: HostPid,
    stop_signal: Option<i32>,
    saved: Option<Saved>,
    /// What was read while the thread was as we found it, to be read once.
    seen_regs: Cell<Option<Regs>>,
    seen_mask: Cell<Option<u64>>,
    put_off: Vec<i32>,
    released: bool,
    on_drop: OnDrop,
    journal: Option<Arc<Journal>>,
    note: Option<SlotId>,
}

impl Stopped {
    /// The thread.
    pub fn pid(&self) -> HostPid {
        self.pid
    }

    /// Has the supervisor put the thread right should we be killed while it runs our code.
    pub fn guard(&mut self, journal: Arc<Journal>) {
        self.journal = Some(journal);
    }

    /// Tells the supervisor which executor this thread is about to run programs in.
    pub(crate) fn note_executor(&self, executor: Executor) {
        if let (Some(journal), Some(note)) = (&self.journal, self.note) {
            journal.note_executor(note, executor);
        }
    }

    /// Tells the supervisor that the thread is about to open a userfaultfd for us through the instruction
    /// at `gate`, or that it has closed it. It has an executor.
    pub fn note_userfaultfd(&self, gate: Option<u64>) {
        if let (Some(journal), Some(note)) = (&self.journal, self.note) {
            journal.note_userfaultfd(note, gate);
        }
    }

    /// Whether its process was stopped by a signal (state `T`) when it was seized.
    pub fn in_group_stop(&self) -> bool {
        self.stop_signal.is_some()
    }

    /// The signal that had stopped its process when it was seized.
    pub fn stop_signal(&self) -> Option<i32> {
        self.stop_signal
    }

    /// The registers that the program itself has, also while it is being used by us.
    pub fn regs(&self) -> Result<Regs, InjectError> {
        match self.saved {
            Some(saved) => Ok(saved.regs),
            None => self.once(&self.seen_regs, || {
                ptrace::regs(self.pid).on(self.pid, "getregs")
            }),
        }
    }

    /// The signal mask that the program itself has.
    pub fn sigmask(&self) -> Result<u64, InjectError> {
        match self.saved {
            Some(saved) => Ok(saved.sigmask),
            None => self.once(&self.seen_mask, || {
                ptrace::sigmask(self.pid).on(self.pid, "getsigmask")
            }),
        }
    }

    /// Only what nobody but us can change is kept: a puppet is built in many ways.
    fn once<T: Copy>(
        &self,
        seen: &Cell<Option<T>>,
        read: impl FnOnce() -> Result<T, InjectError>,
    ) -> Result<T, InjectError> {
        if let Some(value) = seen.get() {
            return Ok(value);
        }
        let value = read()?;
        if self.on_drop == OnDrop::Release {
            seen.set(Some(value));
        }
        Ok(value)
    }

    /// Decides what the thread will be when it is released, in place of what it was.
    pub fn replace(&mut self, saved: Saved) {
        self.saved = Some(saved);
    }

    /// Remembers the program's own registers and mask, once, right before they are changed: should we be
    /// killed, a noted thread counts as one that runs our code.
    pub(crate) fn save(&mut self) -> Result<Saved, InjectError> {
        let saved = match self.saved {
            Some(saved) => saved,
            None => Saved {
                regs: self.regs()?,
                sigmask: self.sigmask()?,
            },
        };
        self.saved = Some(saved);
        if self.note.is_none() {
            let journal = self.journal.as_ref();
            self.note = journal.and_then(|journal| journal.note_thread(self.pid, saved));
        }
        Ok(saved)
    }

    /// A signal that stopped the thread while it was ours, to be delivered on release.
    pub(crate) fn put_off(&mut self, signal: i32) {
        self.put_off.push(signal);
    }

    /// Puts back registers and mask, leaving the thread stopped.
    pub fn put_back(&mut self) -> Result<(), InjectError> {
        if let Some(saved) = self.saved {
            // In this order: a thread that is back in its program needs nothing more from the supervisor.
            ptrace::set_sigmask(self.pid, saved.sigmask).on(self.pid, "setsigmask")?;
            ptrace::set_regs(self.pid, &saved.regs).on(self.pid, "setregs")?;
            self.saved = None;
            self.seen_regs.set(Some(saved.regs));
            self.seen_mask.set(Some(saved.sigmask));
        }
        if let (Some(journal), Some(note)) = (&self.journal, self.note.take()) {
            journal.done(note);
        }
        Ok(())
    }

    /// Gives the thread back to itself.
    pub fn release(mut self) -> Result<(), InjectError> {
        self.let_go()
    }

    fn let_go(&mut self) -> Result<(), InjectError> {
        fault::point();
        self.released = true;
        self.put_back()?;
        for signal in std::mem::take(&mut self.put_off) {
            floe_kernel::pidfd::tgkill(self.pid, signal).on(self.pid, "redeliver a signal")?;
        }
        ptrace::detach(self.pid, 0).on(self.pid, "detach")
    }

    /// Forgets the thread without touching it: it is dead, or is about to be killed.
    pub fn forget(mut self) {
        self.released = true;
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        let result = match self.on_drop {
            OnDrop::Release => self.let_go(),
            OnDrop::Kill => {
                floe_kernel::pidfd::tgkill(self.pid, libc::SIGKILL).on(self.pid, "kill")
            }
        };
        if let Err(error) = result {
            tracing::warn!(pid = self.pid.0, %error, "could not release a stopped task");
        }
    }
}
