//! A puppet for tests to make into something.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use floe_image::messages::{CoreEntry, MmEntry, SeccompFilter};
use floe_inject::{
    ARENA_BYTES, Arena, Arg, Outcome, Program, RootSpawn, Seized, Stopped, spawn_root,
};
use floe_kernel::features::KernelFeatures;
use floe_kernel::ids::HostPid;
use floe_kernel::proc::{Status, parse_status};
use floe_kernel::ptrace::{self, WaitStatus};
use floe_resources::namespace::OwnerMap;
use floe_resources::namespace::nested::Nested;
use floe_resources::task::rebuild::{Birth, TaskContext, plan_last, plan_task, plan_thread};

/// A puppet with the memory of this test, and what its plans depend on.
pub struct Fixture {
    pub arena: Arena,
    pub puppet: Stopped,
    pub birth: Birth,
    pub features: KernelFeatures,
    pub mm: MmEntry,
    pub seccomp: Vec<SeccompFilter>,
    pub nested: Nested,
    pub owners: OwnerMap,
    threads: Vec<HostPid>,
}

impl Fixture {
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0x1000_0000);
        let spawn = RootSpawn {
            flags: 0,
            set_tid: vec![],
            exit_signal: libc::SIGCHLD,
            arena: NEXT.fetch_add(2 * ARENA_BYTES as u64, Ordering::Relaxed),
            arena_bytes: ARENA_BYTES,
        };
        let (arena, puppet) = spawn_root(&spawn).unwrap();
        let mut fixture = Fixture {
            arena,
            puppet,
            birth: Birth::of_this_thread().unwrap(),
            features: KernelFeatures::probe(),
            mm: MmEntry::default(),
            seccomp: Vec::new(),
            nested: Nested::default(),
            owners: OwnerMap::default(),
            threads: Vec::new(),
        };
        fixture.forget_rseq();
        fixture
    }

    fn forget_rseq(&mut self) {
        let rseq = ptrace::rseq_configuration(self.puppet.pid()).unwrap();
        if rseq.rseq_abi_pointer != 0 {
            let (at, size, signature) = (rseq.rseq_abi_pointer, rseq.rseq_abi_size, rseq.signature);
            let args = [at, u64::from(size), 1, u64::from(signature)];
            self.call(libc::SYS_rseq, &args);
        }
    }

    pub fn context(&self) -> TaskContext<'_> {
        TaskContext {
            tid: 1,
            features: &self.features,
            birth: &self.birth,
            mm: Some(&self.mm),
            loses_parent: false,
            seccomp: &self.seccomp,
            nested: &self.nested,
            owners: &self.owners,
            own_owners: &self.owners,
        }
    }

    /// Runs all three programs.
    pub fn become_task(&mut self, core: &CoreEntry) {
        self.run(&plan_task(core, &self.context()).unwrap());
        self.run(&plan_thread(core, &self.context()).unwrap());
        self.run(&plan_last(core, &self.context()).unwrap());
    }

    pub fn run(&mut self, program: &Program) -> Outcome {
        self.arena.run(&mut self.puppet, program).unwrap()
    }

    pub fn call(&mut self, number: i64, args: &[u64]) -> i64 {
        let mut program = Program::new();
        let args: Vec<Arg> = args.iter().copied().map(Arg::from).collect();
        let call = program.call("a call of the test", number, &args);
        self.run(&program).result(call)
    }

    /// What a call writes to the buffer that its last argument points at.
    pub fn ask(&mut self, number: i64, args: &[u64]) -> Vec<u8> {
        let mut program = Program::new();
        let answer = program.zeroed(32);
        let mut args: Vec<Arg> = args.iter().copied().map(Arg::from).collect();
        args.push(Arg::from(answer));
        program.call("a question of the test", number, &args);
        self.run(&program).data(answer).to_vec()
    }

    /// Makes a thread, stopped before its first instruction.
    pub fn thread(&mut self) -> Stopped {
        const CLONE_ARGS: u64 = 88;
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM
            | libc::CLONE_PTRACE;
        let mut program = Program::new();
        let mut args = vec![0; CLONE_ARGS as usize];
        args[..8].copy_from_slice(&(flags as u64).to_le_bytes());
        let args = program.buffer(&args);
        let label = "clone3 of a thread";
        let call = program.call(
            label,
            libc::SYS_clone3,
            &[Arg::from(args), Arg::from(CLONE_ARGS)],
        );
        let tid = HostPid(self.run(&program).result(call) as i32);
        self.threads.push(tid);
        Seized::born(tid).wait_stopped().unwrap()
    }

    /// Runs the last program of a thread.
    pub fn finish_thread(&mut self, thread: &mut Stopped, core: &CoreEntry) {
        let program = plan_last(core, &self.context()).unwrap();
        self.arena.run(thread, &program).unwrap();
    }

    pub fn pid(&self) -> HostPid {
        self.puppet.pid()
    }

    pub fn proc(&self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.pid())).unwrap()
    }

    pub fn status(&self) -> Status {
        parse_status(self.proc("status").as_bytes()).unwrap()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = floe_kernel::pidfd::tgkill(self.pid(), libc::SIGKILL);
        // The kernel reports the leader's end when all other threads have been waited for.
        for pid in self.threads.iter().copied().chain([self.pid()]) {
            while let Ok(Some((_, status))) = ptrace::wait(pid, 0) {
                if matches!(status, WaitStatus::Killed(_) | WaitStatus::Exited(_)) {
                    break;
                }
            }
        }
    }
}

impl Fixture {
    pub fn ask_action(&mut self, signal: i32) -> [u64; 4] {
        let mut program = Program::new();
        let answer = program.zeroed(32);
        let args = [
            Arg::from(signal),
            Arg::from(0),
            Arg::from(answer),
            Arg::from(8),
        ];
        program.call("rt_sigaction", libc::SYS_rt_sigaction, &args);
        let outcome = self.run(&program);
        [0, 8, 16, 24].map(|at| outcome.word(answer, at))
    }
}
