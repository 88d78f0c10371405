//! Options of the IP level, of raw sockets and of TCP.

use std::io;
use std::os::fd::BorrowedFd;

use floe_image::messages::{InetSkEntry, IpOptsEntry, IpOptsRawEntry, TcpOptsEntry};
use floe_kernel::sockopt::{
    SocketOption, option_bytes, option_number, set_option_bytes, set_option_number,
};

use crate::restore::{Attempt, ExecuteError};

const fn ip(name: i32) -> SocketOption {
    SocketOption(libc::IPPROTO_IP, name)
}

const fn ipv6(name: i32) -> SocketOption {
    SocketOption(libc::IPPROTO_IPV6, name)
}

const fn tcp(name: i32) -> SocketOption {
    SocketOption(libc::IPPROTO_TCP, name)
}

const FREEBIND4: SocketOption = ip(libc::IP_FREEBIND);
const FREEBIND6: SocketOption = ipv6(78);
const PKTINFO4: SocketOption = ip(libc::IP_PKTINFO);
const PKTINFO6: SocketOption = ipv6(libc::IPV6_RECVPKTINFO);
const TOS: SocketOption = ip(libc::IP_TOS);
const TTL: SocketOption = ip(libc::IP_TTL);
const HDRINCL4: SocketOption = ip(libc::IP_HDRINCL);
const HDRINCL6: SocketOption = ipv6(36);
const NODEFRAG: SocketOption = ip(22);
const ICMP4_FILTER: SocketOption = SocketOption(255, 1);
const ICMP6_FILTER: SocketOption = SocketOption(libc::IPPROTO_ICMPV6, 1);
pub(super) const V6ONLY: SocketOption = ipv6(libc::IPV6_V6ONLY);

fn is_v6(entry: &InetSkEntry) -> bool {
    entry.family == libc::AF_INET6.cast_unsigned()
}

/// Options that are on; what is off, or zero, is left out.
pub(super) fn collect_ip_options(
    socket: BorrowedFd<'_>,
    entry: &InetSkEntry,
) -> io::Result<IpOptsEntry> {
    let flag = |option| Ok::<_, io::Error>((option_number(socket, option)? != 0).then_some(true));
    let number = |option| {
        let value = option_number(socket, option)?.cast_unsigned();
        Ok::<_, io::Error>((value != 0).then_some(value))
    };
    let v6 = is_v6(entry);
    let raw = entry.r#type == libc::SOCK_RAW.cast_unsigned();
    Ok(IpOptsEntry {
        freebind: flag(if v6 { FREEBIND6 } else { FREEBIND4 })?,
        pktinfo: flag(if v6 { PKTINFO6 } else { PKTINFO4 })?,
        tos: if v6 { None } else { number(TOS)? },
        ttl: if v6 { None } else { number(TTL)? },
        raw: if raw {
            Some(collect_raw(socket, entry)?)
        } else {
            None
        },
    })
}

fn icmp_filter(entry: &InetSkEntry) -> Option<(SocketOption, usize)> {
    match (entry.proto.cast_signed(), is_v6(entry)) {
        (libc::IPPROTO_ICMP, false) => Some((ICMP4_FILTER, 4)),
        (libc::IPPROTO_ICMPV6, true) => Some((ICMP6_FILTER, 32)),
        _ => None,
    }
}

fn collect_raw(socket: BorrowedFd<'_>, entry: &InetSkEntry) -> io::Result<IpOptsRawEntry> {
    let flag = |option| Ok::<_, io::Error>((option_number(socket, option)? != 0).then_some(true));
    let v6 = is_v6(entry);
    let filter = match icmp_filter(entry) {
        Some((option, size)) => option_bytes(socket, option, size)?,
        None => Vec::new(),
    };
    let words = filter.chunks_exact(4);
    let words = words.filter_map(|word| Some(u32::from_ne_bytes(word.try_into().ok()?)));
    Ok(IpOptsRawEntry {
        hdrincl: flag(if v6 { HDRINCL6 } else { HDRINCL4 })?,
        nodefrag: if v6 { None } else { flag(NODEFRAG)? },
        checksum: None,
        icmpv_filter: words.collect(),
    })
}

/// Options of a TCP socket.
pub(super) fn collect_tcp_options(socket: BorrowedFd<'_>) -> io::Result<TcpOptsEntry> {
    let number = |name| option_number(socket, tcp(name)).map(i32::cast_unsigned);
    let flag = |name| Ok::<_, io::Error>((number(name)? != 0).then_some(true));
    Ok(TcpOptsEntry {
        cork: flag(libc::TCP_CORK)?,
        nodelay: flag(libc::TCP_NODELAY)?,
        keepcnt: Some(number(libc::TCP_KEEPCNT)?),
        keepidle: Some(number(libc::TCP_KEEPIDLE)?),
        keepintvl: Some(number(libc::TCP_KEEPINTVL)?),
    })
}

/// Sets the saved options of the IP level; before those of the socket level, as `IP_TOS` changes the priority.
pub(super) fn set_ip_options(
    socket: BorrowedFd<'_>,
    entry: &InetSkEntry,
) -> Result<(), ExecuteError> {
    let Some(options) = &entry.ip_opts else {
        return Ok(());
    };
    let v6 = is_v6(entry);
    let numbers = [
        (
            if v6 { FREEBIND6 } else { FREEBIND4 },
            options.freebind.map(u32::from),
        ),
        (
            if v6 { PKTINFO6 } else { PKTINFO4 },
            options.pktinfo.map(u32::from),
        ),
        (TOS, options.tos.filter(|_| !v6)),
        (TTL, options.ttl.filter(|_| !v6)),
    ];
    set_numbers(socket, &numbers)?;
    let Some(raw) = &options.raw else {
        return Ok(());
    };
    if let Some((option, _)) = icmp_filter(entry).filter(|_| !raw.icmpv_filter.is_empty()) {
        let bytes: Vec<u8> = raw
            .icmpv_filter
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        set_option_bytes(socket, option, &bytes).during("Setting the filter of", || {
            format!("raw socket {}", entry.ino)
        })?;
    }
    let numbers = [
        (NODEFRAG, raw.nodefrag.map(u32::from)),
        (
            if v6 { HDRINCL6 } else { HDRINCL4 },
            raw.hdrincl.map(u32::from),
        ),
    ];
    set_numbers(socket, &numbers)
}

/// Sets the saved options of a TCP socket.
pub(super) fn set_tcp_options(
    socket: BorrowedFd<'_>,
    options: &TcpOptsEntry,
) -> Result<(), ExecuteError> {
    let numbers = [
        (tcp(libc::TCP_NODELAY), options.nodelay.map(u32::from)),
        (tcp(libc::TCP_CORK), options.cork.map(u32::from)),
        (tcp(libc::TCP_KEEPCNT), options.keepcnt),
        (tcp(libc::TCP_KEEPIDLE), options.keepidle),
        (tcp(libc::TCP_KEEPINTVL), options.keepintvl),
    ];
    set_numbers(socket, &numbers)
}

fn set_numbers(
    socket: BorrowedFd<'_>,
    numbers: &[(SocketOption, Option<u32>)],
) -> Result<(), ExecuteError> {
    for (option, value) in numbers {
        if let Some(value) = value {
            set_option_number(socket, *option, value.cast_signed())
                .during("Setting socket option", || {
                    format!("{} of level {} to {value}", option.1, option.0)
                })?;
        }
    }
    Ok(())
}
