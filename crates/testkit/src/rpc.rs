//! A small client of CRIU's RPC, written from the protocol alone: what it sees is what engines see.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use floe_image::messages::{CriuOpts, CriuReq, CriuReqType, CriuResp};
use prost::Message;
use rustix::io::FdFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A notification as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notified {
    /// Its name.
    pub script: String,
    /// The pid with it.
    pub pid: Option<i32>,
    /// Whether a descriptor came with it.
    pub with_descriptor: bool,
}

/// The caller's side of a connection.
pub struct Client {
    socket: OwnedFd,
    server: Option<Child>,
    /// Descriptors that came with notifications.
    pub received: Vec<OwnedFd>,
}

/// Options with nothing set.
pub fn no_options() -> CriuOpts {
    CriuOpts {
        images_dir_fd: -1,
        ..CriuOpts::default()
    }
}

/// A request with options.
pub fn request(kind: CriuReqType, opts: CriuOpts) -> CriuReq {
    CriuReq {
        r#type: kind.into(),
        opts: Some(opts),
        ..CriuReq::default()
    }
}

impl Client {
    /// Starts `engine swrk FD`, whatever it prints going to `output`.
    pub fn start(engine: &Path, output: &Path) -> anyhow::Result<Self> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let output = File::create(output)?;
        rustix::io::fcntl_setfd(&theirs, FdFlags::empty())?;
        let server = Command::new(engine)
            .args(["swrk", &theirs.as_raw_fd().to_string()])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("starting {}", engine.display()))?;
        Self::over(ours, Some(server))
    }

    /// Connects to a service.
    pub fn connect(address: &Path) -> anyhow::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(address)?)?;
        Self::over(socket, None)
    }

    fn over(socket: OwnedFd, server: Option<Child>) -> anyhow::Result<Self> {
        let timeout = rustix::net::sockopt::Timeout::Recv;
        rustix::net::sockopt::set_socket_timeout(&socket, timeout, Some(LIMIT))?;
        Ok(Self {
            socket,
            server,
            received: Vec::new(),
        })
    }

    /// The server's pid, where we started it.
    pub fn server_pid(&self) -> Option<u32> {
        self.server.as_ref().map(Child::id)
    }

    /// Sends bytes as they are.
    pub fn send_bytes(&self, bytes: &[u8]) -> anyhow::Result<()> {
        rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Sends a request.
    pub fn send(&self, request: &CriuReq) -> anyhow::Result<()> {
        self.send_bytes(&request.encode_to_vec())
    }

    /// The next response; `None` at the end of the connection.
    pub fn receive(&mut self) -> anyhow::Result<Option<CriuResp>> {
        let mut packet = vec![0; 64 << 10];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [std::io::IoSliceMut::new(&mut packet)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = rustix::net::recvmsg(&self.socket, &mut parts, &mut control, flags)
            .context("waiting for a response")?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.received.extend(fds);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        Ok(Some(CriuResp::decode(&packet[..received.bytes])?))
    }

    /// Sends a request and reads the response to it.
    pub fn call(&mut self, request: &CriuReq) -> anyhow::Result<CriuResp> {
        self.call_notified(request, |_| true)
            .map(|(answer, _)| answer)
    }

    /// The same; `consent` answers each notification, and all that came are given.
    pub fn call_notified(
        &mut self,
        request: &CriuReq,
        mut consent: impl FnMut(&Notified) -> bool,
    ) -> anyhow::Result<(CriuResp, Vec<Notified>)> {
        self.send(request)?;
        let mut seen = Vec::new();
        loop {
            let before = self.received.len();
            let Some(response) = self.receive()? else {
                bail!("the server ended without a response");
            };
            let Some(notify) = response.notify.clone() else {
                return Ok((response, seen));
            };
            let notified = Notified {
                script: notify.script.unwrap_or_default(),
                pid: notify.pid,
                with_descriptor: self.received.len() > before,
            };
            self.send(&CriuReq {
                r#type: CriuReqType::Notify.into(),
                notify_success: Some(consent(&notified)),
                ..CriuReq::default()
            })?;
            seen.push(notified);
        }
    }

    /// Closes the connection, and waits for the server that we started.
    pub fn end(mut self) -> anyhow::Result<Option<ExitStatus>> {
        let Client { socket, .. } = &mut self;
        rustix::net::shutdown(socket, rustix::net::Shutdown::Both)?;
        match &mut self.server {
            Some(server) => Ok(Some(server.wait()?)),
            None => Ok(None),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            // Both fail only where it is gone already.
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}
