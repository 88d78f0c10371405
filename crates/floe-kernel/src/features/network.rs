//! Probes of sockets, sock_diag, rtnetlink and netfilter.
//!
//! Kernel contract: netlink(7) answers each request with the dump, or with NLMSG_ERROR whose
//! code is ENOENT or EINVAL for a family or protocol without a handler.

use std::io;
use std::mem;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::ProbeContext;
use super::process::errno;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_ACK: u16 = 4;

fn socket(family: i32, kind: i32, protocol: i32) -> Option<OwnedFd> {
    // SAFETY: no pointers; a good result is a new descriptor.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    // SAFETY: checked to be a new descriptor that nobody else owns.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_option(fd: RawFd, level: i32, option: i32, value: i32) -> io::Result<()> {
    let size = mem::size_of_val(&value) as libc::socklen_t;
    // SAFETY: the kernel reads `size` bytes from `value`, which is live.
    let result = unsafe { libc::setsockopt(fd, level, option, (&raw const value).cast(), size) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Reads an option of `N` bytes; some are refused for any other length.
fn has_option<const N: usize>(fd: RawFd, level: i32, option: i32) -> bool {
    let mut value = [0u8; N];
    let mut size = N as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes into `value`.
    unsafe { libc::getsockopt(fd, level, option, value.as_mut_ptr().cast(), &raw mut size) == 0 }
}

/// Switches repair off again, so that closing sends no reset where a connection is.
fn in_repair(fd: RawFd, then: impl FnOnce(RawFd) -> bool) -> bool {
    if set_option(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1).is_err() {
        return false;
    }
    let result = then(fd);
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR, 0).is_ok() && result
}

pub(super) fn tcp_repair(_: &ProbeContext) -> bool {
    socket(libc::AF_INET, libc::SOCK_STREAM, 0)
        .is_some_and(|tcp| in_repair(tcp.as_raw_fd(), |_| true))
}

pub(super) fn tcp_repair_window(_: &ProbeContext) -> bool {
    const TCP_REPAIR_WINDOW: i32 = 29;
    let tcp = socket(libc::AF_INET, libc::SOCK_STREAM, 0);
    tcp.is_some_and(|tcp| {
        in_repair(tcp.as_raw_fd(), |fd| {
            has_option::<20>(fd, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW)
        })
    })
}

/// Connects to ourselves, closes one direction and tries repair on that side.
pub(super) fn tcp_half_closed(_: &ProbeContext) -> bool {
    let Ok(listener) = TcpListener::bind(("127.0.0.1", 0)) else {
        return false;
    };
    let Ok(address) = listener.local_addr() else {
        return false;
    };
    let Ok(client) = TcpStream::connect(address) else {
        return false;
    };
    client.shutdown(std::net::Shutdown::Write).is_ok() && in_repair(client.as_raw_fd(), |_| true)
}

/// Sends one netlink request and returns the error code of the answer, 0 for a good one.
fn netlink(protocol: i32, kind: u16, flags: u16, body: &[u8]) -> Option<i32> {
    let socket = socket(libc::AF_NETLINK, libc::SOCK_RAW, protocol)?;
    let mut message = Vec::with_capacity(16 + body.len());
    message.extend_from_slice(&(16 + body.len() as u32).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(body);
    // SAFETY: `message` is live and as long as said; an unconnected netlink socket talks to the kernel.
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            message.as_ptr().cast(),
            message.len(),
            0,
        )
    };
    if sent < 0 {
        return None;
    }
    let timeout = libc::timeval {
        tv_sec: 1,
        tv_usec: 0,
    };
    let size = mem::size_of_val(&timeout) as libc::socklen_t;
    // SAFETY: the kernel reads one timeval.
    unsafe {
        let pointer = (&raw const timeout).cast();
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            pointer,
            size,
        );
    }
    let mut answer = vec![0u8; 32 * 1024];
    // SAFETY: the kernel writes at most the length of `answer`.
    let got = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            answer.as_mut_ptr().cast(),
            answer.len(),
            0,
        )
    };
    let answer = answer.get(..usize::try_from(got).ok()?)?;
    let word = |at: usize| {
        answer
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok())
    };
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    const NLMSG_ERROR: u16 = 2;
    match kind {
        NLMSG_ERROR => word(16).map(|bytes| -i32::from_ne_bytes(bytes)),
        _ => Some(0),
    }
}

/// `struct inet_diag_req_v2`: family, protocol, then states and an empty socket id.
fn inet_request(protocol: i32) -> bool {
    let mut body = [0u8; 56];
    body[0] = libc::AF_INET as u8;
    body[1] = protocol as u8;
    body[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    netlink(
        libc::NETLINK_SOCK_DIAG,
        SOCK_DIAG_BY_FAMILY,
        NLM_F_DUMP,
        &body,
    ) == Some(0)
}

pub(super) fn inet_diag(_: &ProbeContext) -> bool {
    inet_request(libc::IPPROTO_TCP)
}

pub(super) fn udp_diag(_: &ProbeContext) -> bool {
    inet_request(libc::IPPROTO_UDP)
}

pub(super) fn raw_diag(_: &ProbeContext) -> bool {
    inet_request(libc::IPPROTO_RAW)
}

/// `struct unix_diag_req`: family, states, no inode, UDIAG_SHOW_NAME.
pub(super) fn unix_diag(_: &ProbeContext) -> bool {
    let mut body = [0u8; 24];
    body[0] = libc::AF_UNIX as u8;
    body[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    body[12] = 1;
    netlink(
        libc::NETLINK_SOCK_DIAG,
        SOCK_DIAG_BY_FAMILY,
        NLM_F_DUMP,
        &body,
    ) == Some(0)
}

/// `struct packet_diag_req`: family, protocol 0, PACKET_SHOW_INFO.
pub(super) fn packet_diag(_: &ProbeContext) -> bool {
    let mut body = [0u8; 20];
    body[0] = libc::AF_PACKET as u8;
    body[8] = 1;
    netlink(
        libc::NETLINK_SOCK_DIAG,
        SOCK_DIAG_BY_FAMILY,
        NLM_F_DUMP,
        &body,
    ) == Some(0)
}

/// `struct netlink_diag_req`: family, NDIAG_PROTO_ALL, NDIAG_SHOW_MEMINFO.
pub(super) fn netlink_diag(_: &ProbeContext) -> bool {
    const NDIAG_PROTO_ALL: u8 = 0xff;
    let mut body = [0u8; 20];
    body[0] = libc::AF_NETLINK as u8;
    body[1] = NDIAG_PROTO_ALL;
    body[8] = 1;
    netlink(
        libc::NETLINK_SOCK_DIAG,
        SOCK_DIAG_BY_FAMILY,
        NLM_F_DUMP,
        &body,
    ) == Some(0)
}

/// An unbound socket has no file (ENOENT); an unknown request is EINVAL or ENOTTY.
pub(super) fn unix_socket_file(_: &ProbeContext) -> bool {
    const SIOCUNIXFILE: libc::c_ulong = 0x89e0;
    let Some(socket) = socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) else {
        return false;
    };
    // SAFETY: the request takes no argument; a good result would be a descriptor, but an unbound
    // socket has none.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCUNIXFILE, 0) };
    result < 0 && errno() == libc::ENOENT
}

/// Asks for the network namespace behind `fd`, a new descriptor if it is there.
fn netns_of(fd: RawFd) -> bool {
    const SIOCGSKNS: libc::c_ulong = 0x894c;
    // SAFETY: the request takes no argument; a good result is a new descriptor.
    let namespace = unsafe { libc::ioctl(fd, SIOCGSKNS, 0) };
    if namespace >= 0 {
        // SAFETY: checked to be a new descriptor; taken over to be closed.
        drop(unsafe { OwnedFd::from_raw_fd(namespace) });
    }
    namespace >= 0
}

pub(super) fn socket_netns(_: &ProbeContext) -> bool {
    socket(libc::AF_UNIX, libc::SOCK_STREAM, 0).is_some_and(|socket| netns_of(socket.as_raw_fd()))
}

pub(super) fn tun(_: &ProbeContext) -> bool {
    std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .is_ok()
}

pub(super) fn tun_netns(_: &ProbeContext) -> bool {
    let tun = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    tun.is_ok_and(|tun| netns_of(tun.as_raw_fd()))
}

pub(super) fn scm_pidfd(_: &ProbeContext) -> bool {
    const SO_PASSPIDFD: i32 = 76;
    let unix = socket(libc::AF_UNIX, libc::SOCK_STREAM, 0);
    unix.is_some_and(|unix| has_option::<4>(unix.as_raw_fd(), libc::SOL_SOCKET, SO_PASSPIDFD))
}

pub(super) fn sockopt_buf_lock(_: &ProbeContext) -> bool {
    const SO_BUF_LOCK: i32 = 72;
    let tcp = socket(libc::AF_INET, libc::SOCK_STREAM, 0);
    tcp.is_some_and(|tcp| has_option::<4>(tcp.as_raw_fd(), libc::SOL_SOCKET, SO_BUF_LOCK))
}

pub(super) fn ipv6_freebind(_: &ProbeContext) -> bool {
    const IPV6_FREEBIND: i32 = 78;
    let tcp = socket(libc::AF_INET6, libc::SOCK_STREAM, 0);
    tcp.is_some_and(|tcp| set_option(tcp.as_raw_fd(), libc::SOL_IPV6, IPV6_FREEBIND, 1).is_ok())
}

/// NFT_MSG_GETGEN, the smallest question to nf_tables.
pub(super) fn nftables(_: &ProbeContext) -> bool {
    const NFNL_SUBSYS_NFTABLES: u16 = 10;
    const NFT_MSG_GETGEN: u16 = 16;
    netlink(
        libc::NETLINK_NETFILTER,
        (NFNL_SUBSYS_NFTABLES << 8) | NFT_MSG_GETGEN,
        0,
        &[0; 4],
    ) == Some(0)
}

/// IPT_SO_GET_INFO for the filter table on a raw socket.
pub(super) fn iptables_legacy(_: &ProbeContext) -> bool {
    const IPT_SO_GET_INFO: i32 = 64;
    let Some(raw) = socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW) else {
        return false;
    };
    let mut info = [0u8; 84];
    info[..6].copy_from_slice(b"filter");
    let mut size = info.len() as libc::socklen_t;
    // SAFETY: `info` is as long as struct ipt_getinfo, read for the name and written back.
    unsafe {
        libc::getsockopt(
            raw.as_raw_fd(),
            libc::SOL_IP,
            IPT_SO_GET_INFO,
            info.as_mut_ptr().cast(),
            &raw mut size,
        ) == 0
    }
}

/// RTM_GETNSID for our own namespace, by pid.
pub(super) fn nsid(_: &ProbeContext) -> bool {
    const RTM_GETNSID: u16 = 90;
    const NETNSA_PID: u16 = 2;
    // struct rtgenmsg padded to four bytes, then one attribute.
    let mut body = vec![0u8; 4];
    body.extend_from_slice(&8u16.to_ne_bytes());
    body.extend_from_slice(&NETNSA_PID.to_ne_bytes());
    body.extend_from_slice(&std::process::id().to_ne_bytes());
    netlink(libc::NETLINK_ROUTE, RTM_GETNSID, 0, &body) == Some(0)
}

/// Gives the loopback device an impossible new index: a kernel that knows the attribute says
/// ERANGE (its policy demands a positive number), one that does not ignores it.
pub(super) fn new_ifindex(_: &ProbeContext) -> bool {
    const RTM_SETLINK: u16 = 19;
    const IFLA_NEW_IFINDEX: u16 = 49;
    // struct ifinfomsg: family, pad, type, index 1 (lo), flags, change.
    let mut body = vec![0u8; 16];
    body[4..8].copy_from_slice(&1u32.to_ne_bytes());
    body.extend_from_slice(&8u16.to_ne_bytes());
    body.extend_from_slice(&IFLA_NEW_IFINDEX.to_ne_bytes());
    body.extend_from_slice(&(-1i32).to_ne_bytes());
    matches!(
        netlink(libc::NETLINK_ROUTE, RTM_SETLINK, NLM_F_ACK, &body),
        Some(libc::ERANGE)
    )
}
