//! The keeper's side.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use floe_kernel::ids::HostPid;
use floe_kernel::inherited;
use floe_kernel::pidfd::Pidfd;
use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::message::{receive, send};
use super::{KeeperError, TreeKey};

/// What is held, in the client's words.
#[derive(Default)]
struct Kept {
    /// By pid and start time.
    fds: BTreeMap<(i32, u64), OwnedFd>,
    /// Empty when nothing is known about the last round.
    state: String,
}

/// There is nothing to keep any more.
struct End;

/// Keeps for the tree under `root` until that ends or a client says so. The process becomes a session
/// of its own, without any descriptor of its caller's.
pub fn serve(root: HostPid) -> Result<(), KeeperError> {
    inherited::close_all();
    let failed = |source| KeeperError::Start { root, source };
    detach().map_err(failed)?;
    let key = TreeKey::of(root)?;
    let pidfd = Pidfd::open(root).map_err(failed)?;
    // The pid may have been reused before the handle on it was opened.
    if TreeKey::of(root)? != key {
        return Ok(());
    }
    let listener = match listen(&key) {
        Ok(listener) => listener,
        // Another was faster.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    let mut kept = Kept::default();
    loop {
        if !wait(&listener, &pidfd).map_err(failed)? {
            return Ok(());
        }
        let Ok(client) = rustix::net::accept_with(&listener, SocketFlags::CLOEXEC) else {
            continue;
        };
        // A client that fails is gone, and with it what it was about to leave.
        if allowed(&client) && talk(&client, &pidfd, &mut kept).is_ok() {
            return Ok(());
        }
    }
}

fn detach() -> io::Result<()> {
    // Standard input, output and error are /dev/null already. It may lead a session already.
    let _ = rustix::process::setsid();
    rustix::process::chdir("/")?;
    // The name by which `ps` shows it.
    let _ = rustix::thread::set_name(c"floe-keeper");
    let _ = std::fs::write(Path::new("/proc/self/oom_score_adj"), "-500");
    Ok(())
}

fn listen(key: &TreeKey) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::bind(&socket, &key.address()?)?;
    rustix::net::listen(&socket, 16)?;
    Ok(socket)
}

/// Waits for something to read; false when the tree has ended.
fn wait(socket: &OwnedFd, tree: &Pidfd) -> io::Result<bool> {
    loop {
        let mut fds = [
            PollFd::new(tree, PollFlags::IN),
            PollFd::new(socket, PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) if !fds[0].revents().is_empty() => return Ok(false),
            Ok(_) if !fds[1].revents().is_empty() => return Ok(true),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn allowed(client: &OwnedFd) -> bool {
    let own = rustix::process::geteuid();
    sockopt::socket_peercred(client).is_ok_and(|peer| peer.uid.is_root() || peer.uid == own)
}

/// Serves one client until it leaves, which is the error of a connection that ended.
fn talk(client: &OwnedFd, tree: &Pidfd, kept: &mut Kept) -> io::Result<End> {
    loop {
        if !wait(client, tree)? {
            return Ok(End);
        }
        let message = receive(client)?;
        match message.words().as_slice() {
            ["begin", purpose] => {
                for ((pid, start), fd) in &kept.fds {
                    send(client, &format!("fd {pid} {start}"), Some(fd.as_fd()))?;
                }
                send(client, &format!("state {}", kept.state), None)?;
                if *purpose == "change" {
                    kept.state.clear();
                }
            }
            ["fd", pid, start] => {
                let key = pid.parse().ok().zip(start.parse().ok());
                let (Some(key), Some(fd)) = (key, message.fd) else {
                    return Err(io::ErrorKind::InvalidData.into());
                };
                kept.fds.insert(key, fd);
            }
            ["drop", pid, start] => {
                if let Some(key) = pid.parse().ok().zip(start.parse().ok()) {
                    kept.fds.remove(&key);
                }
            }
            ["commit", ..] => {
                let state = message.text.strip_prefix("commit").unwrap_or_default();
                kept.state = state.trim_start().to_string();
                send(client, "done", None)?;
            }
            ["stop"] => {
                send(client, "done", None)?;
                return Ok(End);
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}
