//! A program for containers that is connected to a socket outside: sends datagrams to it, and counts them.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;

/// Whom to talk to, and where to count.
#[derive(clap::Args)]
pub struct Arguments {
    /// A socket of datagrams.
    socket: PathBuf,
    /// The file for the count.
    output: PathBuf,
}

/// Runs until it is killed, or nobody listens any more.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.connect(&arguments.socket).context("connecting")?;
    for count in 1_u64.. {
        socket
            .send(format!("{count}\n").as_bytes())
            .context("sending")?;
        std::fs::write(&arguments.output, format!("{count}\n"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
