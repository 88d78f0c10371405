//! The keeper's side.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use floe_kernel::ids::HostPid;
use floe_kernel::inherited;
use floe_kernel::pidfd::Pidfd;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::message::{receive, send};
use super::{KeeperError, TreeKey};

/// Most clients that may wait for their turn.
const MOST_WAITING: usize = 64;

/// What is held, in the client's words.
#[derive(Default)]
struct Kept {
    /// By pid and start time.
    fds: BTreeMap<(i32, u64), OwnedFd>,
    /// Empty when nothing is known about the last round.
    state: String,
    /// A client has begun a round.
    begun: bool,
    /// One was finished.
    finished: bool,
}

/// There is nothing to keep any more.
struct End;

/// The keeper of one tree.
struct Keeper {
    listener: OwnedFd,
    tree: Pidfd,
    /// Clients that came while another one was served.
    waiting: VecDeque<OwnedFd>,
    kept: Kept,
}

/// Keeps for the tree under `root` until that ends, a client says so, or the first round fails. The process
/// becomes a session of its own, without any descriptor of its caller's.
pub fn serve(root: HostPid) -> Result<(), KeeperError> {
    inherited::close_all();
    let failed = |source| KeeperError::Start { root, source };
    detach().map_err(failed)?;
    let key = TreeKey::of(root)?;
    let tree = Pidfd::open(root).map_err(failed)?;
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
    let mut keeper = Keeper {
        listener,
        tree,
        waiting: VecDeque::new(),
        kept: Kept::default(),
    };
    while let Some(client) = keeper.next_client().map_err(failed)? {
        // A client that fails is gone, and with it what it was about to leave.
        let ended = keeper.talk(&client).is_ok();
        if ended || (keeper.kept.begun && !keeper.kept.finished) {
            return Ok(());
        }
    }
    Ok(())
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

impl Keeper {
    /// The next client that is there still; `None` when the tree has ended.
    fn next_client(&mut self) -> io::Result<Option<OwnedFd>> {
        loop {
            let client = match self.waiting.pop_front() {
                Some(client) => Some(client),
                None => {
                    let mut fds = [
                        PollFd::new(&self.tree, PollFlags::IN),
                        PollFd::new(&self.listener, PollFlags::IN),
                    ];
                    wait(&mut fds)?;
                    if !fds[0].revents().is_empty() {
                        return Ok(None);
                    }
                    self.accept()
                }
            };
            if let Some(client) = client.filter(|client| !is_gone(client)) {
                return Ok(Some(client));
            }
        }
    }

    fn accept(&self) -> Option<OwnedFd> {
        let client = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC).ok()?;
        allowed(&client).then_some(client)
    }

    /// Waits for a message of a client, and tells others that come that it is being served; false when the
    /// tree has ended.
    fn wait_for(&mut self, client: &OwnedFd) -> io::Result<bool> {
        loop {
            let mut fds = [
                PollFd::new(&self.tree, PollFlags::IN),
                PollFd::new(client, PollFlags::IN),
                PollFd::new(&self.listener, PollFlags::IN),
            ];
            wait(&mut fds)?;
            let [tree, message, other] = fds.map(|fd| !fd.revents().is_empty());
            if tree {
                return Ok(false);
            }
            if message {
                return Ok(true);
            }
            if other && let Some(other) = self.accept() {
                // Who has left only now is served to its end first.
                match is_gone(client) {
                    true => self.waiting.push_back(other),
                    false => self.put_off(other, client),
                }
            }
        }
    }

    fn put_off(&mut self, other: OwnedFd, client: &OwnedFd) {
        let pid = sockopt::socket_peercred(client).map(|peer| peer.pid);
        let pid = pid.map_or(0, |pid| pid.as_raw_nonzero().get());
        // One that is gone again, or too many: the connection ends.
        if self.waiting.len() < MOST_WAITING && send(&other, &format!("busy {pid}"), None).is_ok() {
            self.waiting.push_back(other);
        }
    }

    /// Serves one client until it leaves, which is the error of a connection that ended.
    fn talk(&mut self, client: &OwnedFd) -> io::Result<End> {
        loop {
            if !self.wait_for(client)? {
                return Ok(End);
            }
            let message = receive(client)?;
            let kept = &mut self.kept;
            match message.words().as_slice() {
                ["begin", purpose] => {
                    for ((pid, start), fd) in &kept.fds {
                        send(client, &format!("fd {pid} {start}"), Some(fd.as_fd()))?;
                    }
                    send(client, &format!("state {}", kept.state), None)?;
                    if *purpose == "change" {
                        kept.state.clear();
                        kept.begun = true;
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
                    kept.finished = true;
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
}

/// Waits until one of the descriptors is ready.
fn wait(fds: &mut [PollFd<'_>]) -> io::Result<()> {
    loop {
        match rustix::event::poll(fds, None) {
            Err(rustix::io::Errno::INTR) => {}
            polled => return Ok(polled.map(drop)?),
        }
    }
}

/// Whether a client has given up waiting: what it had asked for before counts no more.
fn is_gone(client: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(client, PollFlags::IN)];
    let now = Timespec::default();
    rustix::event::poll(&mut fds, Some(&now)).is_err() || fds[0].revents().contains(PollFlags::HUP)
}

fn allowed(client: &OwnedFd) -> bool {
    let own = rustix::process::geteuid();
    sockopt::socket_peercred(client).is_ok_and(|peer| peer.uid.is_root() || peer.uid == own)
}
