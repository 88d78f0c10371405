//! A socket that many callers connect to: one process for each connection.
//!
//! Anybody may connect, but only root and the service's own user are served: a dump reads all memory of a
//! task, and a restore makes tasks of any user.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use floe_image::messages::{CriuReqType, CriuResp};
use floe_kernel::child::{Fork, fork};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};

use crate::notify::chain;
use crate::{Channel, End, Engine, Session};

/// The socket where no `--address` is given, as in CRIU.
pub const DEFAULT_ADDRESS: &str = "./criu_service.socket";

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// What the service could not do.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The socket could not be made or used.
    #[error("{action} the service socket {}", .path.display())]
    Socket {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A process for a connection could not be made.
    #[error("Starting a process for a connection")]
    Fork(#[source] std::io::Error),
}

/// A socket that is listened on.
#[derive(Debug)]
pub struct Service {
    socket: OwnedFd,
    path: PathBuf,
}

/// Whether the loop that accepts goes on, or this is the process of a connection that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The process of one connection, whose work is done.
    Worker(End),
}

impl Service {
    /// Makes the socket, in place of one that a former service left.
    pub fn bind(path: &Path) -> Result<Self, ServiceError> {
        let failed = |action| {
            move |source: std::io::Error| ServiceError::Socket {
                action,
                path: path.into(),
                source,
            }
        };
        let errno = |action| move |errno: Errno| failed(action)(errno.into());
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed("Replacing")(error));
            }
            _ => {}
        }
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(errno("Making"))?;
        let address = SocketAddrUnix::new(path).map_err(errno("Naming"))?;
        rustix::net::bind(&socket, &address).map_err(errno("Binding"))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))
            .map_err(failed("Opening to everybody"))?;
        rustix::net::listen(&socket, BACKLOG).map_err(errno("Listening on"))?;
        Ok(Self {
            socket,
            path: path.into(),
        })
    }

    /// Accepts connections for ever; comes back in the process of each connection once that has ended, or
    /// with an error. This process must have one thread.
    pub fn run(self, engine: &dyn Engine) -> Result<Role, ServiceError> {
        let mut workers: Vec<(Pid, Option<OwnedFd>)> = Vec::new();
        loop {
            if !self.wait(&mut workers)? {
                continue;
            }
            let accepted = rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC);
            let connection = match accepted {
                Ok(connection) => connection,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(errno) => {
                    return Err(ServiceError::Socket {
                        action: "Accepting on",
                        path: self.path,
                        source: errno.into(),
                    });
                }
            };
            match fork().map_err(ServiceError::Fork)? {
                Fork::Child => {
                    drop((self.socket, workers));
                    return Ok(Role::Worker(work(connection, engine)));
                }
                Fork::Parent(pid) => {
                    workers.push((pid, pidfd_open(pid, PidfdFlags::empty()).ok()));
                }
            }
        }
    }

    /// Waits for a connection (`true`) or for a worker's end, and reaps those that have ended.
    fn wait(&self, workers: &mut Vec<(Pid, Option<OwnedFd>)>) -> Result<bool, ServiceError> {
        let ready = {
            let listener = PollFd::new(&self.socket, PollFlags::IN);
            let pidfds = workers.iter().filter_map(|(_, pidfd)| pidfd.as_ref());
            let mut polled: Vec<PollFd<'_>> = std::iter::once(listener)
                .chain(pidfds.map(|pidfd| PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)))
                .collect();
            match poll(&mut polled, None) {
                Ok(_) => polled.first().is_some_and(|fd| !fd.revents().is_empty()),
                Err(Errno::INTR) => false,
                Err(errno) => {
                    return Err(ServiceError::Socket {
                        action: "Waiting on",
                        path: self.path.clone(),
                        source: errno.into(),
                    });
                }
            }
        };
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        workers.retain(|(pid, _)| matches!(waitid(WaitId::Pid(*pid), options), Ok(None)));
        Ok(ready)
    }
}

fn work(connection: OwnedFd, engine: &dyn Engine) -> End {
    let channel = match Channel::new(connection) {
        Ok(channel) => channel,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            return End::Failed;
        }
    };
    let uid = channel.peer().uid;
    if uid != 0 && uid != rustix::process::geteuid().as_raw() {
        let text = format!(
            "user {uid} is not served: only root and the service's own user are; run `floe swrk` as yourself"
        );
        let refusal = CriuResp {
            r#type: CriuReqType::Empty.into(),
            cr_errno: Some(Errno::ACCESS.raw_os_error()),
            cr_errmsg: Some(text),
            ..CriuResp::default()
        };
        // A caller that is gone does not need the answer.
        let _ = channel.send(&refusal);
        return End::Failed;
    }
    Session::with_client(channel, engine).serve()
}
