//! One connection: packets with one message each.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use floe_image::framing;
use floe_image::messages::{CriuReq, CriuResp};
use floe_kernel::peer::{self, Peer};
use prost::Message;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

/// The largest request that is taken. The kernel's own limit for a packet is the sender's buffer,
/// some hundred kilobytes.
const MAX_REQUEST: usize = 16 << 20;

/// The longest explanation that is sent: clients in Go read into a buffer of 8 KiB.
const MAX_EXPLANATION: usize = 4 << 10;

/// What can go wrong on a connection.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket does not work, or is none.
    #[error("{action} the RPC socket")]
    Socket {
        action: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// The packet is larger than any request.
    #[error("the request has {0} bytes; {MAX_REQUEST} are the most that is taken")]
    TooLong(usize),
    /// The packet is no `criu_req`.
    #[error("the packet is not a request: {0}")]
    Damaged(String),
}

fn socket_error(action: &'static str) -> impl Fn(Errno) -> ChannelError {
    move |errno| ChannelError::Socket {
        action,
        source: errno.into(),
    }
}

/// A connected packet socket, and who is at its other end.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    peer: Peer,
}

impl Channel {
    /// Takes a connected socket over.
    pub fn new(socket: OwnedFd) -> Result<Self, ChannelError> {
        let peer = peer::credentials(&socket).map_err(|source| ChannelError::Socket {
            action: "Asking who is at the other end of",
            source,
        })?;
        Ok(Self { socket, peer })
    }

    /// Who connected, or who made the pair.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// The next request; `None` once the caller has closed its end.
    pub fn receive(&self) -> Result<Option<CriuReq>, ChannelError> {
        let failed = socket_error("Reading from");
        let peek = RecvFlags::PEEK | RecvFlags::TRUNC;
        let size = retry_on_intr(|| rustix::net::recv(&self.socket, &mut [0u8; 0][..], peek));
        let length = match size {
            Ok((_, length)) => length,
            Err(Errno::CONNRESET) => return Ok(None),
            Err(errno) => return Err(failed(errno)),
        };
        if length > MAX_REQUEST {
            return Err(ChannelError::TooLong(length));
        }
        let mut packet = vec![0; length];
        let (_, length) = retry_on_intr(|| {
            rustix::net::recv(&self.socket, packet.as_mut_slice(), RecvFlags::TRUNC)
        })
        .map_err(failed)?;
        // A request has a type at least, so an empty packet is the end of the connection.
        if length == 0 {
            return Ok(None);
        }
        packet.truncate(length);
        decode(&packet).map(Some)
    }

    /// Sends a response.
    pub fn send(&self, response: &CriuResp) -> Result<(), ChannelError> {
        let packet = encode(response);
        // A caller that is gone is an error for us to handle, no signal.
        retry_on_intr(|| rustix::net::send(&self.socket, &packet, SendFlags::NOSIGNAL))
            .map(drop)
            .map_err(socket_error("Writing to"))
    }

    /// Sends a response with a descriptor.
    pub fn send_with(&self, response: &CriuResp, fd: BorrowedFd<'_>) -> Result<(), ChannelError> {
        let packet = encode(response);
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let parts = [IoSlice::new(&packet)];
        rustix::net::sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL)
            .map(drop)
            .map_err(socket_error("Writing to"))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Reads a request, checked against the schema.
pub fn decode(packet: &[u8]) -> Result<CriuReq, ChannelError> {
    framing::decode(packet).map_err(|error| ChannelError::Damaged(error.to_string()))
}

fn encode(response: &CriuResp) -> Vec<u8> {
    let long = response
        .cr_errmsg
        .as_ref()
        .is_some_and(|text| text.len() > MAX_EXPLANATION);
    if !long {
        return response.encode_to_vec();
    }
    let mut response = response.clone();
    if let Some(text) = &mut response.cr_errmsg {
        text.truncate(text.floor_char_boundary(MAX_EXPLANATION));
    }
    response.encode_to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use floe_image::messages::CriuOpts;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (Channel, OwnedFd) {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("a pair can be made");
        (Channel::new(ours).expect("a pair has a peer"), theirs)
    }

    #[test]
    fn a_request_of_any_size_is_read_whole() {
        let (channel, caller) = pair();
        let opts = CriuOpts {
            external: vec!["mnt[/a]:b".into(); 4000],
            ..CriuOpts::default()
        };
        let request = CriuReq {
            r#type: 1,
            opts: Some(opts),
            ..CriuReq::default()
        };
        let packet = request.encode_to_vec();
        rustix::net::send(&caller, &packet, SendFlags::empty()).expect("it fits a packet");
        assert_eq!(channel.receive().expect("it is whole"), Some(request));
    }

    #[test]
    fn a_closed_end_and_an_empty_packet_end_the_connection() {
        let (channel, caller) = pair();
        rustix::net::send(&caller, &[], SendFlags::empty()).expect("empty packets can be sent");
        assert!(channel.receive().expect("no error").is_none());
        drop(caller);
        assert!(channel.receive().expect("no error").is_none());
    }

    #[test]
    fn garbage_is_named_and_a_long_explanation_cut() {
        let (channel, caller) = pair();
        for garbage in [&[0xff_u8; 64][..], b"GET / HTTP/1.1\r\n\r\n", &[0x12, 0xff]] {
            rustix::net::send(&caller, garbage, SendFlags::empty()).expect("it fits a packet");
            assert!(matches!(channel.receive(), Err(ChannelError::Damaged(_))));
        }
        let response = CriuResp {
            cr_errmsg: Some("ü".repeat(MAX_EXPLANATION)),
            ..CriuResp::default()
        };
        assert!(encode(&response).len() < MAX_EXPLANATION + 100);
    }
}
