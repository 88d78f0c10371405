//! A pair of processes, so that tasks are put right when one of the two is killed.
//!
//! The process that the caller knows becomes the supervisor; the engine, its child, traces the tasks.
//! Before code of ours runs in a foreign thread, the engine notes in shared memory (the [`Journal`])
//! what the thread was. When the engine is killed with notes left, the supervisor seizes those
//! threads, unmaps executors, puts registers and masks back, and lets them go. When the supervisor is
//! killed, the engine notices ([`Watch::is_cancelled`]) and gives up as after any failure.
//!
//! Not covered: the engine killed within the microseconds of the one call that maps the executor, which
//! goes through an instruction of the vDSO that other code follows, or of the one that unmaps it.
//!
//! Contract relied on: `fork(2)` from a process with one thread leaves the child a working copy;
//! `MAP_SHARED` memory is the same in both; a reader of a pipe sees its end when the last writer is
//! gone, however it ended.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use floe_kernel::ids::HostPid;
use floe_kernel::ptrace::options;
use floe_kernel::tcp_repair;

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::arch;
use crate::arena::Arena;
use crate::call::remote_call;
use crate::error::InjectError;
use crate::tracee::{Saved, Seized, Stopped};

/// Threads and sockets that can be noted at once; memory is taken only for those that are.
const SLOTS: usize = 1 << 16;

/// What one note is about. It lies in shared memory, so nothing in it may be boxed.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Copy)]
#[repr(C)]
enum Note {
    /// A thread that runs our code.
    Thread {
        saved: Saved,
        executor: Option<Executor>,
        /// Where to close the userfaultfd that the thread may have been made to open.
        userfaultfd: Option<u64>,
    },
    /// A socket of the thread that is in repair mode.
    Repair { fd: i32, reuse_address: bool },
}

/// The executor that a thread runs programs in.
#[derive(Clone, Copy)]
pub(crate) struct Executor {
    pub base: u64,
    pub len: u64,
    /// Whether it is this thread that has it unmapped; others of its process run in it too.
    pub is_own: bool,
}

impl Executor {
    fn holds(self, thread: &Stopped) -> bool {
        let at = thread.regs().map(|regs| arch::instruction_pointer(&regs));
        at.is_ok_and(|at| (self.base..self.base + self.len).contains(&at))
    }
}

#[repr(C)]
struct Slot {
    /// The thread; zero while the note is not complete, or done with.
    tid: AtomicI32,
    note: MaybeUninit<Note>,
}

/// Notes of what must be put right, readable by the supervisor.
#[derive(Debug)]
pub struct Journal {
    memory: NonNull<Slot>,
}

// SAFETY: a slot is written by the one owner of its number before `tid` is set, and read by others
// only through `tid`.
unsafe impl Send for Journal {}
// SAFETY: as above.
unsafe impl Sync for Journal {}

/// The number of a note.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotId(usize);

impl Journal {
    fn new() -> io::Result<Self> {
        // One more than there are notes: the first place counts them.
        let bytes = (SLOTS + 1) * size_of::<Slot>();
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        match NonNull::new(memory.cast::<Slot>()) {
            Some(memory) if memory.as_ptr().cast() != libc::MAP_FAILED => Ok(Journal { memory }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn slot(&self, id: SlotId) -> *mut Slot {
        assert!(id.0 < SLOTS, "numbers are given out below SLOTS");
        // SAFETY: inside the mapping, as asserted.
        unsafe { self.memory.as_ptr().add(id.0 + 1) }
    }

    /// Notes what a thread is, before it is changed. `None` when there is no room: then a killed
    /// coordinator leaves it as it is.
    pub(crate) fn note_thread(&self, tid: HostPid, saved: Saved) -> Option<SlotId> {
        self.write(
            tid,
            Note::Thread {
                saved,
                executor: None,
                userfaultfd: None,
            },
        )
    }

    /// Notes a socket that is to be put into repair mode, and its `SO_REUSEADDR`, which that changes. The
    /// note ends when the guard is dropped.
    pub fn note_repair(self: &Arc<Self>, pid: HostPid, fd: i32, reuse_address: bool) -> RepairNote {
        let note = Note::Repair { fd, reuse_address };
        RepairNote {
            slot: self.write(pid, note),
            journal: self.clone(),
        }
    }

    fn write(&self, tid: HostPid, note: Note) -> Option<SlotId> {
        let id = self.next().fetch_add(1, Ordering::AcqRel) as usize;
        if id >= SLOTS {
            return None;
        }
        let slot = self.slot(SlotId(id));
        // SAFETY: the number was given out once, so nobody else writes this slot, and nobody reads
        // the note before `tid` is set.
        unsafe {
            (&raw mut (*slot).note).write(MaybeUninit::new(note));
            (*slot).tid.store(tid.0, Ordering::Release);
        }
        Some(SlotId(id))
    }

    /// Adds to the note of a thread the executor that it is about to run programs in. The one that the
    /// thread has mapped itself stays noted.
    pub(crate) fn note_executor(&self, id: SlotId, executor: Executor) {
        let slot = self.slot(id);
        // SAFETY: the slot was written by `write`, and its owner alone changes it.
        unsafe {
            let note = (*slot).note.assume_init_mut();
            if let Note::Thread {
                executor: place, ..
            } = note
            {
                place.get_or_insert(executor);
            }
        }
    }

    /// Adds to the note of a thread that it opens a userfaultfd for us, through the instruction at `gate`;
    /// `None` once it has closed it.
    pub(crate) fn note_userfaultfd(&self, id: SlotId, gate: Option<u64>) {
        let slot = self.slot(id);
        // SAFETY: as in `note_executor`.
        unsafe {
            let note = (*slot).note.assume_init_mut();
            if let Note::Thread { userfaultfd, .. } = note {
                *userfaultfd = gate;
            }
        }
    }

    /// Ends a note: the thread is what it was.
    pub(crate) fn done(&self, id: SlotId) {
        // SAFETY: the slot lies in the mapping; `tid` is atomic.
        unsafe { (*self.slot(id)).tid.store(0, Ordering::Release) };
    }

    fn notes(&self) -> Vec<(HostPid, Note)> {
        let given_out = (self.next().load(Ordering::Acquire) as usize).min(SLOTS);
        let mut notes = Vec::new();
        for id in (0..given_out).map(SlotId) {
            let slot = self.slot(id);
            // SAFETY: memory never written is zero, which is a `tid` of none; a set `tid` says that
            // the note is complete.
            unsafe {
                let tid = (*slot).tid.load(Ordering::Acquire);
                if tid != 0 {
                    notes.push((HostPid(tid), (*slot).note.assume_init_read()));
                }
            }
        }
        notes
    }

    /// How many numbers were given out: in the first slot's place, so that the supervisor sees it.
    fn next(&self) -> &AtomicU32 {
        // SAFETY: the mapping is larger than this, aligned, and zero at first.
        unsafe { self.memory.cast::<AtomicU32>().as_ref() }
    }
}

/// A socket in repair mode, as long as this lives.
#[derive(Debug)]
pub struct RepairNote {
    journal: Arc<Journal>,
    slot: Option<SlotId>,
}

impl Drop for RepairNote {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            self.journal.done(slot);
        }
    }
}

/// The two sides of [`split`].
pub enum Split {
    /// The child: it does the work.
    Engine(Watch),
    /// The parent, whose pid is the one that callers know.
    Supervisor(Supervisor),
}

/// Forks this process, which must have one thread, into an engine and its supervisor.
///
/// Killing the supervisor cancels the engine's work in good order. Should the engine be killed, the
/// supervisor puts right what the engine noted.
pub fn split() -> io::Result<Split> {
    let journal = Arc::new(Journal::new()?);
    let (end, lifeline) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: this process has one thread, so the child finds every lock free.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(lifeline);
            Ok(Split::Engine(Watch::new(journal, end)))
        }
        pid => Ok(Split::Supervisor(Supervisor {
            journal,
            pid,
            _lifeline: lifeline,
        })),
    }
}

/// The engine's side: its notes, and whether it shall go on.
#[derive(Clone, Debug)]
pub struct Watch {
    journal: Arc<Journal>,
    lifeline: Arc<OwnedFd>,
}

impl Watch {
    fn new(journal: Arc<Journal>, lifeline: OwnedFd) -> Self {
        // Sent to the whole group by a terminal: the supervisor ends of them, and that cancels us.
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
            // SAFETY: SIG_IGN runs no code.
            unsafe { libc::signal(signal, libc::SIG_IGN) };
        }
        Watch {
            journal,
            lifeline: Arc::new(lifeline),
        }
    }

    /// Where threads are noted, see [`crate::Stopped::guard`].
    pub fn journal(&self) -> Arc<Journal> {
        self.journal.clone()
    }

    /// Whether the supervisor is gone, so that the work must be given up.
    pub fn is_cancelled(&self) -> bool {
        let mut lifeline = [PollFd::new(&*self.lifeline, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // Nobody writes: it becomes readable when the other end is closed.
        matches!(rustix::event::poll(&mut lifeline, Some(&now)), Ok(ready) if ready > 0)
    }
}

/// The parent's side.
#[derive(Debug)]
pub struct Supervisor {
    journal: Arc<Journal>,
    pid: libc::pid_t,
    _lifeline: OwnedFd,
}

/// How the engine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineEnd {
    /// With this exit code.
    Exited(i32),
    /// Killed by this signal; what it had changed has been put right.
    Killed(i32),
}

impl Supervisor {
    /// The engine's pid.
    pub fn engine(&self) -> i32 {
        self.pid
    }

    /// Waits for the engine; puts right what it left when it was killed.
    pub fn wait(&self) -> io::Result<EngineEnd> {
        // Faults that tests ask for are the engine's.
        floe_kernel::fault::arm(None);
        let mut status = 0;
        loop {
            // SAFETY: waits for our own child; `status` is a live integer.
            let ended = unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
            if ended == self.pid {
                break;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        if libc::WIFEXITED(status) {
            return Ok(EngineEnd::Exited(libc::WEXITSTATUS(status)));
        }
        put_right(self.journal.notes());
        Ok(EngineEnd::Killed(libc::WTERMSIG(status)))
    }
}

/// How long a dying coordinator may hold on to its tracees.
const TAKE_OVER_DEADLINE: Duration = Duration::from_secs(5);

fn put_right(notes: Vec<(HostPid, Note)>) {
    let mut stopped = Vec::new();
    for (tid, note) in notes {
        match note {
            Note::Repair { fd, reuse_address } => end_repair(tid, fd, reuse_address),
            Note::Thread {
                saved,
                executor,
                userfaultfd,
            } => {
                let thread = take_over(tid).and_then(Seized::wait_stopped);
                stopped.extend(thread.map(|mut thread| {
                    let is_away = executor.is_none_or(|executor| executor.holds(&thread));
                    if let (true, Some(gate)) = (is_away, userfaultfd) {
                        close_userfaultfds(&mut thread, gate);
                    }
                    (thread, is_away.then_some((saved, executor)))
                }));
            }
        }
    }
    // Every thread is stopped before the memory that some of them run in goes away. One that is back in its
    // program has run on since: what it was is not what it is.
    for (thread, away) in &mut stopped {
        let Some((saved, executor)) = *away else {
            continue;
        };
        thread.replace(saved);
        if let Some(executor) = executor.filter(|executor| executor.is_own) {
            let _ = Arena::left_behind(executor.base, executor.len as usize).remove(thread);
        }
    }
    for (thread, _) in stopped {
        let _ = thread.release();
    }
}

/// Has the thread close what it opened for us. A task with a userfaultfd of its own is never asked for one.
fn close_userfaultfds(thread: &mut Stopped, gate: u64) {
    let directory = format!("/proc/{}/fd", thread.pid());
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let is_one = std::fs::read_link(entry.path())
            .is_ok_and(|link| link.as_os_str() == "anon_inode:[userfaultfd]");
        let number = entry.file_name().to_string_lossy().parse().ok();
        if let (true, Some(fd)) = (is_one, number) {
            let close = ("close of the userfaultfd".into(), libc::SYS_close);
            // It fails only for a thread that has died.
            let _ = remote_call(thread, gate, close, [fd, 0, 0, 0, 0, 0]);
        }
    }
}

/// Becomes the tracer in the dying coordinator's place: it closes its files before it lets go of them.
fn take_over(tid: HostPid) -> Result<Seized, InjectError> {
    let deadline = Instant::now() + TAKE_OVER_DEADLINE;
    loop {
        match Seized::new(tid, options::TRACE_SYSGOOD | options::SUSPEND_SECCOMP) {
            Ok(thread) => return thread.interrupt().map(|()| thread),
            Err(error) if Instant::now() > deadline || error.errno() == Some(libc::ESRCH) => {
                return Err(error);
            }
            Err(_) => std::thread::sleep(Duration::from_micros(100)),
        }
    }
}

/// Takes a TCP socket of a task out of repair mode.
fn end_repair(pid: HostPid, fd: i32, reuse_address: bool) {
    // SAFETY: integers; a descriptor that comes back is new and nobody else's.
    let socket = unsafe {
        let pidfd = libc::syscall(libc::SYS_pidfd_open, pid.0, 0) as i32;
        if pidfd < 0 {
            return;
        }
        let pidfd = OwnedFd::from_raw_fd(pidfd);
        let socket = libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) as i32;
        if socket < 0 {
            return;
        }
        OwnedFd::from_raw_fd(socket)
    };
    // A socket that the engine did not come to is refused, and stays what it is.
    let _ = tcp_repair::leave(socket.as_fd(), i32::from(reuse_address));
}
