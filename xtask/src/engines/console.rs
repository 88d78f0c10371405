//! The other side of `--console-socket`: takes the master of a terminal, and copies what comes out of it.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use anyhow::Context;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

/// Where to listen and where to write.
#[derive(clap::Args)]
pub struct Arguments {
    /// The socket that the engine is told about.
    socket: PathBuf,
    /// The file for what the terminal shows.
    output: PathBuf,
}

/// Ends when the terminal does.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let listener = UnixListener::bind(&arguments.socket).context("listening")?;
    let mut output = File::create(&arguments.output)?;
    let (connection, _) = listener.accept()?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 4096];
    let mut parts = [io::IoSliceMut::new(&mut name)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    rustix::net::recvmsg(&connection, &mut parts, &mut control, flags)?;
    let rights = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let mut master = File::from(rights.context("no descriptor came")?);
    match io::copy(&mut master, &mut output) {
        // The last slave was closed.
        Err(error) if error.raw_os_error() == Some(5) => Ok(()),
        other => other.map(drop).context("copying"),
    }
}
