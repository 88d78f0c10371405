//! Options of internet sockets that CRIU's images have no place for.
//!
//! Saved:    as the kernel gives them, where a new socket of the same kind has another value.
//! Rebuilt:  set on the finished socket. Needs: nothing; one that this kernel refuses is a warning.
//! Not kept: memberships in multicast groups, which the kernel tells nobody; options that only switch a state on
//!           its way (`TCP_QUICKACK`, `TCP_CORK` is in the images), `TCP_WINDOW_CLAMP` (repair mode has the window).

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};

use floe_image::messages::FloeSocketOption;
use floe_kernel::socket::socket;
use floe_kernel::sockopt::{SocketOption, option_bytes, set_option_bytes};

use crate::collect::Collector;

/// The longest value: the name of a congestion control.
const LONGEST: usize = 16;

/// Options by their level, in the order in which they are set. Numbers stand here where libc has no name.
const GENERAL: &[i32] = &[
    libc::SO_TIMESTAMP,
    libc::SO_TIMESTAMPNS,
    libc::SO_TIMESTAMPING,
    libc::SO_RXQ_OVFL,
    libc::SO_MAX_PACING_RATE,
    libc::SO_SELECT_ERR_QUEUE,
    libc::SO_ZEROCOPY,
    // Nothing can be attached behind it.
    libc::SO_LOCK_FILTER,
];
const IP_BIND_ADDRESS_NO_PORT: i32 = 24;
const IP_LOCAL_PORT_RANGE: i32 = 51;
const IPV4: &[i32] = &[
    libc::IP_RECVOPTS,
    libc::IP_RETOPTS,
    libc::IP_MTU_DISCOVER,
    libc::IP_RECVERR,
    libc::IP_RECVTTL,
    libc::IP_RECVTOS,
    libc::IP_TRANSPARENT,
    libc::IP_RECVORIGDSTADDR,
    libc::IP_MINTTL,
    libc::IP_CHECKSUM,
    IP_BIND_ADDRESS_NO_PORT,
    libc::IP_RECVFRAGSIZE,
    libc::IP_MULTICAST_IF,
    libc::IP_MULTICAST_TTL,
    libc::IP_MULTICAST_LOOP,
    libc::IP_MULTICAST_ALL,
    libc::IP_UNICAST_IF,
    IP_LOCAL_PORT_RANGE,
];
const IPV6: &[i32] = &[
    libc::IPV6_UNICAST_HOPS,
    libc::IPV6_MULTICAST_IF,
    libc::IPV6_MULTICAST_HOPS,
    libc::IPV6_MULTICAST_LOOP,
    libc::IPV6_MULTICAST_ALL,
    libc::IPV6_MTU_DISCOVER,
    libc::IPV6_RECVERR,
    libc::IPV6_RECVPKTINFO,
    libc::IPV6_RECVHOPLIMIT,
    libc::IPV6_RECVRTHDR,
    libc::IPV6_RECVHOPOPTS,
    libc::IPV6_RECVDSTOPTS,
    libc::IPV6_RECVPATHMTU,
    libc::IPV6_RECVTCLASS,
    libc::IPV6_RECVORIGDSTADDR,
    libc::IPV6_RECVFRAGSIZE,
    libc::IPV6_DONTFRAG,
    libc::IPV6_TCLASS,
    libc::IPV6_AUTOFLOWLABEL,
    libc::IPV6_FLOWINFO_SEND,
    libc::IPV6_ADDR_PREFERENCES,
    libc::IPV6_MINHOPCOUNT,
    libc::IPV6_TRANSPARENT,
    libc::IPV6_UNICAST_IF,
    libc::IPV6_FREEBIND,
];
const TCP: &[i32] = &[
    libc::TCP_CONGESTION,
    libc::TCP_USER_TIMEOUT,
    libc::TCP_DEFER_ACCEPT,
    libc::TCP_NOTSENT_LOWAT,
    libc::TCP_SYNCNT,
    libc::TCP_LINGER2,
    libc::TCP_THIN_LINEAR_TIMEOUTS,
    libc::TCP_INQ,
];
const UDP_NO_CHECK6_TX: i32 = 101;
const UDP_NO_CHECK6_RX: i32 = 102;
const UDP: &[i32] = &[
    UDP_NO_CHECK6_TX,
    UDP_NO_CHECK6_RX,
    libc::UDP_SEGMENT,
    libc::UDP_GRO,
];

/// Family, type and protocol.
type Kind = (i32, i32, i32);

/// The options that a kind of socket may have.
fn known((family, _, protocol): Kind) -> impl Iterator<Item = SocketOption> {
    let levels = [
        (libc::SOL_SOCKET, GENERAL, true),
        // Sockets of IPv6 may have peers of the other family.
        (libc::SOL_IP, IPV4, true),
        (libc::SOL_IPV6, IPV6, family == libc::AF_INET6),
        (libc::SOL_TCP, TCP, protocol == libc::IPPROTO_TCP),
        (libc::SOL_UDP, UDP, protocol == libc::IPPROTO_UDP),
    ];
    let levels = levels.into_iter().filter(|(.., has)| *has);
    levels.flat_map(|(level, names, _)| names.iter().map(move |name| SocketOption(level, *name)))
}

/// What new sockets have, by their kind.
#[derive(Default)]
struct Fresh(HashMap<Kind, Vec<Option<Vec<u8>>>>);

fn values(socket: BorrowedFd<'_>, kind: Kind) -> Vec<Option<Vec<u8>>> {
    let value = |option| option_bytes(socket, option, LONGEST).ok();
    known(kind).map(value).collect()
}

/// The options of a socket that a new one would not have.
pub(super) fn collect(
    file: BorrowedFd<'_>,
    kind: Kind,
    collector: &mut Collector<'_>,
) -> Vec<FloeSocketOption> {
    let known_fresh = &mut collector.cache(Fresh::default).0;
    let fresh = known_fresh.entry(kind).or_insert_with(|| {
        let made = socket(kind.0, kind.1, kind.2);
        made.map_or_else(|_| Vec::new(), |made| values(made.as_fd(), kind))
    });
    let own = known(kind).zip(values(file, kind)).zip(fresh);
    let changed = own.filter_map(|((option, own), fresh)| {
        let value = own.filter(|own| fresh.as_ref() != Some(own))?;
        Some(FloeSocketOption {
            level: option.0.cast_unsigned(),
            name: option.1.cast_unsigned(),
            value,
        })
    });
    changed.collect()
}

/// Sets them; only those that this module knows, whatever the images say.
pub(super) fn set(socket: BorrowedFd<'_>, kind: Kind, ino: u32, options: &[FloeSocketOption]) {
    for known in known(kind) {
        let found = options.iter().find(|option| {
            (option.level.cast_signed(), option.name.cast_signed()) == (known.0, known.1)
        });
        let Some(option) = found else { continue };
        if let Err(error) = set_option_bytes(socket, known, &option.value) {
            tracing::warn!(
                %error,
                "option {} of level {} of internet socket {ino} is not what it was", option.name, option.level
            );
        }
    }
}
