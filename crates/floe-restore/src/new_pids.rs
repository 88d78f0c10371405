//! A restore into a new pid namespace, for a tree whose pids are taken here (`--new-pidns`).
//!
//! Three processes: the caller's, which stays outside; the first process of the namespace, which reaps
//! what the tree leaves and ends when nobody is left; and below it the one that restores. The namespace
//! has a `/proc` of its own, in a mount namespace that follows the caller's. Until the tree runs, all
//! of it dies with the caller.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use floe_kernel::child::{self, Fork};
use floe_kernel::ids::HostPid;
use floe_kernel::mount::{Propagation, Reach, attach, new_mount, set_propagation};
use floe_kernel::namespace::{Namespace, NsKind, unshare};
use floe_kernel::proc::{ProcDir, parse_status};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

/// Which of the processes this is now.
pub enum Side {
    /// The one that restores.
    Inside(Inside),
    /// The caller's.
    Outside(Outside),
}

/// The line of the process that restores.
#[derive(Debug)]
pub struct Inside {
    line: OwnedFd,
}

/// What the caller's process sees of the others.
#[derive(Debug)]
pub struct Outside {
    first: Pid,
    line: std::fs::File,
}

/// What is said on the lines: a word, then a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Word {
    /// The tree runs; the root's pid inside.
    Restored = 1,
    /// The process that restored has ended with this code.
    Ended = 2,
    /// The namespace could not be made ready: an errno.
    Failed = 3,
}

const MESSAGE_BYTES: usize = 5;

fn say(line: &OwnedFd, word: Word, number: i32) -> io::Result<()> {
    let [a, b, c, d] = number.to_le_bytes();
    // Less than what a pipe takes at once.
    rustix::io::write(line, &[word as u8, a, b, c, d])?;
    Ok(())
}

/// The next message; `None` when the other side is gone.
fn hear(line: &mut impl Read) -> io::Result<Option<(Word, i32)>> {
    let mut message = [0; MESSAGE_BYTES];
    match line.read_exact(&mut message) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let [word, number @ ..] = message;
    let known = [Word::Restored, Word::Ended, Word::Failed];
    let word = known.into_iter().find(|known| *known as u8 == word);
    Ok(word.map(|word| (word, i32::from_le_bytes(number))))
}

/// Goes on in a new pid namespace in which all pids up to `highest` stay free for the tree. This process
/// must have one thread.
pub fn split(highest: u32) -> io::Result<Side> {
    let (hears, says) = pipe_with(PipeFlags::CLOEXEC)?;
    unshare(NsKind::Pid.flag())?;
    match child::fork()? {
        Fork::Parent(first) => Ok(Side::Outside(Outside {
            first,
            line: hears.into(),
        })),
        Fork::Child => {
            drop(hears);
            match begin(highest) {
                Ok(Begun::Inside(inside)) => Ok(Side::Inside(inside)),
                Ok(Begun::First { worker, line }) => be_first(worker, line, says),
                Err(error) => {
                    // Whoever hears nothing learns the same from our end.
                    let _ = say(&says, Word::Failed, error.raw_os_error().unwrap_or(0));
                    std::process::exit(1)
                }
            }
        }
    }
}

enum Begun {
    Inside(Inside),
    First { worker: Pid, line: OwnedFd },
}

/// Makes the namespace ready and starts the process that restores.
fn begin(highest: u32) -> io::Result<Begun> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    unshare(NsKind::Mnt.flag())?;
    let place = |path: &str| {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, path, flags, Mode::empty())
    };
    let root = place("/")?;
    set_propagation(
        rustix::fd::AsFd::as_fd(&root),
        Reach::Tree,
        Propagation::Slave,
    )?;
    let proc = new_mount("proc", &[]).map_err(|error| match error {
        floe_kernel::mount::NewMountError::Call(_, error)
        | floe_kernel::mount::NewMountError::Option(_, error) => error,
    })?;
    attach(
        rustix::fd::AsFd::as_fd(&proc),
        rustix::fd::AsFd::as_fd(&place("/proc")?),
    )?;
    // Helpers and threads of the restore get pids above those of the tree.
    std::fs::write("/proc/sys/kernel/ns_last_pid", highest.to_string())?;
    let (hears, says) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok(match child::fork()? {
        Fork::Child => Begun::Inside(Inside { line: says }),
        Fork::Parent(worker) => Begun::First {
            worker,
            line: hears,
        },
    })
}

/// The life of the namespace's first process: it ends when it has no child left.
fn be_first(worker: Pid, line: OwnedFd, outside: OwnedFd) -> ! {
    let mut line = std::fs::File::from(line);
    let mut code = 1;
    if let Ok(Some((Word::Restored, root))) = hear(&mut line) {
        // From here on the tree is the user's, and so are we; the caller may be gone any time.
        let _ = rustix::process::set_parent_process_death_signal(None);
        let _ = say(&outside, Word::Restored, root);
    } else {
        // The end of the namespace's first process is that of whatever a killed restore has left.
        code = end_of(worker).unwrap_or(code);
        let _ = say(&outside, Word::Ended, code);
        std::process::exit(code);
    }
    drop(line);
    let mut outside = Some(outside);
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == worker => {
                code = code_of(status);
                let _ = child::drop_streams();
                let _ = std::env::set_current_dir("/");
                let _ = outside.take().map(|line| say(&line, Word::Ended, code));
                child::close_all();
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => std::process::exit(code),
        }
    }
}

fn end_of(worker: Pid) -> Option<i32> {
    loop {
        match rustix::process::waitpid(Some(worker), WaitOptions::empty()) {
            Ok(Some((_, status))) => return Some(code_of(status)),
            Err(rustix::io::Errno::INTR) => {}
            _ => return None,
        }
    }
}

fn code_of(status: WaitStatus) -> i32 {
    status.exit_status().unwrap_or(1)
}

impl Inside {
    /// Tells the others that the tree runs, with the root's pid as this process sees it.
    pub fn restored(self, root: HostPid) -> io::Result<()> {
        say(&self.line, Word::Restored, root.0)
    }
}

impl Outside {
    /// Waits until the tree runs; the root's pid as we see it. `None` when the restore has failed.
    pub fn root(&mut self) -> io::Result<Option<HostPid>> {
        match hear(&mut self.line)? {
            Some((Word::Restored, inner)) => self.find(inner).map(Some),
            Some((Word::Failed, errno)) => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(None),
        }
    }

    /// Waits until the process that restored has ended; its exit code.
    pub fn end(mut self) -> io::Result<i32> {
        match hear(&mut self.line)? {
            Some((Word::Ended, code)) => Ok(code),
            _ => Ok(1),
        }
    }

    /// The task of the namespace that has this pid inside.
    fn find(&self, inner: i32) -> io::Result<HostPid> {
        let first = HostPid(self.first.as_raw_nonzero().get());
        let namespace = Namespace::of_task(first, NsKind::Pid)?.identity();
        for entry in std::fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let pid = HostPid(pid);
            let Ok(found) = Namespace::of_task(pid, NsKind::Pid) else {
                continue; // It has just ended.
            };
            let number = || {
                let record = ProcDir::open(pid).ok()?.read_record("status").ok()?;
                Some(parse_status(&record).ok()?.ns_pids.last()?.0)
            };
            if found.identity() == namespace && number() == Some(inner) {
                return Ok(pid);
            }
        }
        Err(io::Error::from_raw_os_error(libc::ESRCH))
    }
}

/// Writes a pid for the caller.
pub fn write_pid(path: &Path, pid: HostPid) -> io::Result<()> {
    std::fs::File::create(path)?.write_all(pid.to_string().as_bytes())
}
