//! The piece of a task's memory that holds the executor and its program.
//!
//! Contract relied on: `clone3` without `CLONE_VM` gives the child its own copy of the arena.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use floe_kernel::fault;
use floe_kernel::ids::{HostPid, TaskAddr};
use floe_kernel::ptrace::{self, Regs, WaitStatus, options};
use floe_kernel::vm;

use crate::arch;
use crate::call::{RemoteCall, remote_call, remote_calls};
use crate::error::{InjectError, OnTask};
use crate::program::{Arg, ENTRY_SIZE, Outcome, Program};
use crate::supervisor::Executor;
use crate::tracee::{Seized, Stopped, wait_for_stop, wait_for_stop_beside};

/// Offset of the programs: the executor has the first page for itself.
const PROGRAMS: u64 = 4096;
/// Bytes that an arena takes in the address space by default; only what is used takes memory.
pub const ARENA_BYTES: usize = 1 << 20;

/// The signal by which the executor reports the end of a program: one that the task does not catch,
/// so that nothing happens if the tracer is gone by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuietSignal(i32);

impl QuietSignal {
    /// For tasks of our own, which catch nothing.
    pub const PUPPET: QuietSignal = QuietSignal(libc::SIGURG);

    /// Chooses among the signals that are ignored by default; the masks are `SigCgt` and the union of
    /// `SigPnd` and `ShdPnd` of `/proc/<pid>/status`, bit 0 for signal 1.
    pub fn choose(caught: u64, pending: u64) -> QuietSignal {
        let free = |signal: &i32| (caught | pending) & (1 << (signal - 1)) == 0;
        let candidates = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];
        QuietSignal(candidates.into_iter().find(free).unwrap_or(libc::SIGURG))
    }

    fn mask_of_all_others(self) -> u64 {
        !(1 << (self.0 - 1))
    }
}

/// An executor in a task's memory.
#[derive(Clone, Debug)]
pub struct Arena {
    base: u64,
    len: usize,
    signal: QuietSignal,
}

impl Arena {
    /// Maps an arena into the address space of `thread` with a remote call through the `syscall`
    /// instruction at `gate` (see [`find_gate`]).
    pub fn inject(
        thread: &mut Stopped,
        gate: u64,
        signal: QuietSignal,
    ) -> Result<Arena, InjectError> {
        let mut arenas = Arena::inject_all([(thread, gate, signal)]);
        arenas.pop().expect("one for each")
    }

    /// As [`Arena::inject`], into many tasks at once.
    pub fn inject_all<'t>(
        tasks: impl IntoIterator<Item = (&'t mut Stopped, u64, QuietSignal)>,
    ) -> Vec<Result<Arena, InjectError>> {
        let len = ARENA_BYTES;
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let (mut calls, mut signals) = (Vec::new(), Vec::new());
        for (thread, gate, signal) in tasks {
            fault::point();
            signals.push(signal);
            calls.push(RemoteCall {
                thread,
                gate,
                call: ("mmap of the executor".into(), libc::SYS_mmap),
                args: [0, len as u64, prot as u64, flags as u64, u64::MAX, 0],
            });
        }
        let bases = remote_calls(&mut calls);
        let mapped = calls.iter().zip(signals).zip(bases);
        mapped
            .map(|((call, signal), base)| {
                let arena = Arena {
                    base: base? as u64,
                    len,
                    signal,
                };
                arena.settle(call.thread).map(|()| arena)
            })
            .collect()
    }

    /// Writes the executor, and has the thread wait in it.
    fn settle(&self, thread: &Stopped) -> Result<(), InjectError> {
        let pid = thread.pid();
        vm::write_exact(pid, TaskAddr(self.base), arch::executor_code())
            .map_err(|source| InjectError::WriteProgram { pid, source })?;
        self.idle(thread)?;
        thread.note_executor(self.noted(true));
        fault::point();
        Ok(())
    }

    /// Lets the thread wait in the executor, rather than go on behind a call of ours, should its
    /// tracer die.
    fn idle(&self, thread: &Stopped) -> Result<(), InjectError> {
        let pid = thread.pid();
        let mut regs = ptrace::regs(pid).on(pid, "getregs")?;
        arch::aim_at_program(
            &mut regs,
            self.base + arch::idle_offset(),
            0..0,
            self.signal.0,
        );
        ptrace::set_regs(pid, &regs).on(pid, "setregs")
    }

    fn noted(&self, is_own: bool) -> Executor {
        Executor {
            base: self.base,
            len: self.len as u64,
            is_own,
        }
    }

    /// An arena that a killed coordinator left in a task.
    pub(crate) fn left_behind(base: u64, len: usize) -> Arena {
        Arena {
            base,
            len,
            signal: QuietSignal::PUPPET,
        }
    }

    /// Where the arena lies.
    pub fn range(&self) -> Range<u64> {
        self.base..self.base + self.len as u64
    }

    /// Bytes that a program may take.
    pub fn capacity(&self) -> usize {
        self.len - PROGRAMS as usize
    }

    /// Runs a program in a stopped thread and waits for its end.
    pub fn run(&self, thread: &mut Stopped, program: &Program) -> Result<Outcome, InjectError> {
        self.start(thread, program, 0)?;
        self.finish(thread, program, 0)
    }

    /// Starts a program whose image lies `offset` bytes into the program area.
    ///
    /// Threads of one process share their arena: give each its own offset to run them at once.
    pub fn start(
        &self,
        thread: &mut Stopped,
        program: &Program,
        offset: usize,
    ) -> Result<(), InjectError> {
        fault::point();
        let pid = thread.pid();
        let bytes = offset + program.arena_bytes();
        if bytes > self.capacity() {
            return Err(InjectError::TooLarge {
                pid,
                bytes,
                arena: self.capacity(),
            });
        }
        let base = self.base + PROGRAMS + offset as u64;
        vm::write_exact(pid, TaskAddr(base), &program.assemble(base))
            .map_err(|source| InjectError::WriteProgram { pid, source })?;
        let saved = thread.save()?;
        thread.note_executor(self.noted(false));
        let mut regs = saved.regs;
        let entries = base..base + (program.len() * ENTRY_SIZE) as u64;
        arch::aim_at_program(&mut regs, self.base, entries, self.signal.0);
        ptrace::set_regs(pid, &regs).on(pid, "setregs")?;
        ptrace::set_sigmask(pid, self.signal.mask_of_all_others()).on(pid, "setsigmask")?;
        fault::point();
        ptrace::cont(pid, 0).on(pid, "cont")
    }

    /// Waits for the end of a program that [`Arena::start`] began.
    pub fn finish(
        &self,
        thread: &mut Stopped,
        program: &Program,
        offset: usize,
    ) -> Result<Outcome, InjectError> {
        fault::point();
        let pid = thread.pid();
        let regs = self.wait_for_end(thread)?;
        let base = self.base + PROGRAMS + offset as u64;
        let mut image = vec![0; program.arena_bytes()];
        vm::read_exact(pid, TaskAddr(base), &mut image)
            .map_err(|source| InjectError::ReadResults { pid, source })?;
        let outcome = program.outcome(image);
        let reached = (arch::current_entry(&regs) - base) as usize / ENTRY_SIZE;
        match program.calls.get(reached) {
            None => Ok(outcome),
            Some(call) => {
                let result = outcome.result(crate::program::call_id(reached));
                let source = io::Error::from_raw_os_error(-result as i32);
                Err(InjectError::Call {
                    pid,
                    label: call.label.clone(),
                    index: reached,
                    source,
                })
            }
        }
    }

    fn wait_for_end(&self, thread: &mut Stopped) -> Result<Regs, InjectError> {
        let pid = thread.pid();
        let idle = self.base + arch::idle_offset();
        let mut mute = false;
        loop {
            // A security module may forbid the task to send itself a signal: then it waits unheard.
            let status = wait_for_stop_beside(pid, || {
                if mute || !waits_at(pid, idle) {
                    return Ok(());
                }
                mute = true;
                ptrace::interrupt(pid).on(pid, "interrupt")
            })?;
            match status {
                WaitStatus::Event { .. } if mute => {
                    return ptrace::regs(pid).on(pid, "getregs");
                }
                WaitStatus::Signal(signal) => {
                    let regs = ptrace::regs(pid).on(pid, "getregs")?;
                    if signal == self.signal.0 && arch::instruction_pointer(&regs) == idle {
                        return Ok(regs);
                    }
                    if matches!(
                        signal,
                        libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGSYS | libc::SIGFPE
                    ) {
                        return Err(InjectError::UnexpectedStop {
                            pid,
                            status,
                            expected: "the end of a program",
                        });
                    }
                    thread.put_off(signal);
                }
                // Group-stops and interrupts of others: the program comes first.
                WaitStatus::Event { .. } => {}
                _ => {
                    return Err(InjectError::UnexpectedStop {
                        pid,
                        status,
                        expected: "the end of a program",
                    });
                }
            }
            ptrace::cont(pid, 0).on(pid, "cont")?;
        }
    }

    /// Makes the calls of a program one by one, from outside: slower, but nothing of the executor's own is
    /// asked of the thread, which may come under a policy on the way that forbids signals. The thread is
    /// left at the exit of the last call.
    pub fn step(&self, thread: &mut Stopped, program: &Program) -> Result<(), InjectError> {
        let pid = thread.pid();
        let base = self.base + PROGRAMS;
        let bytes = program.arena_bytes();
        if bytes > self.capacity() {
            let arena = self.capacity();
            return Err(InjectError::TooLarge { pid, bytes, arena });
        }
        vm::write_exact(pid, TaskAddr(base), &program.assemble(base))
            .map_err(|source| InjectError::WriteProgram { pid, source })?;
        let gate = self.base + arch::gate_offset();
        let mut results = Vec::new();
        for call in &program.calls {
            fault::point();
            let args = program.direct_args(call, base, &results);
            let made = remote_call(thread, gate, (call.label.clone(), call.number), args);
            results.push(match made {
                Ok(result) => result,
                Err(InjectError::Call { source, .. }) if !call.must_succeed => {
                    -i64::from(source.raw_os_error().unwrap_or(libc::EINVAL))
                }
                Err(error) => return Err(error),
            });
        }
        Ok(())
    }

    /// Makes one call outside of a program, leaving the thread at its exit.
    pub fn call(
        &self,
        thread: &mut Stopped,
        call: (&'static str, i64),
        args: [u64; 6],
    ) -> Result<i64, InjectError> {
        let (label, number) = call;
        let gate = self.base + arch::gate_offset();
        remote_call(thread, gate, (label.into(), number), args)
    }

    /// Ends a puppet: with this exit code, or killed by `signal` where that is not zero.
    ///
    /// It becomes a zombie for its parent to reap.
    pub fn end_task(&self, mut leader: Stopped, code: i32, signal: i32) -> Result<(), InjectError> {
        let pid = leader.pid();
        let mut program = Program::new();
        if signal == 0 {
            program.call("exit_group", libc::SYS_exit_group, &[Arg::from(code)]);
            self.start(&mut leader, &program, 0)?;
        } else {
            let default = program.zeroed(32);
            let args = [
                Arg::from(signal),
                Arg::from(default),
                Arg::from(0),
                Arg::from(8),
            ];
            program.try_call("rt_sigaction to the default", libc::SYS_rt_sigaction, &args);
            self.run(&mut leader, &program)?;
            floe_kernel::pidfd::tgkill(pid, signal).on(pid, "kill")?;
            // SIGKILL works at once, and then there is nothing to continue.
            if signal != libc::SIGKILL {
                ptrace::set_sigmask(pid, 0).on(pid, "setsigmask")?;
                ptrace::cont(pid, 0).on(pid, "cont")?;
            }
        }
        Arena::reap(leader, signal)
    }

    /// Ends a thread that is not the only one of its process.
    pub fn end_thread(&self, mut thread: Stopped) -> Result<(), InjectError> {
        let mut program = Program::new();
        program.call("exit", libc::SYS_exit, &[Arg::from(0)]);
        self.start(&mut thread, &program, 0)?;
        Arena::reap(thread, 0)
    }

    fn reap(thread: Stopped, signal: i32) -> Result<(), InjectError> {
        let pid = thread.pid();
        thread.forget();
        loop {
            match wait_for_stop(pid) {
                Err(InjectError::Died { .. }) => return Ok(()),
                Err(error) => return Err(error),
                Ok(WaitStatus::Signal(deadly)) if deadly == signal => {
                    ptrace::cont(pid, deadly).on(pid, "cont")?
                }
                Ok(_) => ptrace::cont(pid, 0).on(pid, "cont")?,
            }
        }
    }

    /// Unmaps the arena and puts back what the thread was. It stays stopped, with nothing of ours left
    /// in it. All other threads that ran programs here must have been put back before.
    pub fn remove(self, thread: &mut Stopped) -> Result<(), InjectError> {
        Arena::remove_all([(self, thread)])
    }

    /// As [`Arena::remove`], in many tasks at once; the first error after all were tried.
    pub fn remove_all<'t>(
        executors: impl IntoIterator<Item = (Arena, &'t mut Stopped)>,
    ) -> Result<(), InjectError> {
        let calls = executors.into_iter().map(|(arena, thread)| {
            fault::point();
            RemoteCall {
                thread,
                gate: arena.base + arch::gate_offset(),
                call: ("munmap of the executor".into(), libc::SYS_munmap),
                args: [arena.base, arena.len as u64, 0, 0, 0, 0],
            }
        });
        let mut calls: Vec<_> = calls.collect();
        let mut first_error = Ok(());
        let results = remote_calls(&mut calls);
        for (call, result) in calls.iter_mut().zip(results) {
            let done = result.and_then(|_| call.thread.put_back());
            first_error = first_error.and(done);
        }
        first_error
    }
}

/// Whether a thread that runs has come to wait at the end of the executor.
fn waits_at(pid: HostPid, idle: u64) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    let call = text
        .split(' ')
        .next()
        .and_then(|word| word.parse::<i64>().ok());
    let at = text
        .trim_end()
        .rsplit_once("0x")
        .map(|(_, at)| u64::from_str_radix(at, 16));
    call == Some(libc::SYS_pause) && at == Some(Ok(idle + arch::IDLE_CALL))
}

/// How the first task of a restored tree comes to be.
pub struct RootSpawn {
    /// `CLONE_*` besides what this module adds; no `CLONE_VM`.
    pub flags: u64,
    /// Pids from the innermost pid namespace outwards; empty for any pid.
    pub set_tid: Vec<i32>,
    /// The signal that its parent gets when it dies.
    pub exit_signal: i32,
    /// Where its arena lies: a hole in every address space of the tree and in our own.
    pub arena: u64,
    /// Bytes of the arena.
    pub arena_bytes: usize,
}

/// Makes the first puppet: a copy of this process that never runs its code, stopped in the executor.
pub fn spawn_root(spawn: &RootSpawn) -> Result<(Arena, Stopped), InjectError> {
    let wanted = HostPid(spawn.set_tid.last().copied().unwrap_or(0));
    let arena = Arena {
        base: spawn.arena,
        len: spawn.arena_bytes,
        signal: QuietSignal::PUPPET,
    };
    let local = LocalMapping::new(&arena)?;
    let (program, _lifeline) = waiting_program().map_err(|source| InjectError::Spawn {
        pid: wanted,
        source,
    })?;
    let base = arena.base + PROGRAMS;
    let image = program.assemble(base);
    local.write(0, arch::executor_code());
    local.write(PROGRAMS as usize, &image);
    let args = libc::clone_args {
        flags: spawn.flags,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: spawn.exit_signal as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: if spawn.set_tid.is_empty() {
            0
        } else {
            spawn.set_tid.as_ptr() as u64
        },
        set_tid_size: spawn.set_tid.len() as u64,
        cgroup: 0,
    };
    let entries = base..base + (program.len() * ENTRY_SIZE) as u64;
    // SAFETY: the executor and its program were just written to the arena, which is mapped here;
    // `RootSpawn::flags` has no CLONE_VM.
    let pid = unsafe { arch::clone3_into_executor(&args, arena.base, entries, arena.signal.0) };
    if pid < 0 {
        return Err(InjectError::Spawn {
            pid: wanted,
            source: io::Error::from_raw_os_error(-pid as i32),
        });
    }
    // Not covered: killed before this, we leave a puppet that has not run its first call yet.
    let seized = Seized::puppet(HostPid(pid as i32), puppet_options())?;
    fault::point();
    seized.interrupt()?;
    Ok((arena, seized.wait_stopped()?))
}

/// What a puppet does until it is seized, which ends by EXIT_KILL taking over: it dies with its maker, also
/// when that was gone before the puppet could ask for it. Then reading from a pipe that only its maker
/// can write to ends, and so does the puppet.
fn waiting_program() -> io::Result<(Program, [OwnedFd; 2])> {
    let (out, into) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let mut program = Program::new();
    let byte = program.buffer(&[0]);
    let own = Arg::from(into.as_raw_fd());
    program.try_call("close", libc::SYS_close, &[own]);
    program.try_call(
        "prctl(PR_SET_PDEATHSIG)",
        libc::SYS_prctl,
        &[Arg::from(libc::PR_SET_PDEATHSIG), Arg::from(libc::SIGKILL)],
    );
    let args = [Arg::from(out.as_raw_fd()), Arg::from(byte), Arg::from(1)];
    program.try_call("read", libc::SYS_read, &args);
    program.try_call("exit", libc::SYS_exit_group, &[Arg::from(1)]);
    Ok((program, [out, into]))
}

/// Trace options of puppets: they die with the coordinator, and no filter of theirs stops our calls.
pub fn puppet_options() -> u32 {
    options::EXIT_KILL | options::TRACE_SYSGOOD | options::SUSPEND_SECCOMP
}

/// The arena in this process while the first puppet is being made.
struct LocalMapping {
    base: *mut libc::c_void,
    len: usize,
}

impl LocalMapping {
    fn new(arena: &Arena) -> Result<Self, InjectError> {
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE
            | libc::MAP_ANONYMOUS
            | libc::MAP_NORESERVE
            | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: MAP_FIXED_NOREPLACE never replaces a mapping that something here may use.
        let base = unsafe {
            libc::mmap(
                arena.base as *mut libc::c_void,
                arena.len,
                prot,
                flags,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(InjectError::MapArena {
                bytes: arena.len,
                source: io::Error::last_os_error(),
            });
        }
        Ok(Self {
            base,
            len: arena.len,
        })
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(
            offset + bytes.len() <= self.len,
            "the first program is small"
        );
        // SAFETY: the range lies inside the mapping, as asserted, and nothing else refers to it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.base.cast::<u8>().add(offset),
                bytes.len(),
            )
        };
    }
}

impl Drop for LocalMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference into it exists.
        unsafe { libc::munmap(self.base, self.len) };
    }
}
