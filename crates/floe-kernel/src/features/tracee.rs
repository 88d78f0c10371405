//! A child of ours, stopped under ptrace with a seccomp filter that allows everything.
//!
//! Kernel contract: ptrace(2) PTRACE_SEIZE and PTRACE_INTERRUPT; the child does nothing but
//! wait, so it is stopped wherever it is. PTRACE_O_EXITKILL ends it if we die.

use std::io;

/// Owns the child; dropping it kills and reaps it.
pub(super) struct Tracee {
    pid: libc::pid_t,
}

impl Tracee {
    /// Forks the child and waits until it is stopped.
    pub(super) fn start() -> io::Result<Self> {
        // SAFETY: the child only makes system calls on its own stack and never returns, so that
        // locks held by other threads at the time of the fork do not matter.
        let pid = unsafe { libc::fork() };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        if pid == 0 {
            child();
        }
        let tracee = Self { pid };
        tracee.seize()?;
        Ok(tracee)
    }

    fn seize(&self) -> io::Result<()> {
        let mut status = 0;
        // SAFETY: `status` is a live int for the length of the call. The child stops itself when
        // its filter is in place.
        if unsafe { libc::waitpid(self.pid, &raw mut status, libc::WUNTRACED) } < 0 {
            return Err(io::Error::last_os_error());
        }
        self.request(
            libc::PTRACE_SEIZE as libc::c_long,
            0,
            libc::PTRACE_O_EXITKILL as usize,
        )?;
        self.request(libc::PTRACE_INTERRUPT as libc::c_long, 0, 0)?;
        // SAFETY: as above; a seized child reports its stop to its tracer.
        if unsafe { libc::waitpid(self.pid, &raw mut status, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// One ptrace request with plain numbers; the caller vouches for pointers among them.
    pub(super) fn request(
        &self,
        request: libc::c_long,
        addr: usize,
        data: usize,
    ) -> io::Result<i64> {
        // SAFETY: the child is ours and stopped; `addr` and `data` are numbers or point at live
        // buffers of the caller, who holds them over this call.
        let result = unsafe { libc::syscall(libc::SYS_ptrace, request, self.pid, addr, data) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(result)
        }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        let mut status = 0;
        // SAFETY: `pid` is our child and not reaped yet, so the number cannot have been reused.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            while libc::waitpid(self.pid, &raw mut status, 0) == self.pid
                && !libc::WIFEXITED(status)
                && !libc::WIFSIGNALED(status)
            {}
        }
    }
}

/// The child's whole life: a filter, then waiting.
fn child() -> ! {
    let mut allow = [libc::sock_filter {
        code: (libc::BPF_RET | libc::BPF_K) as u16,
        jt: 0,
        jf: 0,
        k: libc::SECCOMP_RET_ALLOW,
    }];
    let program = libc::sock_fprog {
        len: 1,
        filter: allow.as_mut_ptr(),
    };
    // SAFETY: only async-signal-safe calls; `program` and what it points at live on this stack.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        );
        libc::kill(libc::getpid(), libc::SIGSTOP);
        loop {
            libc::pause();
        }
    }
}
