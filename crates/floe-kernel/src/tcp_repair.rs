//! TCP repair: reading and setting the state of a connection (`TCP_REPAIR`, Linux 3.5).
//!
//! Contract relied on: in repair mode a socket can be read and written state by state, `connect` sends
//! nothing, and the last `close` ends it without telling the peer. Leaving repair with 0 sends a window
//! probe, with -1 nothing. Both entering and leaving overwrite `SO_REUSEADDR`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sock_diag::SocketState;
use crate::sockopt::{
    SocketOption, option_bytes, option_number, set_option_bytes, set_option_number,
};

const fn tcp(name: i32) -> SocketOption {
    SocketOption(libc::IPPROTO_TCP, name)
}

const REPAIR: SocketOption = tcp(libc::TCP_REPAIR);
const REPAIR_QUEUE: SocketOption = tcp(libc::TCP_REPAIR_QUEUE);
const QUEUE_SEQ: SocketOption = tcp(libc::TCP_QUEUE_SEQ);
const REPAIR_OPTIONS: SocketOption = tcp(libc::TCP_REPAIR_OPTIONS);
const TIMESTAMP: SocketOption = tcp(libc::TCP_TIMESTAMP);
const REPAIR_WINDOW: SocketOption = tcp(29);
const MAXSEG: SocketOption = tcp(libc::TCP_MAXSEG);
const INFO: SocketOption = tcp(libc::TCP_INFO);

/// Which queue the next calls are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    None = 0,
    Receive = 1,
    Send = 2,
}

/// Options that both ends agreed on (`tcpi_options`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed(pub u8);

impl Agreed {
    pub const TIMESTAMPS: u8 = 1;
    pub const SACK: u8 = 2;
    pub const WINDOW_SCALE: u8 = 4;

    /// Whether all of these were agreed on.
    pub fn has(self, options: u8) -> bool {
        self.0 & options == options
    }
}

/// The start of `TCP_INFO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    pub state: SocketState,
    pub agreed: Agreed,
    pub send_scale: u8,
    pub receive_scale: u8,
    /// Of a listening socket: connections that wait to be accepted.
    pub waiting: u32,
    /// Of a listening socket: its backlog.
    pub backlog: u32,
}

/// Reads the start of `TCP_INFO`.
pub fn tcp_info(socket: BorrowedFd<'_>) -> io::Result<TcpInfo> {
    let bytes = option_bytes(socket, INFO, 32)?;
    let word = |at: usize| {
        let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
        word.map(u32::from_ne_bytes)
            .ok_or(io::ErrorKind::InvalidData)
    };
    let byte = |at: usize| bytes.get(at).copied().ok_or(io::ErrorKind::InvalidData);
    Ok(TcpInfo {
        state: SocketState(byte(0)?),
        agreed: Agreed(byte(5)?),
        send_scale: byte(6)? & 15,
        receive_scale: byte(6)? >> 4,
        waiting: word(24)?,
        backlog: word(28)?,
    })
}

/// `struct tcp_repair_window`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub snd_wl1: u32,
    pub snd_wnd: u32,
    pub max_window: u32,
    pub rcv_wnd: u32,
    pub rcv_wup: u32,
}

/// What connecting in repair mode cannot know: what the ends agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    pub agreed: Agreed,
    pub send_scale: u8,
    pub receive_scale: u8,
    /// The largest segment that the peer takes.
    pub mss: u32,
    /// The clock that our timestamps go on from.
    pub timestamp: u32,
}

/// A TCP socket in repair mode. Dropping it switches repair off again.
#[derive(Debug)]
pub struct Repair {
    socket: Option<OwnedFd>,
    reuse_address: i32,
}

impl Repair {
    /// Puts a socket into repair mode; `EPERM` without CAP_NET_ADMIN and for listening ones.
    pub fn enter(socket: OwnedFd) -> io::Result<Self> {
        let reuse = SocketOption(libc::SOL_SOCKET, libc::SO_REUSEADDR);
        let reuse_address = option_number(socket.as_fd(), reuse)?;
        set_option_number(socket.as_fd(), REPAIR, 1)?;
        Ok(Repair {
            socket: Some(socket),
            reuse_address,
        })
    }

    /// Switches repair off. The socket tells its peer about its window and goes on.
    pub fn leave(mut self) -> io::Result<()> {
        self.socket
            .take()
            .map_or(Ok(()), |socket| leave(socket.as_fd(), self.reuse_address))
    }

    /// Gives up our descriptor and leaves the socket in repair mode, so that its end is silent.
    pub fn keep(mut self) {
        self.socket = None;
    }

    /// The socket.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket
            .as_ref()
            .expect("only methods that consume take it")
            .as_fd()
    }

    /// What follows is about this queue.
    pub fn select(&self, queue: Queue) -> io::Result<()> {
        set_option_number(self.as_fd(), REPAIR_QUEUE, queue as i32)
    }

    /// The sequence number of the end of a queue.
    pub fn sequence(&self, queue: Queue) -> io::Result<u32> {
        self.select(queue)?;
        Ok(option_number(self.as_fd(), QUEUE_SEQ)?.cast_unsigned())
    }

    /// Sets where a queue begins; only before the socket is connected.
    pub fn set_sequence(&self, queue: Queue, sequence: u32) -> io::Result<()> {
        self.select(queue)?;
        set_option_number(self.as_fd(), QUEUE_SEQ, sequence.cast_signed())
    }

    /// Copies `length` bytes of a queue; `InvalidData` when it holds another number.
    pub fn queue(&self, queue: Queue, length: u32) -> io::Result<Vec<u8>> {
        if length == 0 {
            return Ok(Vec::new());
        }
        self.select(queue)?;
        let mut bytes = vec![0; length as usize + 1];
        let peeked = crate::socket::peek(self.as_fd(), &mut bytes)?;
        self.select(Queue::None)?;
        if peeked.length != length as usize {
            return Err(io::ErrorKind::InvalidData.into());
        }
        bytes.truncate(peeked.length);
        Ok(bytes)
    }

    /// Appends bytes to a queue as received, or as sent and not acknowledged; returns how many.
    pub fn append(&self, bytes: &[u8]) -> io::Result<usize> {
        crate::socket::send(self.as_fd(), bytes, &[])
    }

    /// What the ends agreed on.
    pub fn agreement(&self) -> io::Result<Agreement> {
        let info = tcp_info(self.as_fd())?;
        let timestamp = if info.agreed.has(Agreed::TIMESTAMPS) {
            option_number(self.as_fd(), TIMESTAMP)?.cast_unsigned()
        } else {
            0
        };
        Ok(Agreement {
            agreed: info.agreed,
            send_scale: info.send_scale,
            receive_scale: info.receive_scale,
            mss: option_number(self.as_fd(), MAXSEG)?.cast_unsigned(),
            timestamp,
        })
    }

    /// Sets what the ends agreed on; only after the socket is connected.
    pub fn set_agreement(&self, agreement: &Agreement) -> io::Result<()> {
        const TCPOPT_MAXSEG: u32 = 2;
        const TCPOPT_WINDOW: u32 = 3;
        const TCPOPT_SACK_PERMITTED: u32 = 4;
        const TCPOPT_TIMESTAMP: u32 = 8;
        let mut options = Vec::new();
        if agreement.agreed.has(Agreed::SACK) {
            options.extend([TCPOPT_SACK_PERMITTED, 0]);
        }
        if agreement.agreed.has(Agreed::WINDOW_SCALE) {
            let scales = u32::from(agreement.send_scale) | u32::from(agreement.receive_scale) << 16;
            options.extend([TCPOPT_WINDOW, scales]);
        }
        if agreement.agreed.has(Agreed::TIMESTAMPS) {
            options.extend([TCPOPT_TIMESTAMP, 0]);
        }
        options.extend([TCPOPT_MAXSEG, agreement.mss]);
        let bytes: Vec<u8> = options.into_iter().flat_map(u32::to_ne_bytes).collect();
        set_option_bytes(self.as_fd(), REPAIR_OPTIONS, &bytes)?;
        self.recompute_segment_size()?;
        if agreement.agreed.has(Agreed::TIMESTAMPS) {
            set_option_number(self.as_fd(), TIMESTAMP, agreement.timestamp.cast_signed())?;
        }
        Ok(())
    }

    /// Connecting has chosen a segment size of 536 bytes without knowing the peer's, and only a change of the
    /// header options makes the kernel choose again (`icsk_sync_mss`): here from none to none.
    fn recompute_segment_size(&self) -> io::Result<()> {
        const NO_OPTIONS4: SocketOption = SocketOption(libc::IPPROTO_IP, libc::IP_OPTIONS);
        const NO_OPTIONS6: SocketOption = SocketOption(libc::IPPROTO_IPV6, libc::IPV6_RTHDR);
        set_option_bytes(self.as_fd(), NO_OPTIONS4, &[])?;
        let family = option_number(
            self.as_fd(),
            SocketOption(libc::SOL_SOCKET, libc::SO_DOMAIN),
        )?;
        if family == libc::AF_INET6 {
            set_option_bytes(self.as_fd(), NO_OPTIONS6, &[])?;
        }
        Ok(())
    }

    /// The windows. `ENOPROTOOPT` before Linux 4.8.
    pub fn window(&self) -> io::Result<Window> {
        let bytes = option_bytes(self.as_fd(), REPAIR_WINDOW, 20)?;
        let words: Vec<u32> = bytes
            .chunks_exact(4)
            .filter_map(|word| Some(u32::from_ne_bytes(word.try_into().ok()?)))
            .collect();
        let [snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup] = words[..] else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        Ok(Window {
            snd_wl1,
            snd_wnd,
            max_window,
            rcv_wnd,
            rcv_wup,
        })
    }

    /// Sets the windows; `EINVAL` where they contradict the sequence numbers.
    pub fn set_window(&self, window: &Window) -> io::Result<()> {
        let words = [
            window.snd_wl1,
            window.snd_wnd,
            window.max_window,
            window.rcv_wnd,
            window.rcv_wup,
        ];
        let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        set_option_bytes(self.as_fd(), REPAIR_WINDOW, &bytes)
    }
}

impl Drop for Repair {
    fn drop(&mut self) {
        if let Some(socket) = self.socket.take() {
            // Nothing can be done about a failure here; `leave` reports it.
            let _ = leave(socket.as_fd(), self.reuse_address);
        }
    }
}

/// Switches repair off on a socket that some other process may have left in it.
pub fn leave(socket: BorrowedFd<'_>, reuse_address: i32) -> io::Result<()> {
    set_option_number(socket, REPAIR_QUEUE, Queue::None as i32)?;
    set_option_number(socket, REPAIR, 0)?;
    let reuse = SocketOption(libc::SOL_SOCKET, libc::SO_REUSEADDR);
    set_option_number(socket, reuse, reuse_address)
}

/// What follows is about this queue of a socket in repair mode.
pub fn select(socket: BorrowedFd<'_>, queue: Queue) -> io::Result<()> {
    set_option_number(socket, REPAIR_QUEUE, queue as i32)
}

/// Whether a socket is in repair mode.
pub fn is_in_repair(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(option_number(socket, REPAIR)? != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn state_is_read_and_the_connection_goes_on() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("free");
        let mut client =
            std::net::TcpStream::connect(listener.local_addr().expect("bound")).expect("listening");
        let (mut server, _) = listener.accept().expect("connected");
        client.write_all(b"ping").expect("open");
        let copy = OwnedFd::from(server.try_clone().expect("open"));
        let repair = match Repair::enter(copy) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                eprintln!("skipped: no CAP_NET_ADMIN");
                return;
            }
            other => other.expect("established"),
        };
        assert!(is_in_repair(server.as_fd()).expect("tcp"));
        assert_eq!(repair.queue(Queue::Receive, 4).expect("there"), b"ping");
        assert!(repair.queue(Queue::Receive, 3).is_err());
        assert!(repair.agreement().expect("connected").mss > 0);
        assert!(repair.window().expect("Linux 4.8").rcv_wnd > 0);
        drop(repair);
        assert!(!is_in_repair(server.as_fd()).expect("tcp"));
        let mut got = [0; 4];
        server.read_exact(&mut got).expect("still there");
        server.write_all(&got).expect("open");
        client.read_exact(&mut got).expect("answered");
    }
}
