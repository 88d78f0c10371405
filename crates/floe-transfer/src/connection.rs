//! Byte streams to and from a page server.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};

use crate::frame::{FRAME_BYTES, Frame};

/// Where a server listens if nothing is said.
const EVERYWHERE: &str = "0.0.0.0";

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("Connecting to the page server at {address}, port {port}: is it running?")]
    Connect {
        address: String,
        port: u16,
        #[source]
        source: io::Error,
    },
    #[error("Listening for pages at {address}, port {port}")]
    Listen {
        address: String,
        port: u16,
        #[source]
        source: io::Error,
    },
    #[error("Waiting for a connection")]
    Accept(#[source] io::Error),
}

/// A server that nobody is connected to yet.
#[derive(Debug)]
pub struct Listener(TcpListener);

impl Listener {
    /// Listens at an address or host name (everywhere if none is given); port 0 takes any.
    pub fn bind(address: Option<&str>, port: u16) -> Result<Self, ConnectError> {
        let address = address.unwrap_or(EVERYWHERE);
        let bound = TcpListener::bind((address, port));
        bound.map(Listener).map_err(|source| ConnectError::Listen {
            address: address.to_string(),
            port,
            source,
        })
    }

    /// The port that was taken.
    pub fn port(&self) -> Result<u16, ConnectError> {
        let address = self.0.local_addr().map_err(ConnectError::Accept)?;
        Ok(address.port())
    }

    /// Waits for one connection.
    pub fn accept(self) -> Result<Connection, ConnectError> {
        let (stream, from) = self.0.accept().map_err(ConnectError::Accept)?;
        tracing::info!("connected from {from}");
        Connection::new(stream.into()).map_err(ConnectError::Accept)
    }
}

/// A stream in both directions. What is written may wait in memory until [`Connection::flush`].
#[derive(Debug)]
pub struct Connection {
    reader: io::BufReader<File>,
    writer: io::BufWriter<File>,
}

const BUFFER: usize = 64 << 10;

impl Connection {
    /// Takes a connected socket; one that is no TCP connection will do.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        // Frames are gathered in memory, so the kernel need not wait for more. Not TCP: nothing to set.
        let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
        let file = File::from(socket);
        Ok(Connection {
            writer: io::BufWriter::with_capacity(BUFFER, file.try_clone()?),
            reader: io::BufReader::with_capacity(BUFFER, file),
        })
    }

    /// Connects to a server.
    pub fn open(address: &str, port: u16) -> Result<Self, ConnectError> {
        let failed = |source| ConnectError::Connect {
            address: address.to_string(),
            port,
            source,
        };
        let mut last = io::ErrorKind::AddrNotAvailable.into();
        for target in (address, port).to_socket_addrs().map_err(failed)? {
            match TcpStream::connect(target) {
                Ok(stream) => return Connection::new(stream.into()).map_err(failed),
                Err(error) => last = error,
            }
        }
        Err(failed(last))
    }

    /// The next frame's bytes; `None` where the other side ended the stream between two frames.
    pub fn read_frame(&mut self) -> io::Result<Option<[u8; FRAME_BYTES]>> {
        let mut bytes = [0; FRAME_BYTES];
        let mut done = 0;
        while done < FRAME_BYTES {
            match self.reader.read(&mut bytes[done..]) {
                Ok(0) if done == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Some(bytes))
    }

    /// Fills `bytes`.
    pub fn read(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.reader.read_exact(bytes)
    }

    /// Queues a frame.
    pub fn write_frame(&mut self, frame: &Frame) -> io::Result<()> {
        self.writer.write_all(&frame.encode())
    }

    /// Queues bytes.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.writer.write_all(bytes)
    }

    /// Sends what is queued.
    pub fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }

    /// Waits until the other side closes, so that the connection does not linger on ours.
    pub fn wait_for_end(&mut self) -> io::Result<()> {
        match self.reader.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.reader.get_ref().as_fd()
    }
}
