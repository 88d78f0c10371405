//! Internet sockets (`ip(7)`): TCP, UDP, UDP-Lite, ICMP and raw ones.
//!
//! Saved:    addresses, state, backlog, shut directions, options of all levels; TCP: see [`tcp`].
//! Rebuilt:  bound, listening or connected with shared ports allowed, then as saved. Needs: listeners first.
//! Not kept: unread datagrams, TLS and MD5 keys, MPTCP (refused); see `more_options`.

mod address;
mod collect;
mod fault;
mod ip_options;
mod more_options;
mod ping;
mod plan;
mod restore_tcp;
mod tcp;
mod tcp_state;

use floe_image::messages::{FdTypes, FileEntry, InetSkEntry};

use super::{FdKind, FdRestore, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId};
use crate::restore::{PlanError, Planner};

pub use fault::{AddressFault, address_of, protocol_name};
pub use plan::release_connections;
pub use tcp::{HeldConnections, SilencedConnections, hold_connections};

/// See the module.
pub struct InetSocket;

const LISTEN: u32 = 10;

impl FdKind for InetSocket {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.target().starts_with(b"socket:[")
            && matches!(
                super::socket_options::family_of(fd.file()),
                Some(libc::AF_INET | libc::AF_INET6)
            )
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        collect::collect(id, fd, collector)
    }
}

impl FdRestore for InetSocket {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Inetsk
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        plan::plan(payload(file, &file.isk)?, planner)
    }
}

/// Whether it is one end of a TCP connection.
pub(crate) fn is_connection(entry: &InetSkEntry) -> bool {
    entry.proto == libc::IPPROTO_TCP.cast_unsigned()
        && entry.r#type == libc::SOCK_STREAM.cast_unsigned()
        && entry.dst_port != 0
}
