//! Reading internet sockets: what `sock_diag` tells, and what only the socket itself can.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;

use floe_image::messages::{FdTypes, FileEntry, InetSkEntry, TcpOptsEntry};
use floe_kernel::sock_diag::{InetSocket as Listed, SocketState, inet_sockets};
use floe_kernel::socket::{local_address, peer_address};
use floe_kernel::sockopt::{SocketOption, option_number};
use rustix::event::{PollFd, PollFlags};

use super::super::file_entry;
use super::super::socket_options::{bound_device, collect_options, general};
use super::address::End;
use super::ip_options::{V6ONLY, collect_ip_options, collect_tcp_options};
use super::more_options;
use super::tcp::note_connection;
use super::{LISTEN, is_connection};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::net::{in_every_network, network_number};

const MPTCP: i32 = 262;
const UDP_LITE: i32 = 136;
const READ_SHUT: u8 = 1;

/// Sockets that the kernel lists, by inode, for each family and protocol that was asked for.
#[derive(Default)]
struct Tables(HashMap<(i32, i32), HashMap<u32, Listed>>);

/// What a socket is.
#[derive(Clone, Copy)]
struct Kind {
    family: i32,
    kind: i32,
    protocol: i32,
}

impl Kind {
    fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let number = |name| option_number(socket, general(name));
        Ok(Kind {
            family: number(libc::SO_DOMAIN)?,
            kind: number(libc::SO_TYPE)?,
            protocol: number(libc::SO_PROTOCOL)?,
        })
    }

    fn is_tcp(self) -> bool {
        self.kind == libc::SOCK_STREAM && self.protocol == libc::IPPROTO_TCP
    }

    /// The protocol under which sockets of this kind are listed.
    fn listed_under(self) -> Option<i32> {
        match (self.kind, self.protocol) {
            (libc::SOCK_RAW, _) => Some(libc::IPPROTO_RAW),
            (_, libc::IPPROTO_TCP | libc::IPPROTO_UDP | UDP_LITE) => Some(self.protocol),
            _ => None,
        }
    }

    /// Why it cannot be saved, with a remedy.
    fn obstacle(self) -> Option<(String, &'static str)> {
        let supported = match self.kind {
            libc::SOCK_RAW => true,
            libc::SOCK_STREAM => self.protocol == libc::IPPROTO_TCP,
            libc::SOCK_DGRAM => matches!(
                self.protocol,
                libc::IPPROTO_UDP | UDP_LITE | libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6
            ),
            _ => false,
        };
        let remedy = match self.protocol {
            _ if supported => return None,
            MPTCP => "use plain TCP (for Go programs: GODEBUG=multipathtcp=0)",
            _ => "close it before the checkpoint; this protocol is not supported",
        };
        let what = format!(
            "socket of type {} and protocol {}",
            self.kind, self.protocol
        );
        Some((what, remedy))
    }
}

pub(super) fn collect(
    id: FileId,
    fd: &FdProbe<'_>,
    collector: &mut Collector<'_>,
) -> Result<FileEntry, CollectError> {
    let kind = Kind::of(fd.file()).map_err(|error| fd.failed("Reading the type", error))?;
    let refuse = |what: String, remedy: &str| {
        Err(CollectError::Unsupported(Obstacle::fd(
            fd.pid(),
            fd.fd(),
            what,
            remedy,
        )))
    };
    if let Some((what, remedy)) = kind.obstacle() {
        return refuse(what, remedy);
    }
    let inode = fd.stat().st_ino as u32;
    let socket = match listed(kind, inode, collector)? {
        Some(socket) => socket,
        None => unlisted(kind, inode, fd.file())
            .map_err(|error| fd.failed("Reading the addresses", error))?,
    };
    if let Some((what, remedy)) = state_obstacle(kind, &socket, fd, collector) {
        return refuse(what, remedy);
    }
    let mut entry = InetSkEntry {
        ns_id: network_number(fd, collector)?,
        ..make_entry(id, fd, (kind, &socket))?
    };
    let kinds = (kind.family, kind.kind, kind.protocol);
    entry.opts.floe_more = more_options::collect(fd.file(), kinds, collector);
    if is_connection(&entry) && !collector.options.sockets.tcp_close {
        note_connection(&entry, fd, collector)?;
    }
    Ok(FileEntry {
        isk: Some(entry),
        ..file_entry(FdTypes::Inetsk, id)
    })
}

fn listed(
    kind: Kind,
    inode: u32,
    collector: &mut Collector<'_>,
) -> Result<Option<Listed>, CollectError> {
    let Some(protocol) = kind.listed_under() else {
        return Ok(None);
    };
    let key = (kind.family, protocol);
    if !collector.cache(Tables::default).0.contains_key(&key) {
        let what = format!("the sockets of protocol {protocol}");
        let all = in_every_network(collector, &what, || {
            match inet_sockets(kind.family, protocol) {
                // No module for this protocol: the socket itself tells nearly as much.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Vec::new()),
                other => other,
            }
        })?;
        let all = all.into_iter().map(|one| (one.inode, one)).collect();
        collector.cache(Tables::default).0.insert(key, all);
    }
    let tables = &collector.cache(Tables::default).0;
    Ok(tables[&key].get(&inode).cloned())
}

/// A socket that is in no list: not bound, or closed.
fn unlisted(kind: Kind, inode: u32, socket: BorrowedFd<'_>) -> io::Result<Listed> {
    let address = local_address(socket)?;
    let source = End::from_sockaddr(&address).unwrap_or_default();
    let peer = match peer_address(socket, address.len()) {
        Ok(address) => End::from_sockaddr(&address).unwrap_or_default(),
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => End::default(),
        Err(error) => return Err(error),
    };
    Ok(Listed {
        inode,
        state: SocketState::CLOSE,
        source_port: source.port as u16,
        peer_port: peer.port as u16,
        source: four(&source.words),
        peer: four(&peer.words),
        receive_queue: 0,
        send_queue: 0,
        shutdown: if kind.is_tcp() {
            polled_shutdown(socket)?
        } else {
            0
        },
    })
}

fn four(words: &[u32]) -> [u32; 4] {
    let mut four = [0; 4];
    for (to, from) in four.iter_mut().zip(words) {
        *to = *from;
    }
    four
}

/// Only polling tells that reading was shut on a socket that is closed.
fn polled_shutdown(socket: BorrowedFd<'_>) -> io::Result<u8> {
    let mut polled = [PollFd::from_borrowed_fd(
        socket,
        PollFlags::RDHUP | PollFlags::HUP,
    )];
    rustix::event::poll(&mut polled, Some(&rustix::event::Timespec::default()))?;
    let events = polled[0].revents();
    let both = events.contains(PollFlags::HUP) && events.contains(PollFlags::RDHUP);
    Ok(if both { READ_SHUT } else { 0 })
}

/// What the state of the socket has against it, with a remedy.
fn state_obstacle(
    kind: Kind,
    socket: &Listed,
    fd: &FdProbe<'_>,
    collector: &Collector<'_>,
) -> Option<(String, &'static str)> {
    let options = &collector.options.sockets;
    if kind.kind == libc::SOCK_DGRAM {
        const UDP_CORK: SocketOption = SocketOption(libc::IPPROTO_UDP, 1);
        let udp = matches!(kind.protocol, libc::IPPROTO_UDP | UDP_LITE);
        if udp && option_number(fd.file(), UDP_CORK).is_ok_and(|corked| corked != 0) {
            let remedy = "let the program send what it holds back (UDP_CORK) first";
            return Some(("corked UDP socket".into(), remedy));
        }
        if socket.receive_queue != 0 {
            tracing::warn!(fd = %fd.fd(), pid = %fd.pid(), "unread datagrams are dropped");
        }
        return None;
    }
    if !kind.is_tcp() {
        return None;
    }
    match socket.state {
        SocketState::LISTEN if socket.receive_queue != 0 && !options.tcp_skip_in_flight => Some((
            "listening TCP socket with connections that are not accepted".into(),
            "let the program accept them, or use --skip-in-flight to drop them",
        )),
        SocketState::LISTEN | SocketState::CLOSE => None,
        _ if socket.peer_port != 0 && !options.tcp_established && !options.tcp_close => Some((
            "connected TCP socket".into(),
            "use --tcp-established to keep the connection, or --tcp-close to give it up",
        )),
        SocketState::ESTABLISHED
        | SocketState::SYN_SENT
        | SocketState::FIN_WAIT1
        | SocketState::FIN_WAIT2
        | SocketState::CLOSE_WAIT
        | SocketState::LAST_ACK
        | SocketState::CLOSING => None,
        state => Some((
            format!("TCP socket in state {}", state.0),
            "wait until the connection is established or closed",
        )),
    }
}

fn make_entry(
    id: FileId,
    fd: &FdProbe<'_>,
    (kind, socket): (Kind, &Listed),
) -> Result<InetSkEntry, CollectError> {
    let v6 = kind.family == libc::AF_INET6;
    let words = if v6 { 4 } else { 1 };
    let source = End {
        words: socket.source[..words].to_vec(),
        port: socket.source_port.into(),
    };
    let failed = |error| fd.failed("Reading socket options", error);
    let listening = kind.is_tcp() && socket.state == SocketState::LISTEN;
    let mut entry = InetSkEntry {
        id: id.0,
        ino: socket.inode,
        family: kind.family.cast_unsigned(),
        r#type: kind.kind.cast_unsigned(),
        proto: kind.protocol.cast_unsigned(),
        state: if listening {
            LISTEN
        } else {
            socket.state.0.into()
        },
        src_port: source.port,
        dst_port: socket.peer_port.into(),
        flags: fd.flags(),
        backlog: socket.send_queue,
        src_addr: source.words.clone(),
        dst_addr: socket.peer[..words].to_vec(),
        fown: fd.owner()?,
        opts: collect_options(fd.file(), kind.family).map_err(failed)?,
        shutdown: (socket.shutdown != 0).then(|| socket.shutdown.into()),
        ..InetSkEntry::default()
    };
    if v6 {
        let only = option_number(fd.file(), V6ONLY).map_err(failed)?;
        entry.v6only = Some(only != 0);
        if source.port != 0 && source.needs_device() {
            entry.ifname = bound_device(fd.file()).map_err(failed)?;
        }
    }
    entry.ip_opts = Some(collect_ip_options(fd.file(), &entry).map_err(failed)?);
    entry.tcp_opts = Some(if kind.is_tcp() {
        collect_tcp_options(fd.file()).map_err(failed)?
    } else {
        TcpOptsEntry::default()
    });
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn an_unbound_socket_has_no_addresses() {
        let socket =
            floe_kernel::socket::socket(libc::AF_INET, libc::SOCK_STREAM, 0).expect("a socket");
        let kind = Kind::of(socket.as_fd()).expect("a socket");
        assert!(kind.is_tcp() && kind.obstacle().is_none());
        let found = unlisted(kind, 7, socket.as_fd()).expect("readable");
        assert_eq!(
            (found.source_port, found.peer_port, found.shutdown),
            (0, 0, 0)
        );
    }
}
