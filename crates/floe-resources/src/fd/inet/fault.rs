//! Why a socket cannot have its address on this machine. The images are in order.

use std::io;
use std::net::IpAddr;

use floe_image::messages::InetSkEntry;
use rustix::io::Errno;

use super::address::{End, source};

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressFault {
    #[error("{protocol} port {port} is in use")]
    PortTaken { protocol: &'static str, port: u32 },
    #[error("no network device here has the address {address}")]
    NotHere { address: IpAddr },
}

impl AddressFault {
    /// What to do about it.
    pub fn remedy(&self) -> String {
        match self {
            AddressFault::PortTaken { port, .. } => format!(
                "end the program that holds it (ss -lp 'sport = {port}'), or restore in a network namespace"
            ),
            AddressFault::NotHere { address } => format!(
                "give it to one (ip address add {address} dev NAME), or restore in a network namespace that has it"
            ),
        }
    }

    /// The fault behind an error of `bind` or `listen`, if it is one.
    pub(super) fn of(error: &io::Error, entry: &InetSkEntry, from: &End) -> Option<AddressFault> {
        match Errno::from_io_error(error)? {
            Errno::ADDRINUSE => Some(AddressFault::PortTaken {
                protocol: protocol_name(entry),
                port: from.port,
            }),
            Errno::ADDRNOTAVAIL => Some(AddressFault::NotHere {
                address: from.ip()?,
            }),
            _ => None,
        }
    }
}

/// The address that a socket is bound to.
pub fn address_of(entry: &InetSkEntry) -> Option<IpAddr> {
    source(entry).ok()?.ip()
}

/// As `ss` and people call it.
pub fn protocol_name(entry: &InetSkEntry) -> &'static str {
    match entry.proto.cast_signed() {
        libc::IPPROTO_TCP => "tcp",
        libc::IPPROTO_UDP => "udp",
        libc::IPPROTO_UDPLITE => "udplite",
        _ => "ip",
    }
}
