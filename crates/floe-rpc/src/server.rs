//! Servers that a request starts: they go on in a process of their own.

use std::fs::File;
use std::io::{Read, Write};

use floe_kernel::child::{Fork, fork};

use crate::Refusal;

/// Whose child a server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parentage {
    /// Nobody's: init reaps it.
    Orphan,
    /// Ours: the caller asks by `WAIT_PID` how it ended.
    Child,
}

/// Starts `serve` in another process; gives its pid and port once it said that it is ready, or why it is not.
pub fn start(
    parentage: Parentage,
    serve: impl FnOnce(&mut dyn FnMut(u16)) -> Result<(), Refusal>,
) -> Result<(i32, u16), Refusal> {
    let failed = |error: std::io::Error| Refusal::new(format!("starting the page server: {error}"));
    let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|errno| failed(errno.into()))?;
    let child = match fork().map_err(failed)? {
        Fork::Parent(child) => child,
        Fork::Child => {
            drop(ours);
            begin(parentage, File::from(theirs), serve);
        }
    };
    drop(theirs);
    if parentage == Parentage::Orphan {
        // Its own child goes on; how this one ends says nothing.
        let _ = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
    }
    let mut told = Vec::new();
    File::from(ours).read_to_end(&mut told).map_err(failed)?;
    Report::decode(&told)
}

/// The server's side: never comes back.
fn begin(
    parentage: Parentage,
    pipe: File,
    serve: impl FnOnce(&mut dyn FnMut(u16)) -> Result<(), Refusal>,
) -> ! {
    if parentage == Parentage::Orphan {
        match fork() {
            Ok(Fork::Child) => {
                // Fails only for the leader of a group, which a new process is not.
                let _ = rustix::process::setsid();
            }
            Ok(Fork::Parent(_)) => std::process::exit(0),
            Err(error) => {
                Report::Refused(&[error.to_string()]).write(pipe);
                std::process::exit(1);
            }
        }
    }
    let mut pipe = Some(pipe);
    let served = serve(&mut |port| {
        if let Some(pipe) = pipe.take() {
            Report::Ready { port }.write(pipe);
        }
    });
    let Err(refusal) = served else {
        std::process::exit(0)
    };
    match pipe {
        Some(pipe) => Report::Refused(&refusal.lines).write(pipe),
        None => refusal
            .lines
            .iter()
            .for_each(|line| tracing::error!("{line}")),
    }
    std::process::exit(1)
}

/// What a server says over its pipe: one byte, then its pid and port, or lines.
enum Report<'a> {
    Ready { port: u16 },
    Refused(&'a [String]),
}

impl Report<'_> {
    fn write(&self, mut pipe: File) {
        let bytes = match self {
            Report::Ready { port } => {
                let mut bytes = vec![1];
                bytes.extend_from_slice(&std::process::id().to_le_bytes());
                bytes.extend_from_slice(&port.to_le_bytes());
                bytes
            }
            Report::Refused(lines) => [&[0], lines.join("\n").as_bytes()].concat(),
        };
        // Whoever reads it is gone if this fails.
        let _ = pipe.write_all(&bytes);
    }

    fn decode(bytes: &[u8]) -> Result<(i32, u16), Refusal> {
        match *bytes {
            [1, a, b, c, d, e, f] => {
                Ok((i32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f])))
            }
            [0, ref text @ ..] => Err(Refusal {
                errno: None,
                lines: String::from_utf8_lossy(text)
                    .lines()
                    .map(Into::into)
                    .collect(),
            }),
            _ => Err(Refusal::new("the page server ended at its start")),
        }
    }
}
