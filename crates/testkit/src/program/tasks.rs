//! Tasks and threads: trees, sessions, groups, zombies, stopped tasks, shared tables.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use anyhow::{Context, anyhow, ensure};

use super::{Check, Place, Program, fact, serve, unchanged};
use crate::sys::task;

pub const PROGRAMS: &[Program] = &[
    Program::new("plain", plain),
    Program::new("threads", |_| threads(64)),
    Program::new("threads-few", |_| threads(3)),
    Program::new("register-count", register_count),
    Program::new("tree", tree),
    Program::new("zombies-stopped", zombies_and_stopped),
    Program::new("orphaned-session", orphaned_session),
    Program::new("shared-file", shared_file),
    Program::new("shared-table", shared_table),
    Program::new("deep-tree", deep_tree),
];

/// A child that checks its own state when its parent asks, over a pair of pipes.
pub struct Child {
    /// Its pid.
    pub pid: i32,
    ask: std::fs::File,
    answer: std::fs::File,
}

impl Child {
    /// Forks a child that runs `setup`; answers when the child is ready.
    pub fn start(
        place: &Place,
        setup: impl FnOnce(&Place) -> anyhow::Result<Check>,
    ) -> anyhow::Result<Self> {
        Self::start_sharing(0, place, setup)
    }

    /// The same with `CLONE_*` flags.
    pub fn start_sharing(
        share: i32,
        place: &Place,
        setup: impl FnOnce(&Place) -> anyhow::Result<Check>,
    ) -> anyhow::Result<Self> {
        let (question, ask) = rustix::pipe::pipe()?;
        let (answer, reply) = rustix::pipe::pipe()?;
        let keeps_table = share & libc::CLONE_FILES == 0;
        // Moved into the child as numbers where the table is shared: closing there closes here.
        let (question_fd, reply_fd) = (question.as_raw_fd(), reply.as_raw_fd());
        let pid = task::fork(share, || {
            // SAFETY: in the child both descriptors are its own, or are never closed by it.
            let mut question =
                std::mem::ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(question_fd) });
            // SAFETY: as above.
            let mut reply =
                std::mem::ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(reply_fd) });
            let ready = setup(place);
            let (mut check, first) = match ready {
                Ok(check) => (Some(check), "ok".to_owned()),
                Err(error) => (None, format!("{error:#}")),
            };
            let mut say = |text: String| {
                let line = format!("{}\n", text.replace('\n', "; "));
                reply.write_all(line.as_bytes()).is_ok()
            };
            if !say(first) {
                return 1;
            }
            let mut byte = [0];
            while question.read_exact(&mut byte).is_ok() {
                let result = check.as_mut().map_or(Ok(()), |check| check());
                if !say(result.map_or_else(|error| format!("{error:#}"), |()| "ok".into())) {
                    return 1;
                }
            }
            0
        })?;
        if keeps_table {
            drop((question, reply));
        } else {
            std::mem::forget((question, reply));
        }
        let mut child = Self {
            pid,
            ask: ask.into(),
            answer: answer.into(),
        };
        child.hear()?;
        Ok(child)
    }

    /// Lets the child check; its error is ours.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.ask.write_all(b"?").context("asking the child")?;
        self.hear()
    }

    fn hear(&mut self) -> anyhow::Result<()> {
        let (mut line, mut byte) = (Vec::new(), [0]);
        loop {
            let got = self.answer.read(&mut byte)?;
            ensure!(got == 1, "child {} is gone", self.pid);
            if byte[0] == b'\n' {
                break;
            }
            line.push(byte[0]);
        }
        match String::from_utf8_lossy(&line).as_ref() {
            "ok" => Ok(()),
            other => Err(anyhow!("child {}: {other}", self.pid)),
        }
    }
}

/// Fields of `/proc/PID/stat` by their number in proc_pid_stat(5), from 3 on.
pub fn stat(pid: i32, fields: &[usize]) -> anyhow::Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))
        .with_context(|| format!("task {pid} is not there"))?;
    let rest = text.rsplit_once(") ").context("stat without a name")?.1;
    let all: Vec<&str> = rest.split_whitespace().collect();
    Ok(fields
        .iter()
        .map(|field| all[field - 3].to_owned())
        .collect())
}

/// State letter, parent, group, session.
fn kinship(pids: &[i32]) -> anyhow::Result<Vec<(String, String)>> {
    pids.iter()
        .map(|pid| {
            // A running task may be on its way to sleep.
            let stat = stat(*pid, &[3, 4, 5, 6])?.join(" ").replace('R', "S");
            Ok(fact(format!("state, ppid, pgid, sid of {pid}"), stat))
        })
        .collect()
}

/// Nothing but itself.
fn plain(_: &Place) -> anyhow::Result<Check> {
    let pid = std::process::id();
    Ok(Box::new(move || {
        ensure!(std::process::id() == pid, "another pid");
        Ok(())
    }))
}

thread_local! {
    static OWN: AtomicU64 = const { AtomicU64::new(0) };
}

/// The first thread counts in a register, and never makes a system call; another one answers.
fn register_count(place: &Place) -> anyhow::Result<Check> {
    let shown = Arc::new(AtomicU64::new(0));
    let wrong = Arc::new(Mutex::new(None));
    let (seen, found) = (shown.clone(), wrong.clone());
    let directory = place.directory.clone();
    let check = move || {
        let before = seen.load(Ordering::Relaxed);
        loop {
            let wrong: &Option<String> = &found.lock().unwrap_or_else(PoisonError::into_inner);
            ensure!(wrong.is_none(), "{}", wrong.as_deref().unwrap_or_default());
            if seen.load(Ordering::Relaxed) != before {
                return Ok(());
            }
            std::thread::yield_now();
        }
    };
    std::thread::spawn(move || serve(&directory, Box::new(check)));
    let count = task::count_twice(&shown);
    let text = format!(
        "counted to {count}, but {} is in memory",
        shown.load(Ordering::Relaxed)
    );
    *wrong.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
    loop {
        std::thread::park();
    }
}

/// Many threads with their own tids, names, local storage and stacks, waiting in a futex.
fn threads(count: usize) -> anyhow::Result<Check> {
    struct Round {
        number: u64,
        answers: BTreeMap<usize, String>,
    }
    let round = Arc::new((
        Mutex::new(Round {
            number: 0,
            answers: BTreeMap::new(),
        }),
        Condvar::new(),
    ));
    for index in 0..count {
        let round = Arc::clone(&round);
        let thread = std::thread::Builder::new().name(format!("worker-{index}"));
        thread.spawn(move || {
            OWN.with(|own| own.store(index as u64 * 7, Ordering::Relaxed));
            let on_stack = [index as u64; 64];
            let mut seen = 0;
            let (lock, bell) = &*round;
            let mut state = lock.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                let tid = rustix::thread::gettid().as_raw_nonzero();
                let name = fs::read_to_string(format!("/proc/self/task/{tid}/comm"));
                let own = OWN.with(|own| own.load(Ordering::Relaxed));
                let sum: u64 = std::hint::black_box(&on_stack).iter().sum();
                let text = format!("tid {tid} name {name:?} own {own} stack {sum}");
                state.answers.insert(index, text);
                bell.notify_all();
                while state.number == seen {
                    state = bell.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                seen = state.number;
            }
        })?;
    }
    let ask = move || {
        let (lock, bell) = &*round;
        let mut state = lock.lock().unwrap_or_else(PoisonError::into_inner);
        if state.number > 0 {
            state.answers.clear();
        }
        state.number += 1;
        bell.notify_all();
        while state.answers.len() < count {
            state = bell.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(state
            .answers
            .iter()
            .map(|(index, text)| fact(format!("thread {index}"), text))
            .collect())
    };
    ask()?;
    unchanged(ask)
}

/// Sessions and process groups, a leader of a group that is not of a session, grandchildren.
fn tree(place: &Place) -> anyhow::Result<Check> {
    let mut grouped = Child::start(place, |_| {
        rustix::process::setpgid(None, None)?;
        Ok(Box::new(|| Ok(())))
    })?;
    let group = rustix::process::Pid::from_raw(grouped.pid);
    let mut member = Child::start(place, |_| {
        rustix::process::setpgid(None, group)?;
        Ok(Box::new(|| Ok(())))
    })?;
    let mut session = Child::start(place, |place| {
        rustix::process::setsid()?;
        let mut inner = Child::start(place, |_| Ok(Box::new(|| Ok(()))))?;
        let pid = inner.pid;
        let own = std::process::id() as i32;
        let mut same = unchanged(move || kinship(&[own, pid]))?;
        Ok(Box::new(move || {
            inner.check()?;
            same()
        }))
    })?;
    let own = std::process::id() as i32;
    let pids = [own, grouped.pid, member.pid, session.pid];
    let mut same = unchanged(move || kinship(&pids))?;
    Ok(Box::new(move || {
        grouped.check()?;
        member.check()?;
        session.check()?;
        same()
    }))
}

/// Children that ended and were not waited for, and a stopped one.
fn zombies_and_stopped(place: &Place) -> anyhow::Result<Check> {
    let exited = task::fork(0, || 42)?;
    let mut waits = Child::start(place, |_| Ok(Box::new(|| Ok(()))))?;
    let killed = task::fork(0, task::sleep_forever)?;
    let stopped = task::fork(0, task::sleep_forever)?;
    let signal = |pid: i32, signal| -> anyhow::Result<()> {
        let pid = rustix::process::Pid::from_raw(pid).context("a pid")?;
        Ok(rustix::process::kill_process(pid, signal)?)
    };
    signal(killed, rustix::process::Signal::KILL)?;
    signal(stopped, rustix::process::Signal::STOP)?;
    let keep = libc::WNOWAIT;
    task::wait_id(exited, libc::WEXITED | keep)?;
    task::wait_id(killed, libc::WEXITED | keep)?;
    task::wait_id(stopped, libc::WSTOPPED)?;
    let mut same = unchanged(move || {
        let ended = |pid| task::wait_id(pid, libc::WEXITED | libc::WNOHANG | keep);
        Ok(vec![
            fact("code of the exited", format!("{:?}", ended(exited)?)),
            fact("code of the killed", format!("{:?}", ended(killed)?)),
            fact(
                "state of the stopped",
                stat(stopped, &[3, 4, 5, 6])?.join(" "),
            ),
        ])
    })?;
    Ok(Box::new(move || {
        waits.check()?;
        same()
    }))
}

/// A session and a group whose leader has ended.
fn orphaned_session(_: &Place) -> anyhow::Result<Check> {
    // We adopt the grandchild, so that it stays in the tree.
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1))?;
    let (read, write) = rustix::pipe::pipe()?;
    let leader = task::fork(0, || {
        let made = rustix::process::setsid().is_ok();
        match task::fork(0, task::sleep_forever) {
            Ok(pid) if made => i32::from(rustix::io::write(&write, &pid.to_ne_bytes()).is_err()),
            _ => 1,
        }
    })?;
    drop(write);
    task::wait_id(leader, libc::WEXITED)?;
    let mut bytes = [0; 4];
    std::fs::File::from(read).read_exact(&mut bytes)?;
    let pid = i32::from_ne_bytes(bytes);
    ensure!(
        stat(pid, &[6])? == [leader.to_string()],
        "the session is not its leader's"
    );
    unchanged(move || kinship(&[pid]))
}

/// One open file in two tasks: what one reads moves the other's offset.
fn shared_file(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("shared");
    fs::write(&path, (0..=255_u8).collect::<Vec<_>>())?;
    let file = std::fs::File::open(&path)?;
    let mut theirs = file.try_clone()?;
    let mut child = Child::start(place, move |_| {
        Ok(Box::new(move || {
            let mut byte = [0];
            Ok(theirs.read_exact(&mut byte)?)
        }))
    })?;
    let mut file = file;
    let mut expected = 0_u8;
    Ok(Box::new(move || {
        child.check()?;
        let mut byte = [0];
        file.read_exact(&mut byte)?;
        expected += 1;
        ensure!(
            byte[0] == expected,
            "byte {} instead of {expected}",
            byte[0]
        );
        expected += 1;
        Ok(())
    }))
}

/// One table of descriptors in two tasks: what one opens the other has.
fn shared_table(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("number");
    let to_child = path.clone();
    let mut child = Child::start_sharing(libc::CLONE_FILES, place, move |_| {
        let number = std::fs::File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .open(&to_child)?;
        Ok(Box::new(move || {
            let file = std::fs::File::open("/proc/self/status")?;
            let fd = file.as_raw_fd();
            std::mem::forget(file);
            Ok(number.write_all_at(&fd.to_ne_bytes(), 0)?)
        }))
    })?;
    Ok(Box::new(move || {
        child.check()?;
        let bytes = fs::read(&path)?;
        let fd = i32::from_ne_bytes(bytes[..4].try_into().context("a number")?);
        let name = fs::read_link(format!("/proc/self/fd/{fd}"))
            .with_context(|| format!("fd {fd} that the child opened"))?;
        ensure!(name.ends_with("status"), "fd {fd} is {}", name.display());
        // SAFETY: the child opened it for us and forgot it.
        drop(unsafe { std::fs::File::from_raw_fd(fd) });
        Ok(())
    }))
}

/// Sixteen generations, each with a child.
fn deep_tree(place: &Place) -> anyhow::Result<Check> {
    fn generation(place: &Place, left: usize) -> anyhow::Result<Check> {
        let own = std::process::id() as i32;
        let mut same = unchanged(move || kinship(&[own]))?;
        if left == 0 {
            return Ok(same);
        }
        let mut child = Child::start(place, |place| generation(place, left - 1))?;
        Ok(Box::new(move || {
            same()?;
            child.check()
        }))
    }
    generation(place, 16)
}
