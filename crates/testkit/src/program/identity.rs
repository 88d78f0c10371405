//! What a task is called, where it stands, who it is, and what it may do.

use std::fs;

use anyhow::ensure;

use super::tasks::stat;
use super::{Check, Place, Program, all, fact, unchanged};
use crate::sys::task;

pub const PROGRAMS: &[Program] = &[
    Program::new("identity", identity),
    Program::new("settings", settings),
    Program::new("personality", personality),
    Program::new("parent-death", parent_death),
    Program::new("credentials", credentials),
    Program::new("thread-credentials", thread_credentials),
    Program::new("limits", limits),
    Program::new("seccomp-filter", seccomp_filter),
    Program::new("registrations", registrations),
    Program::new("rseq", rseq),
];

fn read(name: &str) -> anyhow::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(format!("/proc/self/{name}"))?).into_owned())
}

fn link(name: &str) -> anyhow::Result<String> {
    Ok(fs::read_link(format!("/proc/self/{name}"))?
        .display()
        .to_string())
}

/// Names, command line, environment, pointers to them, directories, umask.
fn identity(place: &Place) -> anyhow::Result<Check> {
    let directory = place.path("here");
    fs::create_dir(&directory)?;
    std::env::set_current_dir(&directory)?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o027));
    rustix::thread::set_name(c"a new name")?;
    unchanged(|| {
        // Code, stack, data, heap, arguments and environment: proc_pid_stat(5).
        let places = [26, 27, 28, 45, 46, 47, 48, 49, 50, 51];
        let status = read("status")?;
        let umask = status.lines().find(|line| line.starts_with("Umask"));
        Ok(vec![
            fact("exe", link("exe")?),
            fact("cwd", link("cwd")?),
            fact("root", link("root")?),
            fact("comm", read("comm")?),
            fact("cmdline", read("cmdline")?),
            fact("environ", read("environ")?),
            fact("auxv", format!("{:?}", fs::read("/proc/self/auxv")?)),
            fact(
                "places",
                stat(std::process::id() as i32, &places)?.join(" "),
            ),
            fact("umask", umask.unwrap_or_default()),
        ])
    })
}

/// Scheduling, the out-of-memory killer, and what `prctl` sets.
fn settings(_: &Place) -> anyhow::Result<Check> {
    rustix::process::nice(5)?;
    fs::write("/proc/self/oom_score_adj", "321")?;
    for (option, value) in [(libc::PR_SET_THP_DISABLE, 1), (libc::PR_SET_DUMPABLE, 0)] {
        task::control(option, value)?;
    }
    let dumpable = || task::control(libc::PR_GET_DUMPABLE, 0);
    unchanged(move || {
        Ok(vec![
            fact(
                "nice and policy",
                stat(std::process::id() as i32, &[19, 40, 41])?.join(" "),
            ),
            fact("oom_score_adj", read("oom_score_adj")?),
            fact("dumpable", dumpable()?),
            fact("THP disabled", task::control(libc::PR_GET_THP_DISABLE, 0)?),
        ])
    })
}

fn personality(_: &Place) -> anyhow::Result<Check> {
    // ADDR_NO_RANDOMIZE: changes nothing for a program that runs.
    task::personality(0x004_0000);
    unchanged(|| Ok(vec![fact("personality", task::personality(u32::MAX))]))
}

/// A child that wants to hear of its parent's end, and one that adopts orphans.
fn parent_death(place: &Place) -> anyhow::Result<Check> {
    let mut child = super::tasks::Child::start(place, |_| {
        task::control(libc::PR_SET_PDEATHSIG, libc::SIGUSR2 as u64)?;
        task::control(libc::PR_SET_CHILD_SUBREAPER, 1)?;
        unchanged(|| {
            Ok(vec![
                fact(
                    "signal",
                    format!("{:?}", rustix::process::parent_process_death_signal()?),
                ),
                fact(
                    "subreaper",
                    format!("{:?}", rustix::process::child_subreaper()?),
                ),
            ])
        })
    })?;
    Ok(Box::new(move || child.check()))
}

/// Lines of `status` that say who a thread is.
fn rights(path: &str) -> anyhow::Result<Vec<(String, String)>> {
    let names = [
        "Uid",
        "Gid",
        "Groups",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp:",
    ];
    let status = fs::read_to_string(format!("/proc/{path}/status"))?;
    Ok(status
        .lines()
        .filter(|line| names.iter().any(|name| line.starts_with(name)))
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| fact(name, value))
        .collect())
}

/// A user without root's rights but for two capabilities.
fn credentials(_: &Place) -> anyhow::Result<Check> {
    const CAP_NET_BIND_SERVICE: u32 = 1 << 10;
    const CAP_SYS_NICE: u32 = 1 << 23;
    task::become_user(
        12_345,
        23_456,
        &[7, 77, 777],
        CAP_NET_BIND_SERVICE | CAP_SYS_NICE,
    )?;
    unchanged(|| rights("self"))
}

/// A thread that gave up a capability that the others have.
fn thread_credentials(_: &Place) -> anyhow::Result<Check> {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let result = task::become_user(4321, 4321, &[5], 1 << 23);
        let _ = send.send((result, rustix::thread::gettid()));
        loop {
            std::thread::park();
        }
    });
    let (result, tid) = receive.recv()?;
    result?;
    let path = format!("self/task/{}", tid.as_raw_nonzero());
    Ok(all(vec![
        unchanged(|| rights("thread-self"))?,
        unchanged(move || rights(&path))?,
    ]))
}

fn limits(_: &Place) -> anyhow::Result<Check> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    for (resource, current, maximum) in [
        (Resource::Nofile, 300, 600),
        (Resource::Core, 0, 1 << 20),
        (Resource::Stack, 4 << 20, 64 << 20),
        (Resource::Cpu, 10_000, 20_000),
    ] {
        setrlimit(
            resource,
            Rlimit {
                current: Some(current),
                maximum: Some(maximum),
            },
        )?;
    }
    unchanged(|| Ok(vec![fact("limits", read("limits")?)]))
}

/// A filter that refuses one call, in a task and its child.
fn seccomp_filter(place: &Place) -> anyhow::Result<Check> {
    task::forbid(libc::SYS_getpriority as u32, 77)?;
    let refused = || {
        let errno = task::priority_errno();
        ensure!(errno == Some(77), "the filter answered {errno:?}");
        Ok(())
    };
    let mut child = super::tasks::Child::start(place, |_| Ok(Box::new(refused)))?;
    let mut same = unchanged(|| rights("self"))?;
    Ok(Box::new(move || {
        refused()?;
        child.check()?;
        same()
    }))
}

/// Addresses that each thread told the kernel.
fn registrations(_: &Place) -> anyhow::Result<Check> {
    let take = || -> anyhow::Result<Vec<(String, String)>> {
        let (head, length) = task::robust_list()?;
        Ok(vec![
            fact("robust list", format!("{head:#x} {length}")),
            fact("tid address", format!("{:#x}", task::tid_address()?)),
        ])
    };
    let (ask, questions) = std::sync::mpsc::channel::<()>();
    let (answer, answers) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for () in questions {
            let _ = answer.send(take());
        }
    });
    unchanged(move || {
        ask.send(())?;
        let mut facts = answers.recv()??;
        facts.extend(take()?);
        Ok(facts)
    })
}

/// The kernel goes on writing the CPU's number where the C library registered.
fn rseq(_: &Place) -> anyhow::Result<Check> {
    if task::rseq_cpu().is_none() {
        return Err(super::Missing("the C library registers no rseq area".into()).into());
    }
    Ok(Box::new(|| {
        for cpu in [0, 1, 0] {
            if task::pin(cpu).is_ok() {
                let seen = task::rseq_cpu();
                ensure!(
                    seen == Some(cpu as u32),
                    "on CPU {cpu} the area says {seen:?}"
                );
            }
        }
        Ok(())
    }))
}
