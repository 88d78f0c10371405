//! Single system calls in stopped threads, through an instruction that is there already.

use std::borrow::Cow;
use std::io;
use std::ops::Range;

use floe_kernel::ids::{HostPid, TaskAddr};
use floe_kernel::ptrace::{self, WaitStatus};
use floe_kernel::vm;

use crate::arch;
use crate::error::{InjectError, OnTask};
use crate::tracee::{Stopped, wait_for_stop};

/// Makes one system call in a stopped thread through a `syscall` instruction at `gate`.
///
/// The thread is left at the exit of the call: not one instruction after it has run.
pub fn remote_call(
    thread: &mut Stopped,
    gate: u64,
    call: (Cow<'static, str>, i64),
    args: [u64; 6],
) -> Result<i64, InjectError> {
    let mut call = RemoteCall {
        thread,
        gate,
        call,
        args,
    };
    call.begin()?;
    call.pass_entry()?;
    call.end()
}

/// Makes one call in each of many threads, at the same time; the results in their order.
pub(crate) fn remote_calls(calls: &mut [RemoteCall<'_>]) -> Vec<Result<i64, InjectError>> {
    let begun: Vec<_> = calls.iter_mut().map(RemoteCall::begin).collect();
    let passed: Vec<_> = calls
        .iter_mut()
        .zip(begun)
        .map(|(call, begun)| begun.and_then(|()| call.pass_entry()))
        .collect();
    calls
        .iter_mut()
        .zip(passed)
        .map(|(call, passed)| passed.and_then(|()| call.end()))
        .collect()
}

/// A system call in a stopped thread, which is over when it was begun, passed its entry, and ended.
pub(crate) struct RemoteCall<'t> {
    pub thread: &'t mut Stopped,
    /// The address of a `syscall` instruction.
    pub gate: u64,
    /// Its name in errors, and its number.
    pub call: (Cow<'static, str>, i64),
    pub args: [u64; 6],
}

impl RemoteCall<'_> {
    fn begin(&mut self) -> Result<(), InjectError> {
        let pid = self.thread.pid();
        let mut regs = self.thread.save()?.regs;
        arch::aim_at_call(&mut regs, self.gate, self.call.1, self.args);
        ptrace::set_regs(pid, &regs).on(pid, "setregs")?;
        ptrace::set_sigmask(pid, u64::MAX).on(pid, "setsigmask")?;
        ptrace::cont_to_syscall(pid, 0).on(pid, "syscall")
    }

    fn pass_entry(&mut self) -> Result<(), InjectError> {
        self.wait("the entry of a call")?;
        let pid = self.thread.pid();
        ptrace::cont_to_syscall(pid, 0).on(pid, "syscall")
    }

    fn end(&mut self) -> Result<i64, InjectError> {
        self.wait("the exit of a call")?;
        let pid = self.thread.pid();
        let result = arch::call_result(&ptrace::regs(pid).on(pid, "getregs")?);
        if (-4095..0).contains(&result) {
            let source = io::Error::from_raw_os_error(-result as i32);
            return Err(InjectError::Call {
                pid,
                label: self.call.0.clone(),
                index: 0,
                source,
            });
        }
        Ok(result)
    }

    fn wait(&mut self, expected: &'static str) -> Result<(), InjectError> {
        let pid = self.thread.pid();
        loop {
            match wait_for_stop(pid)? {
                WaitStatus::Syscall => return Ok(()),
                WaitStatus::Event {
                    event: ptrace::EVENT_STOP,
                    ..
                } => {}
                WaitStatus::Signal(signal @ (libc::SIGSTOP | libc::SIGCONT)) => {
                    self.thread.put_off(signal)
                }
                status => {
                    return Err(InjectError::UnexpectedStop {
                        pid,
                        status,
                        expected,
                    });
                }
            }
            ptrace::cont_to_syscall(pid, 0).on(pid, "syscall")?;
        }
    }
}

/// Finds a `syscall` instruction in executable memory of a task; the vDSO has one.
pub fn find_gate(pid: HostPid, executable: Range<u64>) -> Result<u64, InjectError> {
    const CHUNK: usize = 64 * 1024;
    let mut chunk = vec![0u8; CHUNK];
    let mut at = executable.start;
    while at < executable.end {
        let len = CHUNK.min((executable.end - at) as usize);
        if vm::read_exact(pid, TaskAddr(at), &mut chunk[..len]).is_err() {
            break;
        }
        let found = chunk[..len]
            .windows(2)
            .position(|pair| pair == arch::SYSCALL_INSTRUCTION);
        if let Some(offset) = found {
            return Ok(at + offset as u64);
        }
        at += len as u64;
    }
    Err(InjectError::NoGate { pid })
}
