//! A process that lets packets pass when the one that holds them back is killed.
//!
//! It runs this program again, reads from a pipe what is locked, and undoes it when the pipe ends without a word
//! that all is done. Whoever is killed ends the pipe.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};

use floe_kernel::ids::HostPid;
use floe_kernel::netlink::NetlinkSocket;
use floe_kernel::nftables::Flow;
use floe_kernel::pidfd::Pidfd;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::{Scope, delete, iptables};

/// The program that is run, and its command for [`watch`].
const OWN_PROGRAM: &str = "/proc/self/exe";
pub const COMMAND: &str = "unlocker";
/// What is said behind the command to a process that only ends, and its input with it.
const CLOSE: &str = "close";

const DONE: &str = "done";
const EVERYTHING: &str = "everything";

/// What is to be undone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Undo {
    /// Rules of iptables.
    Rules(Scope, iptables::Copies),
    /// A table of nftables.
    Table(String),
}

/// The process, as long as this lives. Dropping it sends the process home: all is undone, or shall stay.
#[derive(Debug)]
pub struct Guard {
    process: Child,
    list: ChildStdin,
}

impl Guard {
    /// Starts it in the network namespace where this thread is.
    pub fn start(undo: &Undo) -> io::Result<Guard> {
        let mut process = Command::new(OWN_PROGRAM)
            .arg(COMMAND)
            // Not to be killed with a group that we are in.
            .process_group(0)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let list = process.stdin.take().expect("a pipe was asked for");
        let mut guard = Guard { process, list };
        guard.list.write_all(undo.encode().as_bytes())?;
        Ok(guard)
    }

    /// What is locked stays so if this task has ended by then: it waits for its restore.
    pub fn only_while_alive(&mut self, task: HostPid) -> io::Result<()> {
        writeln!(self.list, "task {task}")
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // It can only fail when the process is dead, and then there is nobody to tell.
        let _ = writeln!(self.list, "{DONE}");
        let _ = self.process.wait();
    }
}

/// Ends a socket of nftables without waiting for it: another process has its last copy. The kernel lets no such
/// socket end before the tables that were deleted last, by anybody, are in no processor's hands any more: some
/// 10 ms for each, which our own end would wait for too.
pub fn close_elsewhere(socket: NetlinkSocket) {
    let closer = Command::new(OWN_PROGRAM)
        .args([COMMAND, CLOSE])
        .current_dir("/")
        .stdin(OwnedFd::from(socket))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    // Without the process the socket has ended here.
    if let Ok(mut closer) = closer {
        std::thread::spawn(move || closer.wait());
    }
}

impl Undo {
    fn encode(&self) -> String {
        let mut text = String::new();
        match self {
            Undo::Table(name) => text = format!("table {name}\n"),
            Undo::Rules(scope, copies) => {
                text += match copies {
                    iptables::Copies::One => "one\n",
                    iptables::Copies::All => "all\n",
                };
                match scope {
                    Scope::Everything => text += &format!("{EVERYTHING}\n"),
                    Scope::Flows(flows) => {
                        for flow in flows {
                            let (source, target) =
                                (iptables::shown(&flow.source), iptables::shown(&flow.target));
                            let (from, to) = (flow.source_port, flow.target_port);
                            text += &format!("flow {source} {from} {target} {to}\n");
                        }
                    }
                }
            }
        }
        text
    }
}

/// What the lines of a list said up to its end.
#[derive(Debug, Default)]
struct List {
    table: Option<String>,
    all: bool,
    everything: bool,
    flows: Vec<Flow>,
    task: Option<Pidfd>,
    done: bool,
}

impl List {
    fn read(input: impl Read) -> List {
        let mut list = List::default();
        for line in BufReader::new(input).lines().map_while(Result::ok) {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["table", name] => list.table = Some(name.to_string()),
                ["all"] => list.all = true,
                [EVERYTHING] => list.everything = true,
                ["flow", source, from, target, to] => {
                    list.flows.extend(flow((source, from), (target, to)));
                }
                ["task", pid] => {
                    let pid = pid.parse().ok();
                    list.task = pid.and_then(|pid| Pidfd::open(HostPid(pid)).ok());
                }
                [DONE] => {
                    list.done = true;
                    break;
                }
                _ => {}
            }
        }
        list
    }

    fn undo(&self) -> Option<Undo> {
        if self.done || self.task.as_ref().is_some_and(has_ended) {
            return None;
        }
        if let Some(table) = &self.table {
            return Some(Undo::Table(table.clone()));
        }
        let copies = match self.all {
            true => iptables::Copies::All,
            false => iptables::Copies::One,
        };
        let scope = match self.everything {
            true => Scope::Everything,
            false => Scope::Flows(self.flows.clone()),
        };
        Some(Undo::Rules(scope, copies))
    }
}

fn flow(source: (&str, &str), target: (&str, &str)) -> Option<Flow> {
    let bytes = |text: &str| match text.parse().ok()? {
        IpAddr::V4(address) => Some(address.octets().to_vec()),
        IpAddr::V6(address) => Some(address.octets().to_vec()),
    };
    Some(Flow {
        source: bytes(source.0)?,
        source_port: source.1.parse().ok()?,
        target: bytes(target.0)?,
        target_port: target.1.parse().ok()?,
    })
}

fn has_ended(task: &Pidfd) -> bool {
    let mut ended = [PollFd::new(task, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(rustix::event::poll(&mut ended, Some(&now)), Ok(ready) if ready > 0)
}

/// The life of the process: reads the list to its end, and undoes what is left of it.
pub fn watch(input: impl Read) {
    let undone = match List::read(input).undo() {
        None => Ok(()),
        Some(Undo::Table(name)) => delete(&name),
        Some(Undo::Rules(scope, copies)) => iptables::unlock(&scope, copies),
    };
    if let Err(error) = undone {
        tracing::warn!(%error, "connections may stay locked");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn undo(text: &str) -> Option<Undo> {
        List::read(text.as_bytes()).undo()
    }

    #[test]
    fn a_list_that_ends_early_says_what_is_to_be_undone() {
        let flow = Flow {
            source: vec![192, 0, 2, 1],
            source_port: 1,
            target: vec![192, 0, 2, 2],
            target_port: 2,
        };
        for all in [
            Undo::Table("CRIU-1".into()),
            Undo::Rules(Scope::Everything, iptables::Copies::One),
            Undo::Rules(Scope::Flows(vec![flow]), iptables::Copies::All),
        ] {
            let text = all.encode();
            assert_eq!(undo(&text), Some(all));
            assert_eq!(undo(&(text + "done\n")), None);
        }
    }

    #[test]
    fn what_belongs_to_a_dump_of_a_task_that_has_ended_stays() {
        let mut task = Command::new("true").spawn().expect("a process");
        let list = format!("table CRIU-1\ntask {}\n", task.id());
        let list = List::read(list.as_bytes());
        let pidfd = list.task.as_ref().expect("not reaped yet");
        let mut ended = [PollFd::new(pidfd, PollFlags::IN)];
        rustix::event::poll(&mut ended, None).expect("it ends");
        assert_eq!(list.undo(), None);
        task.wait().expect("it is ours");
    }
}
