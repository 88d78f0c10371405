//! Asks a redis again and again, for `--group containers`: for how long does it not answer?

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::ensure;

/// Whom to ask, and where to write.
#[derive(clap::Args)]
pub struct Arguments {
    /// Of the redis.
    address: SocketAddr,
    /// The file for growing gaps between answers, in microseconds.
    output: PathBuf,
}

/// How long an answer may take. While the container is frozen and its network not locked yet, no new
/// connection must come: one that waits to be accepted cannot be saved.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long a connection may take. A packet that a locked network dropped must not be waited for.
const CONNECTING: Duration = Duration::from_millis(20);

/// Runs until it is killed.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut output = File::create(&arguments.output)?;
    let mut last = None;
    let mut longest = Duration::ZERO;
    let mut connection = None;
    loop {
        connection = ask(connection, arguments.address).ok();
        if connection.is_some() {
            let now = Instant::now();
            let gap = last.map_or(Duration::ZERO, |last| now.duration_since(last));
            if gap > longest {
                longest = gap;
                writeln!(output, "{}", gap.as_micros())?;
            }
            last = Some(now);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One question and its answer, through a new connection where there is none.
fn ask(connection: Option<TcpStream>, address: SocketAddr) -> anyhow::Result<TcpStream> {
    let mut connection = match connection {
        Some(connection) => connection,
        None => TcpStream::connect_timeout(&address, CONNECTING)?,
    };
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.write_all(b"PING\r\n")?;
    let mut answer = [0; 7];
    connection.read_exact(&mut answer)?;
    ensure!(&answer == b"+PONG\r\n", "another answer");
    Ok(connection)
}
