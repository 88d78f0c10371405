//! What `sock_diag(7)` tells of unix, internet, netlink and packet sockets.
//!
//! Contract relied on: a dump lists every socket of the calling thread's network namespace that is hashed:
//! all unix sockets, TCP sockets that are not closed, UDP and raw sockets that are bound.

use std::io;

use crate::netlink::{NetlinkSocket, attributes};

const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// `TCP_LISTEN` and so on, as sockets of all families have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SocketState(pub u8);

impl SocketState {
    pub const ESTABLISHED: Self = SocketState(1);
    pub const SYN_SENT: Self = SocketState(2);
    pub const FIN_WAIT1: Self = SocketState(4);
    pub const FIN_WAIT2: Self = SocketState(5);
    pub const CLOSE: Self = SocketState(7);
    pub const CLOSE_WAIT: Self = SocketState(8);
    pub const LAST_ACK: Self = SocketState(9);
    pub const LISTEN: Self = SocketState(10);
    pub const CLOSING: Self = SocketState(11);
}

/// One unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixSocket {
    pub inode: u32,
    /// `SOCK_STREAM` and so on.
    pub kind: u8,
    pub state: SocketState,
    /// As bound, abstract ones with their leading zero byte; empty for none.
    pub name: Vec<u8>,
    /// The inode of the socket that it is connected to; 0 for none.
    pub peer: u32,
    /// Inodes of clients that wait to be accepted, first come first; 0 for one that has gone away.
    pub waiting: Vec<u32>,
    /// Unread bytes, or the number of waiting clients of a listening socket.
    pub receive_queue: u32,
    /// Sent bytes that the peer has not read, or the backlog of a listening socket.
    pub send_queue: u32,
    /// 1 for receiving, 2 for sending.
    pub shutdown: u8,
}

/// One inet socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InetSocket {
    pub inode: u32,
    pub state: SocketState,
    pub source_port: u16,
    pub peer_port: u16,
    /// As in memory, so in network order; the first word alone counts for IPv4.
    pub source: [u32; 4],
    pub peer: [u32; 4],
    /// Unread bytes, or the number of waiting connections of a listening socket.
    pub receive_queue: u32,
    /// Unsent and unacknowledged bytes, or the backlog of a listening socket.
    pub send_queue: u32,
    /// 1 for receiving, 2 for sending.
    pub shutdown: u8,
}

/// One netlink socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetlinkPeer {
    pub inode: u32,
    pub protocol: u8,
    /// 0 for unconnected, 1 for connected.
    pub state: u8,
    pub port: u32,
    pub peer_port: u32,
    pub peer_group: u32,
    /// Bits of the multicast groups that it listens to.
    pub groups: Vec<u32>,
}

/// All that the kernel answers to a request.
fn list<T>(request: &[u8], parse: fn(&[u8]) -> Option<T>) -> io::Result<Vec<T>> {
    let mut sockets = Vec::new();
    NetlinkSocket::open(libc::NETLINK_SOCK_DIAG)?.dump(
        SOCK_DIAG_BY_FAMILY,
        request,
        |message| {
            sockets.push(parse(message).ok_or(io::ErrorKind::InvalidData)?);
            Ok(())
        },
    )?;
    Ok(sockets)
}

/// Every unix socket.
pub fn unix_sockets() -> io::Result<Vec<UnixSocket>> {
    const SHOW_NAME: u32 = 1;
    const SHOW_PEER: u32 = 4;
    const SHOW_ICONS: u32 = 8;
    const SHOW_RQLEN: u32 = 16;
    let mut body = [0u8; 24];
    body[0] = libc::AF_UNIX as u8;
    body[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    let show = SHOW_NAME | SHOW_PEER | SHOW_ICONS | SHOW_RQLEN;
    body[12..16].copy_from_slice(&show.to_ne_bytes());
    list(&body, parse_unix)
}

fn parse_unix(message: &[u8]) -> Option<UnixSocket> {
    const NAME: u16 = 0;
    const PEER: u16 = 2;
    const ICONS: u16 = 3;
    const RQLEN: u16 = 4;
    const SHUTDOWN: u16 = 6;
    let mut socket = UnixSocket {
        inode: word(message, 4)?,
        kind: *message.get(1)?,
        state: SocketState(*message.get(2)?),
        name: Vec::new(),
        peer: 0,
        waiting: Vec::new(),
        receive_queue: 0,
        send_queue: 0,
        shutdown: 0,
    };
    for (kind, value) in attributes(message.get(16..)?) {
        match kind {
            NAME => socket.name = value.to_vec(),
            PEER => socket.peer = word(value, 0)?,
            ICONS => socket.waiting = words(value),
            RQLEN => {
                socket.receive_queue = word(value, 0)?;
                socket.send_queue = word(value, 4)?;
            }
            SHUTDOWN => socket.shutdown = *value.first()?,
            _ => {}
        }
    }
    Some(socket)
}

/// Every socket of an inet family and protocol. Raw sockets of all protocols are under `IPPROTO_RAW`.
/// `ENOENT` where the kernel cannot list the protocol.
pub fn inet_sockets(family: i32, protocol: i32) -> io::Result<Vec<InetSocket>> {
    let mut body = [0u8; 56];
    body[0] = family as u8;
    body[1] = protocol as u8;
    body[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    list(&body, parse_inet)
}

fn parse_inet(message: &[u8]) -> Option<InetSocket> {
    const SHUTDOWN: u16 = 8;
    let port = |at: usize| {
        Some(u16::from_be_bytes(
            message.get(at..at + 2)?.try_into().ok()?,
        ))
    };
    let address = |at: usize| words(message.get(at..at + 16)?).try_into().ok();
    let shutdown = attributes(message.get(72..)?).find(|(kind, _)| *kind == SHUTDOWN);
    Some(InetSocket {
        inode: word(message, 68)?,
        state: SocketState(*message.get(1)?),
        source_port: port(4)?,
        peer_port: port(6)?,
        source: address(8)?,
        peer: address(24)?,
        receive_queue: word(message, 56)?,
        send_queue: word(message, 60)?,
        shutdown: shutdown
            .and_then(|(_, value)| value.first().copied())
            .unwrap_or(0),
    })
}

/// Every netlink socket.
pub fn netlink_sockets() -> io::Result<Vec<NetlinkPeer>> {
    const ALL_PROTOCOLS: u8 = 0xff;
    const SHOW_GROUPS: u32 = 2;
    let mut body = [0u8; 20];
    body[0] = libc::AF_NETLINK as u8;
    body[1] = ALL_PROTOCOLS;
    body[8..12].copy_from_slice(&SHOW_GROUPS.to_ne_bytes());
    list(&body, parse_netlink)
}

fn parse_netlink(message: &[u8]) -> Option<NetlinkPeer> {
    const GROUPS: u16 = 1;
    let groups = attributes(message.get(28..)?).find(|(kind, _)| *kind == GROUPS);
    Some(NetlinkPeer {
        inode: word(message, 16)?,
        protocol: *message.get(2)?,
        state: *message.get(3)?,
        port: word(message, 4)?,
        peer_port: word(message, 8)?,
        peer_group: word(message, 12)?,
        groups: groups.map(|(_, value)| words(value)).unwrap_or_default(),
    })
}

/// A ring of packets that a task may map, as `struct packet_diag_ring` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketRing {
    pub block_size: u32,
    pub block_count: u32,
    pub frame_size: u32,
    pub frame_count: u32,
    pub retire_timeout: u32,
    pub private_size: u32,
    pub features: u32,
}

/// An address that a packet socket listens to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketMembership {
    pub device: u32,
    /// How often it was joined.
    pub count: u32,
    pub kind: u16,
    pub address: Vec<u8>,
}

/// One packet socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketSocket {
    pub inode: u32,
    pub kind: u8,
    /// Of Ethernet, in the machine's order.
    pub protocol: u16,
    /// Number of the device that it is bound to; 0 for all.
    pub device: u32,
    pub version: u32,
    pub reserve: u32,
    pub copy_threshold: u32,
    pub timestamp: u32,
    /// `PDI_*`.
    pub flags: u32,
    pub memberships: Vec<PacketMembership>,
    pub receive_ring: Option<PacketRing>,
    pub send_ring: Option<PacketRing>,
    pub fanout: Option<u32>,
}

/// Every packet socket.
pub fn packet_sockets() -> io::Result<Vec<PacketSocket>> {
    const SHOW_INFO_MCLIST_RINGS_FANOUT: u32 = 15;
    let mut body = [0u8; 20];
    body[0] = libc::AF_PACKET as u8;
    body[8..12].copy_from_slice(&SHOW_INFO_MCLIST_RINGS_FANOUT.to_ne_bytes());
    list(&body, parse_packet)
}

fn parse_packet(message: &[u8]) -> Option<PacketSocket> {
    const MEMBERSHIP: usize = 44;
    let find = |wanted| {
        let mut all = attributes(message.get(16..)?);
        all.find(|(kind, _)| *kind == wanted)
            .map(|(_, value)| value)
    };
    let info = words(find(0)?);
    let [device, version, reserve, copy_threshold, timestamp, flags] = info[..] else {
        return None;
    };
    let memberships = find(1).unwrap_or_default().chunks_exact(MEMBERSHIP);
    Some(PacketSocket {
        inode: word(message, 4)?,
        kind: *message.get(1)?,
        protocol: u16::from_ne_bytes(message.get(2..4)?.try_into().ok()?),
        device,
        version,
        reserve,
        copy_threshold,
        timestamp,
        flags,
        memberships: memberships.map(parse_membership).collect::<Option<_>>()?,
        receive_ring: find(2).and_then(parse_ring),
        send_ring: find(3).and_then(parse_ring),
        fanout: find(4).and_then(|value| word(value, 0)),
    })
}

fn parse_membership(bytes: &[u8]) -> Option<PacketMembership> {
    let short = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    Some(PacketMembership {
        device: word(bytes, 0)?,
        count: word(bytes, 4)?,
        kind: short(8)?,
        address: bytes.get(12..12 + usize::from(short(10)?))?.to_vec(),
    })
}

fn parse_ring(bytes: &[u8]) -> Option<PacketRing> {
    let fields = words(bytes);
    let [
        block_size,
        block_count,
        frame_size,
        frame_count,
        retire_timeout,
        private_size,
        features,
    ] = fields[..]
    else {
        return None;
    };
    Some(PacketRing {
        block_size,
        block_count,
        frame_size,
        frame_count,
        retire_timeout,
        private_size,
        features,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn words(bytes: &[u8]) -> Vec<u32> {
    let chunks = bytes.chunks_exact(4);
    chunks.filter_map(|chunk| word(chunk, 0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::Noise;

    #[test]
    fn answers_survive_any_bytes() {
        let mut body = vec![1; 72];
        for kind in [0, 1, 2, 3, 4, 6, 8, 18] {
            crate::netlink::attribute(&mut body, kind, &[7; 9]);
        }
        Noise::damage(&body, |bytes| drop(parse_unix(bytes)));
        Noise::damage(&body, |bytes| _ = parse_inet(bytes));
    }
    use std::os::fd::AsFd;

    fn inode(file: impl AsFd) -> u32 {
        rustix::fs::fstat(file).expect("open").st_ino as u32
    }

    #[test]
    fn a_waiting_client_is_listed_with_its_listener() {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
        let name = format!("floe-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("short");
        let listener = UnixListener::bind_addr(&address).expect("free");
        let client = UnixStream::connect_addr(&address).expect("listening");
        let all = unix_sockets().expect("sock_diag");
        let find = |wanted| {
            all.iter()
                .find(|socket| socket.inode == wanted)
                .expect("listed")
        };
        let found = find(inode(&listener));
        assert_eq!(found.state, SocketState::LISTEN);
        assert_eq!(found.name[1..], *name.as_bytes());
        assert_eq!(found.waiting, [inode(&client)]);
        let found = find(inode(&client));
        assert_eq!((found.state, found.peer), (SocketState::ESTABLISHED, 0));
    }

    #[test]
    fn a_udp_socket_is_listed_with_its_port() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("free");
        let all = inet_sockets(libc::AF_INET, libc::IPPROTO_UDP).expect("sock_diag");
        let found = all
            .iter()
            .find(|found| found.inode == inode(&socket))
            .expect("listed");
        assert_eq!(
            found.source_port,
            socket.local_addr().expect("bound").port()
        );
        assert_eq!(found.source[0].to_ne_bytes(), [127, 0, 0, 1]);
    }
}
