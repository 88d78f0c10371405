//! The executor in a real child process.

use std::process::{Child, Command};
use std::time::{Duration, Instant};

use floe_inject::{
    ARENA_BYTES, Arena, Arg, Program, QuietSignal, RootSpawn, Seized, Stopped, find_gate,
    spawn_root,
};
use floe_kernel::ids::HostPid;
use floe_kernel::ptrace::options;

struct Sleeper(Child);

impl Sleeper {
    /// Starts `sleep` and waits until it does.
    fn start() -> Self {
        let sleeper = Sleeper(
            Command::new("sleep")
                .arg("1000")
                .spawn()
                .expect("sleep is installed"),
        );
        let deadline = Instant::now() + Duration::from_secs(10);
        let call = format!("/proc/{}/syscall", sleeper.0.id());
        let asleep = format!("{} ", libc::SYS_clock_nanosleep);
        while !std::fs::read_to_string(&call).unwrap().starts_with(&asleep) {
            assert!(Instant::now() < deadline, "sleep never slept");
            std::thread::yield_now();
        }
        sleeper
    }

    fn stop(&self) -> Stopped {
        let seized = Seized::new(HostPid(self.0.id() as i32), options::TRACE_SYSGOOD).unwrap();
        seized.interrupt().unwrap();
        seized.wait_stopped().unwrap()
    }

    fn maps(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/maps", self.0.id())).unwrap()
    }

    fn vdso(&self) -> std::ops::Range<u64> {
        let maps = self.maps();
        let line = maps
            .lines()
            .find(|line| line.ends_with("[vdso]"))
            .expect("a task has a vDSO");
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        u64::from_str_radix(start, 16).unwrap()..u64::from_str_radix(end, 16).unwrap()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_program_runs_and_leaves_no_trace() {
    let sleeper = Sleeper::start();
    let mut thread = sleeper.stop();
    let before = sleeper.maps();
    let regs = thread.regs().unwrap();
    let gate = find_gate(thread.pid(), sleeper.vdso()).unwrap();
    let arena = Arena::inject(&mut thread, gate, QuietSignal::choose(0, 0)).unwrap();

    let mut program = Program::new();
    let buffer = program.zeroed(8);
    let pids: Vec<_> = (0..700)
        .map(|_| program.call("getpid", libc::SYS_getpid, &[]))
        .collect();
    let same = program.call("getpgid", libc::SYS_getpgid, &[Arg::from(pids[0])]);
    let path = program.buffer(b"/dev/null\0");
    let fd = program.call(
        "open",
        libc::SYS_open,
        &[Arg::from(path), Arg::from(libc::O_RDWR)],
    );
    program.call("close", libc::SYS_close, &[Arg::from(fd)]);
    program.call(
        "getrandom",
        libc::SYS_getrandom,
        &[Arg::from(buffer), Arg::from(8u64), Arg::from(0u64)],
    );
    let start = Instant::now();
    let outcome = arena.run(&mut thread, &program).unwrap();
    eprintln!("700 calls in {:?}", start.elapsed());
    assert!(
        pids.iter()
            .all(|&call| outcome.result(call) == i64::from(sleeper.0.id()))
    );
    assert!(outcome.result(same) > 0);
    assert_ne!(outcome.word(buffer, 0), 0);

    let mut failing = Program::new();
    failing.try_call("close of nothing", libc::SYS_close, &[Arg::from(9999)]);
    failing.call("close of fd 9998", libc::SYS_close, &[Arg::from(9998)]);
    failing.call("never", libc::SYS_exit_group, &[Arg::from(1)]);
    let error = arena.run(&mut thread, &failing).unwrap_err();
    assert!(error.to_string().contains("close of fd 9998"), "{error}");
    assert_eq!(error.errno(), Some(libc::EBADF));

    assert_ne!(before, sleeper.maps());
    arena.remove(&mut thread).unwrap();
    thread.release().unwrap();
    assert_eq!(before, sleeper.maps());
    let thread = sleeper.stop();
    let after = thread.regs().unwrap();
    assert_eq!(
        (regs.rip, regs.rsp, regs.rbx, regs.rbp),
        (after.rip, after.rsp, after.rbx, after.rbp)
    );
}

#[test]
fn a_puppet_is_a_task_with_one_page() {
    let spawn = RootSpawn {
        flags: 0,
        set_tid: vec![],
        exit_signal: libc::SIGCHLD,
        arena: 0x1000_0000,
        arena_bytes: ARENA_BYTES,
    };
    let start = Instant::now();
    let (arena, mut puppet) = spawn_root(&spawn).unwrap();
    let pid = puppet.pid();
    let rseq = floe_kernel::ptrace::rseq_configuration(pid).unwrap();
    let mut program = Program::new();
    if rseq.rseq_abi_pointer != 0 {
        let args = [
            rseq.rseq_abi_pointer,
            u64::from(rseq.rseq_abi_size),
            1,
            u64::from(rseq.signature),
        ]
        .map(Arg::from);
        program.call("rseq(unregister)", libc::SYS_rseq, &args);
    }
    let range = arena.range();
    program.call(
        "munmap below",
        libc::SYS_munmap,
        &[Arg::from(0u64), Arg::from(range.start)],
    );
    program.call(
        "munmap above",
        libc::SYS_munmap,
        &[
            Arg::from(range.end),
            Arg::from(floe_inject::TASK_SIZE - range.end),
        ],
    );
    arena.run(&mut puppet, &program).unwrap();
    eprintln!("puppet in {:?}", start.elapsed());
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    assert_eq!(
        maps.lines()
            .filter(|line| !line.contains("vsyscall"))
            .count(),
        1,
        "{maps}"
    );
    let mut fork = Program::new();
    let args = fork.buffer(&clone_args(libc::CLONE_PTRACE as u64));
    let child = fork.call(
        "clone3",
        libc::SYS_clone3,
        &[Arg::from(args), Arg::from(88u64)],
    );
    let outcome = arena.run(&mut puppet, &fork).unwrap();
    let child = HostPid(outcome.result(child) as i32);
    let mut child = Seized::born(child).wait_stopped().unwrap();
    let mut who = Program::new();
    let parent = who.call("getppid", libc::SYS_getppid, &[]);
    let outcome = arena.run(&mut child, &who).unwrap();
    assert_eq!(outcome.result(parent), i64::from(pid.0));
    let who = arena
        .call(&mut child, ("getppid", libc::SYS_getppid), [0; 6])
        .unwrap();
    assert_eq!(who, i64::from(pid.0));
    // Both are killed when they are dropped.
}

#[test]
fn an_appended_program_finds_its_own_results_and_buffers() {
    let sleeper = Sleeper::start();
    let mut thread = sleeper.stop();
    let gate = find_gate(thread.pid(), sleeper.vdso()).unwrap();
    let arena = Arena::inject(&mut thread, gate, QuietSignal::PUPPET).unwrap();
    let mut first = Program::new();
    first.zeroed(24);
    first.call("getpid", libc::SYS_getpid, &[]);
    let mut second = Program::new();
    let ends = second.zeroed(8);
    let pipe = second.call("pipe2", libc::SYS_pipe2, &[Arg::from(ends), Arg::from(0)]);
    let own = second.call("getpid", libc::SYS_getpid, &[]);
    let group = second.call("getpgid", libc::SYS_getpgid, &[Arg::from(own)]);
    second.call(
        "close_range",
        libc::SYS_close_range,
        &[Arg::from(3), Arg::from(u32::MAX), Arg::from(0)],
    );
    let mut both = first.clone();
    both.append(&second);
    let outcome = arena.run(&mut thread, &both).unwrap().behind(&first);
    assert_eq!(outcome.result(pipe), 0);
    assert_ne!(outcome.word(ends, 0), 0);
    assert_eq!(outcome.result(own), i64::from(thread.pid().0));
    assert!(outcome.result(group) > 0);
    arena.remove(&mut thread).unwrap();
    thread.release().unwrap();
}

#[test]
fn executors_of_many_tasks_come_and_go_together() {
    let sleepers: Vec<Sleeper> = (0..3).map(|_| Sleeper::start()).collect();
    let mut threads: Vec<Stopped> = sleepers.iter().map(Sleeper::stop).collect();
    let before: Vec<String> = sleepers.iter().map(Sleeper::maps).collect();
    let gates = sleepers
        .iter()
        .map(|sleeper| find_gate(HostPid(sleeper.0.id() as i32), sleeper.vdso()).unwrap());
    let gates: Vec<u64> = gates.collect();
    let wanted = threads.iter_mut().zip(gates);
    let arenas =
        Arena::inject_all(wanted.map(|(thread, gate)| (thread, gate, QuietSignal::PUPPET)));
    let arenas: Vec<Arena> = arenas.into_iter().map(Result::unwrap).collect();
    for (sleeper, arena) in sleepers.iter().zip(&arenas) {
        assert!(
            sleeper
                .maps()
                .contains(&format!("{:x}-", arena.range().start))
        );
    }
    Arena::remove_all(arenas.into_iter().zip(&mut threads)).unwrap();
    let after: Vec<String> = sleepers.iter().map(Sleeper::maps).collect();
    assert_eq!(before, after);
}

fn clone_args(flags: u64) -> Vec<u8> {
    let words = [flags, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0, 0, 0, 0];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
