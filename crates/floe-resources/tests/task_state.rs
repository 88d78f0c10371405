//! Puppets that give themselves the state of a task, held against what the kernel then tells.

mod puppet;

use floe_image::messages::*;
use floe_kernel::proc::parse_timers;
use floe_kernel::ptrace::{self, SignalQueue};
use floe_kernel::thread::{robust_list, scheduling};
use floe_resources::restore::PlanError;
use floe_resources::task::attributes::encode_personality;
use floe_resources::task::credentials::Credentials;
use floe_resources::task::rebuild::{Birth, fpu, plan_last};
use puppet::Fixture;

/// A leader with nothing but defaults.
fn leader() -> CoreEntry {
    CoreEntry {
        tc: Some(TaskCoreEntry {
            comm: "puppet".to_string(),
            ..TaskCoreEntry::default()
        }),
        thread_core: Some(ThreadCoreEntry::default()),
        ..CoreEntry::default()
    }
}

fn task(core: &mut CoreEntry) -> &mut TaskCoreEntry {
    core.tc.as_mut().unwrap()
}

fn thread(core: &mut CoreEntry) -> &mut ThreadCoreEntry {
    core.thread_core.as_mut().unwrap()
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: needs root");
    }
    root
}

fn halves(set: u64) -> Vec<u32> {
    vec![set as u32, (set >> 32) as u32]
}

/// Credentials of a service that gave up root and kept two capabilities, one of them ambient.
fn service(birth: &Birth) -> CredsEntry {
    const NET_BIND: u64 = 1 << 10;
    const NET_RAW: u64 = 1 << 13;
    CredsEntry {
        uid: 1000,
        euid: 1001,
        suid: 1002,
        fsuid: 1003,
        gid: 2000,
        egid: 2001,
        sgid: 2002,
        fsgid: 2003,
        groups: vec![44, 7, 2000],
        cap_inh: halves(NET_BIND),
        cap_prm: halves(NET_BIND | NET_RAW),
        cap_eff: halves(NET_BIND),
        cap_bnd: halves(birth.credentials.bounding & 0xff00),
        cap_amb: halves(NET_BIND),
        // SECBIT_KEEP_CAPS and NO_CAP_AMBIENT_RAISE with its lock.
        secbits: 0b1101_0000,
        no_new_privs: Some(1),
        ..CredsEntry::default()
    }
}

#[test]
fn credentials_are_those_of_the_image() {
    if !is_root() {
        return;
    }
    let mut fixture = Fixture::new();
    let mut core = leader();
    let entry = service(&fixture.birth);
    thread(&mut core).creds = Some(entry.clone());
    thread(&mut core).pdeath_sig = Some(libc::SIGHUP as u32);
    fixture.mm.dumpable = Some(1);
    fixture.become_task(&core);
    let wanted = Credentials::from_entry(&entry).unwrap();
    let securebits = fixture.call(libc::SYS_prctl, &[libc::PR_GET_SECUREBITS as u64]);
    let found = Credentials::from_status(&fixture.status(), securebits as u32);
    assert_eq!(found, wanted);
    let signal = fixture.ask(libc::SYS_prctl, &[libc::PR_GET_PDEATHSIG as u64]);
    assert_eq!(i32::from(signal[0]), libc::SIGHUP);
    let dumpable = fixture.call(libc::SYS_prctl, &[libc::PR_GET_DUMPABLE as u64]);
    assert_eq!(dumpable, 1);
}

#[test]
fn credentials_that_are_inherited_cost_no_call() {
    let fixture = Fixture::new();
    let mut core = leader();
    core.tc = None;
    let born = &fixture.birth.credentials;
    let sets = [
        born.inheritable,
        born.permitted,
        born.effective,
        born.bounding,
        born.ambient,
    ];
    let [cap_inh, cap_prm, cap_eff, cap_bnd, cap_amb] = sets.map(halves);
    thread(&mut core).creds = Some(CredsEntry {
        uid: born.uids[0],
        euid: born.uids[1],
        suid: born.uids[2],
        fsuid: born.uids[3],
        gid: born.gids[0],
        egid: born.gids[1],
        sgid: born.gids[2],
        fsgid: born.gids[3],
        groups: born.groups.clone(),
        cap_inh,
        cap_prm,
        cap_eff,
        cap_bnd,
        cap_amb,
        secbits: born.securebits,
        no_new_privs: Some(u32::from(born.no_new_privs)),
        ..CredsEntry::default()
    });
    assert!(plan_last(&core, &fixture.context()).unwrap().is_empty());
}

#[test]
fn capabilities_that_we_lack_are_named() {
    let mut fixture = Fixture::new();
    fixture.birth.credentials.permitted &= !(1 << 12);
    let mut core = leader();
    let mut entry = service(&fixture.birth);
    entry.cap_prm = halves(1 << 12);
    thread(&mut core).creds = Some(entry);
    let error = plan_last(&core, &fixture.context()).unwrap_err();
    assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
}

fn action(handler: u64, flags: u64) -> SaEntry {
    SaEntry {
        sigaction: handler,
        flags,
        restorer: if handler > 1 { 0x5000 } else { 0 },
        mask: if handler > 1 { 1 << 20 } else { 0 },
        ..SaEntry::default()
    }
}

/// The siginfo of `sigqueue(3)` with a value.
fn siginfo(signal: i32, value: u64) -> SiginfoEntry {
    let mut info = vec![0; 128];
    info[..4].copy_from_slice(&signal.to_le_bytes());
    info[8..12].copy_from_slice(&(-1i32).to_le_bytes());
    info[16..20].copy_from_slice(&4321u32.to_le_bytes());
    info[24..32].copy_from_slice(&value.to_le_bytes());
    SiginfoEntry { siginfo: info }
}

#[test]
fn actions_and_queues_are_those_of_the_image() {
    let mut fixture = Fixture::new();
    let mut core = leader();
    let mut actions = vec![action(0, 0); 62];
    // The list leaves out SIGKILL (9) and SIGSTOP (19).
    actions[libc::SIGUSR2 as usize - 2] = action(0x4000, 0x0400_0004);
    actions[libc::SIGTTOU as usize - 3] = action(1, 0);
    task(&mut core).sigactions = actions;
    let shared = vec![siginfo(libc::SIGUSR2, 1), siginfo(40, 2), siginfo(40, 3)];
    let private = vec![siginfo(41, 4), siginfo(libc::SIGCHLD, 5)];
    task(&mut core).signals_s = Some(SignalQueueEntry {
        signals: shared.clone(),
    });
    thread(&mut core).signals_p = Some(SignalQueueEntry {
        signals: private.clone(),
    });
    // Something that the restore has caused, to be forgotten.
    let pid = fixture.pid();
    floe_kernel::pidfd::tgkill(pid, libc::SIGCHLD).unwrap();
    fixture.become_task(&core);
    let masks = fixture.proc("status");
    let mask = |name: &str| {
        let line = masks.lines().find(|line| line.starts_with(name)).unwrap();
        u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
    };
    assert_eq!(mask("SigCgt"), 1 << (libc::SIGUSR2 - 1));
    assert_eq!(mask("SigIgn"), 1 << (libc::SIGTTOU - 1));
    let found = fixture.ask_action(libc::SIGUSR2);
    assert_eq!(found, [0x4000, 0x0400_0004, 0x5000, 1 << 20]);
    let queue = |queue, saved: &[SiginfoEntry]| {
        let found = ptrace::peek_siginfo(pid, queue).unwrap();
        let wanted: Vec<_> = saved.iter().map(|info| info.siginfo.clone()).collect();
        assert_eq!(
            found.iter().map(|info| info.to_vec()).collect::<Vec<_>>(),
            wanted
        );
    };
    queue(SignalQueue::Shared, &shared);
    queue(SignalQueue::Private, &private);
}

fn posix_timer(it_id: u32, notify: u32) -> PosixTimerEntry {
    PosixTimerEntry {
        it_id,
        clock_id: libc::CLOCK_MONOTONIC as u32,
        si_signo: libc::SIGUSR1 as u32,
        it_sigev_notify: notify,
        sival_ptr: 0xabc0 + u64::from(it_id),
        isec: 7,
        insec: 8,
        vsec: 500,
        vnsec: 0,
        ..PosixTimerEntry::default()
    }
}

fn timers_come_back(by_id: bool) {
    let mut fixture = Fixture::new();
    if by_id && !fixture.features.timer_restore_ids {
        println!("skipped: this kernel does not take timer ids");
        return;
    }
    fixture.features.timer_restore_ids = by_id;
    let mut core = leader();
    let mut for_thread = posix_timer(9, 4);
    for_thread.notify_thread_id = Some(fixture.pid().0);
    task(&mut core).timers = Some(TaskTimersEntry {
        real: ItimerEntry {
            isec: 3,
            iusec: 4,
            vsec: 1000,
            vusec: 0,
        },
        // About to expire when it was saved: it starts over.
        prof: ItimerEntry {
            isec: 900,
            iusec: 0,
            vsec: 0,
            vusec: 0,
        },
        virt: ItimerEntry::default(),
        posix: vec![for_thread, posix_timer(2, 0)],
    });
    fixture.become_task(&core);
    let timers = parse_timers(fixture.proc("timers").as_bytes()).unwrap();
    let mut found: Vec<_> = timers
        .iter()
        .map(|it| (it.id, it.value, it.thread))
        .collect();
    found.sort_unstable();
    assert_eq!(found, [(2, 0xabc2, false), (9, 0xabc9, true)]);
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let setting = fixture.ask(libc::SYS_timer_gettime, &[9]);
    assert_eq!((word(&setting, 0), word(&setting, 8)), (7, 8));
    assert!((490..=500).contains(&word(&setting, 16)));
    let real = fixture.ask(libc::SYS_getitimer, &[0]);
    assert_eq!((word(&real, 0), word(&real, 8)), (3, 4));
    assert!((990..=1000).contains(&word(&real, 16)));
    let prof = fixture.ask(libc::SYS_getitimer, &[2]);
    assert!((890..=900).contains(&word(&prof, 16)));
}

#[test]
fn timers_come_back_under_their_numbers() {
    timers_come_back(true);
}

#[test]
fn timers_come_back_on_kernels_that_take_no_numbers() {
    timers_come_back(false);
}

#[test]
fn a_number_out_of_reach_is_refused() {
    let mut fixture = Fixture::new();
    fixture.features.timer_restore_ids = false;
    let mut core = leader();
    task(&mut core).timers = Some(TaskTimersEntry {
        posix: vec![posix_timer(100_000, 0)],
        ..TaskTimersEntry::default()
    });
    let error = plan_last(&core, &fixture.context()).unwrap_err();
    assert!(matches!(error, PlanError::Missing { .. }), "{error}");
}

#[test]
fn lower_limits_are_set_and_higher_ones_refused() {
    const NOFILE: usize = 7;
    let mut fixture = Fixture::new();
    let mut core = leader();
    let born = fixture.birth.limits.clone();
    let entry = |limit: &floe_resources::task::rlimits::Limit| RlimitEntry {
        cur: limit.soft,
        max: limit.hard,
    };
    let mut rlimits: Vec<_> = born.iter().map(entry).collect();
    rlimits[NOFILE] = RlimitEntry { cur: 100, max: 200 };
    task(&mut core).rlimits = Some(TaskRlimitsEntry {
        rlimits: rlimits.clone(),
    });
    fixture.become_task(&core);
    let limits = fixture.proc("limits");
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .unwrap();
    assert_eq!(
        line.split_whitespace().skip(3).collect::<Vec<_>>(),
        ["100", "200", "files"]
    );

    fixture.birth.credentials.effective &= !(1 << 24);
    let hard = born[NOFILE].hard;
    rlimits[NOFILE] = RlimitEntry {
        cur: hard + 1,
        max: hard + 1,
    };
    task(&mut core).rlimits = Some(TaskRlimitsEntry { rlimits });
    let error = plan_last(&core, &fixture.context()).unwrap_err();
    assert!(error.to_string().contains("RLIMIT_NOFILE"), "{error}");
}

/// `return SECCOMP_RET_ERRNO | errno` for uname(2), allow the rest.
fn no_uname(errno: u32) -> Vec<u8> {
    let code: [(u16, u8, u8, u32); 4] = [
        (0x20, 0, 0, 0),
        (0x15, 0, 1, libc::SYS_uname as u32),
        (0x06, 0, 0, 0x0005_0000 | errno),
        (0x06, 0, 0, 0x7fff_0000),
    ];
    let mut bytes = Vec::new();
    for (code, jt, jf, k) in code {
        bytes.extend_from_slice(&code.to_le_bytes());
        bytes.extend_from_slice(&[jt, jf]);
        bytes.extend_from_slice(&k.to_le_bytes());
    }
    bytes
}

#[test]
fn filters_are_installed_oldest_first() {
    if !is_root() {
        return;
    }
    let mut fixture = Fixture::new();
    let filter = |errno, prev, flags| SeccompFilter {
        filter: no_uname(errno),
        prev,
        flags: Some(flags),
    };
    fixture.seccomp = vec![
        filter(1, None, 1),
        filter(2, None, 0),
        filter(3, Some(0), 3),
    ];
    let mut core = leader();
    let mut creds = service(&fixture.birth);
    creds.no_new_privs = None;
    thread(&mut core).creds = Some(creds);
    thread(&mut core).seccomp_mode = Some(SeccompMode::Filter as i32);
    thread(&mut core).seccomp_filter = Some(2);
    fixture.become_task(&core);
    let status = fixture.status();
    assert_eq!((status.seccomp, status.seccomp_filters), (2, 2));
    let found = |index| ptrace::seccomp_filter(fixture.pid(), index).unwrap();
    // The kernel counts from the oldest.
    assert_eq!([found(0), found(1)], [Some(no_uname(3)), Some(no_uname(1))]);
    assert_eq!(ptrace::seccomp_filter_flags(fixture.pid(), 0).unwrap(), 2);
    // Another thread waits for the leader's filters, which are marked as shared.
    core.tc = None;
    thread(&mut core).creds = None;
    thread(&mut core).seccomp_filter = Some(0);
    assert!(plan_last(&core, &fixture.context()).unwrap().is_empty());
}

#[test]
fn scheduling_and_attributes_are_those_of_the_image() {
    if !is_root() {
        return;
    }
    const SUBREAPER: u64 = 37;
    let mut fixture = Fixture::new();
    fixture.mm.dumpable = Some(0);
    fixture.mm.thp_disabled = Some(true);
    let page = fixture.call(libc::SYS_mmap, &[0, 4096, 3, 0x22, u64::MAX, 0]) as u64;
    let mut core = leader();
    core.thread_info = Some(ThreadInfoX86 {
        clear_tid_addr: page + 8,
        ..ThreadInfoX86::default()
    });
    let leader = task(&mut core);
    leader.comm = "a name too long for it".to_string();
    leader.personality = encode_personality(0x0044_0000);
    leader.child_subreaper = Some(true);
    // Private expedited, and its SYNC_CORE form.
    leader.membarrier_registration_mask = Some(1 << 4 | 1 << 6);
    let own = thread(&mut core);
    own.futex_rla = page;
    own.futex_rla_len = 24;
    own.sched_policy = Some(libc::SCHED_BATCH as u32);
    own.sched_nice = Some(7);
    own.sas = Some(ThreadSasEntry {
        ss_sp: page,
        ss_size: 4096 * 4,
        ss_flags: 1,
    });
    own.rseq_entry = Some(RseqEntry {
        rseq_abi_pointer: page + 64,
        rseq_abi_size: 32,
        signature: 0x53053053,
        rseq_cs_pointer: None,
    });
    fixture.become_task(&core);
    let pid = fixture.pid();
    assert_eq!(fixture.proc("comm"), "a name too long\n");
    assert!(fixture.proc("personality").trim().ends_with("440000"));
    let found = scheduling(pid).unwrap();
    assert_eq!((found.policy, found.nice), (libc::SCHED_BATCH as u32, 7));
    let (head, len) = robust_list(pid).unwrap();
    assert_eq!((head.0, len), (page, 24));
    let rseq = ptrace::rseq_configuration(pid).unwrap();
    assert_eq!(
        (rseq.rseq_abi_pointer, rseq.signature),
        (page + 64, 0x53053053)
    );
    let stack = fixture.ask(libc::SYS_sigaltstack, &[0]);
    assert_eq!(stack[..8], page.to_le_bytes());
    assert_eq!(fixture.ask(libc::SYS_prctl, &[SUBREAPER])[0], 1);
    assert_eq!(
        fixture.call(libc::SYS_prctl, &[libc::PR_GET_DUMPABLE as u64]),
        0
    );
    assert_eq!(
        fixture.call(libc::SYS_prctl, &[libc::PR_GET_THP_DISABLE as u64]),
        1
    );
    let registered = fixture.call(libc::SYS_membarrier, &[1 << 9]);
    assert_eq!(registered & 0x50, 0x50);
    let cleared = fixture.ask(libc::SYS_prctl, &[40]);
    assert_eq!(cleared[..8], (page + 8).to_le_bytes());
}

#[test]
fn fpu_state_is_set_component_by_component() {
    let fixture = Fixture::new();
    let pid = fixture.pid();
    let mut area = ptrace::xstate(pid).unwrap();
    let avx = floe_kernel::xsave::component_range(floe_kernel::xsave::XsaveComponent::Ymm);
    let entry = UserX86FpregsEntry {
        cwd: 0x37f,
        mxcsr: 0x1f80,
        st_space: (0..32).collect(),
        xmm_space: (100..164).collect(),
        xsave: Some(UserX86XsaveEntry {
            xstate_bv: if avx.is_some() { 0b111 } else { 0 },
            ymmh_space: (1000..1064).collect(),
            ..UserX86XsaveEntry::default()
        }),
        ..UserX86FpregsEntry::default()
    };
    fpu::from_image(&entry, &mut area, &fixture.context()).unwrap();
    ptrace::set_xstate(pid, &area).unwrap();
    let found = ptrace::xstate(pid).unwrap();
    // What the image says of it makes the same area again.
    let mut again = found.clone();
    again[512..].fill(0xff);
    fpu::from_image(&fpu::to_image(&found), &mut again, &fixture.context()).unwrap();
    assert!(again == found);
    let words = |at: usize, count: usize| -> Vec<u32> {
        let bytes = found[at..at + 4 * count].chunks_exact(4);
        bytes
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect()
    };
    assert_eq!(words(160, 64), entry.xmm_space);
    // x87 registers have 80 bits, in places of 128.
    assert_eq!(words(32, 2), [0, 1]);
    if let Some(avx) = avx {
        assert_eq!(words(avx.start, 64), entry.xsave.unwrap().ymmh_space);
    }
}

#[test]
fn fpu_state_of_another_cpu_is_refused_only_where_it_holds_something() {
    if floe_kernel::xsave::component_range(floe_kernel::xsave::XsaveComponent::BndRegs).is_some() {
        println!("skipped: this CPU has MPX");
        return;
    }
    let fixture = Fixture::new();
    let mut area = ptrace::xstate(fixture.pid()).unwrap();
    let entry = |bound| UserX86FpregsEntry {
        mxcsr: 0x1f80,
        st_space: vec![0; 32],
        xmm_space: vec![0; 64],
        xsave: Some(UserX86XsaveEntry {
            xstate_bv: 0b1011,
            bndreg_state: vec![bound; 8],
            ..UserX86XsaveEntry::default()
        }),
        ..UserX86FpregsEntry::default()
    };
    fpu::from_image(&entry(0), &mut area, &fixture.context()).unwrap();
    let error = fpu::from_image(&entry(5), &mut area, &fixture.context()).unwrap_err();
    assert!(error.to_string().contains("MPX bounds"), "{error}");
}

#[test]
fn threads_have_queues_and_credentials_of_their_own_and_the_filters_of_the_leader() {
    if !is_root() {
        return;
    }
    let mut fixture = Fixture::new();
    let mut thread_of = fixture.thread();
    fixture.seccomp = vec![SeccompFilter {
        filter: no_uname(1),
        prev: None,
        flags: Some(1),
    }];
    let mut core = leader();
    thread(&mut core).seccomp_mode = Some(SeccompMode::Filter as i32);
    thread(&mut core).seccomp_filter = Some(0);
    thread(&mut core).creds = Some(service(&fixture.birth));
    let mut other = CoreEntry {
        thread_core: Some(ThreadCoreEntry::default()),
        ..CoreEntry::default()
    };
    let signals = vec![siginfo(libc::SIGUSR1, 1), siginfo(50, 2)];
    thread(&mut other).signals_p = Some(SignalQueueEntry { signals });
    thread(&mut other).creds = Some(CredsEntry {
        uid: 3,
        ..service(&fixture.birth)
    });
    fixture.finish_thread(&mut thread_of, &other);
    fixture.become_task(&core);
    let tid = thread_of.pid();
    let status = std::fs::read(format!("/proc/{}/task/{tid}/status", fixture.pid())).unwrap();
    let status = floe_kernel::proc::parse_status(&status).unwrap();
    assert_eq!((status.uids[0], fixture.status().uids[0]), (3, 1000));
    assert_eq!((status.seccomp, status.seccomp_filters), (2, 1));
    let queue = |pid| {
        ptrace::peek_siginfo(pid, SignalQueue::Private)
            .unwrap()
            .len()
    };
    assert_eq!((queue(tid), queue(fixture.pid())), (2, 0));
    thread_of.forget();
}
