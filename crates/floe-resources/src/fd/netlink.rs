//! Netlink sockets (`netlink(7)`).
//!
//! Saved:    protocol, port, groups, what it is connected to, options of the socket level, owner.
//! Rebuilt:  bound to its port, or to a new one if that is taken; groups; connected. Needs: nothing.
//! Not kept: unread messages (refused), options of the netlink level.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use floe_image::messages::{FdTypes, FileEntry, NetlinkSkEntry};
use floe_kernel::sock_diag::{NetlinkPeer, netlink_sockets};
use floe_kernel::socket::{bind, connect, socket};
use floe_kernel::sockopt::{SocketOption, option_number, set_option_number};
use rustix::event::{PollFd, PollFlags};

use super::socket_options::{collect_options, family_of, general, set_options};
use super::{FdKind, FdRestore, file_entry, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::net::{SocketPlace, in_every_network, network_number};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, plan_owner, set_flags};

/// See the module.
pub struct NetlinkSocket;

/// `netlink_sk_entry.state`.
const CONNECTED: u32 = 1;

struct Table(HashMap<u32, NetlinkPeer>);

impl Table {
    fn read(collector: &Collector<'_>) -> Result<Self, CollectError> {
        let listed = in_every_network(collector, "netlink sockets", netlink_sockets)?;
        Ok(Table(
            listed
                .into_iter()
                .map(|socket| (socket.inode, socket))
                .collect(),
        ))
    }
}

impl FdKind for NetlinkSocket {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.target().starts_with(b"socket:[") && family_of(fd.file()) == Some(libc::AF_NETLINK)
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let failed = |error| fd.failed("Reading socket options", error);
        if has_unread(fd.file()).map_err(|error| fd.failed("Polling", error))? {
            let remedy = "let the program read it, and checkpoint again";
            let what = "netlink socket with unread messages";
            return Err(CollectError::Unsupported(Obstacle::fd(
                fd.pid(),
                fd.fd(),
                what,
                remedy,
            )));
        }
        let inode = fd.stat().st_ino as u32;
        let listed = collector
            .try_cache(|collector| Table::read(collector))?
            .0
            .get(&inode)
            .cloned();
        let protocol = option_number(fd.file(), general(libc::SO_PROTOCOL)).map_err(failed)?;
        let mut entry = NetlinkSkEntry {
            id: id.0,
            ino: inode,
            protocol: protocol.cast_unsigned(),
            flags: fd.flags(),
            fown: fd.owner()?,
            opts: collect_options(fd.file(), libc::AF_NETLINK).map_err(failed)?,
            ns_id: network_number(fd, collector)?,
            ..NetlinkSkEntry::default()
        };
        // One that is neither bound nor connected may be in no list.
        if let Some(mut listed) = listed {
            while listed.groups.last() == Some(&0) {
                listed.groups.pop();
            }
            entry.state = listed.state.into();
            entry.portid = listed.port;
            entry.dst_portid = listed.peer_port;
            entry.dst_group = listed.peer_group;
            entry.groups = listed.groups;
        }
        Ok(FileEntry {
            nlsk: Some(entry),
            ..file_entry(FdTypes::Netlinksk, id)
        })
    }
}

fn has_unread(socket: BorrowedFd<'_>) -> rustix::io::Result<bool> {
    let mut polled = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    rustix::event::poll(&mut polled, Some(&rustix::event::Timespec::default()))?;
    Ok(polled[0].revents().contains(PollFlags::IN))
}

impl FdRestore for NetlinkSocket {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Netlinksk
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.nlsk)?;
        let name = format!("make netlink socket {}", entry.ino);
        let place = SocketPlace::new(planner, entry.ns_id);
        planner.open(entry.id, name, &place.needs(), move |world| {
            place.visit(world, |_| make(entry))
        });
        plan_owner(planner, entry.id, &entry.fown);
        Ok(())
    }
}

fn make(entry: &NetlinkSkEntry) -> Result<OwnedFd, ExecuteError> {
    let what = || format!("{} (protocol {})", entry.ino, entry.protocol);
    let file = socket(
        libc::AF_NETLINK,
        libc::SOCK_RAW,
        entry.protocol.cast_signed(),
    )
    .during("Making netlink socket", what)?;
    if entry.portid != 0 {
        match bind(file.as_fd(), &address(entry.portid, 0)) {
            // Ports are mostly chosen by the kernel, and nobody depends on the number.
            Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {
                tracing::warn!(port = entry.portid, "a netlink socket gets another port");
                bind(file.as_fd(), &address(0, 0))
            }
            other => other,
        }
        .during("Binding netlink socket", what)?;
    }
    join_groups(file.as_fd(), entry)?;
    if entry.state == CONNECTED {
        let group = match entry.dst_group {
            0 => 0,
            group => 1u32.checked_shl(group - 1).unwrap_or(0),
        };
        connect(file.as_fd(), &address(entry.dst_portid, group))
            .during("Connecting netlink socket", what)?;
    }
    set_flags(file.as_fd(), entry.flags)?;
    set_options(file.as_fd(), &entry.opts)?;
    Ok(file)
}

/// Joins groups one by one, as an address has room for 32 of them only.
fn join_groups(file: BorrowedFd<'_>, entry: &NetlinkSkEntry) -> Result<(), ExecuteError> {
    const ADD_MEMBERSHIP: SocketOption = SocketOption(libc::SOL_NETLINK, 1);
    for (index, word) in entry.groups.iter().enumerate() {
        for bit in (0..32).filter(|bit| word & (1 << bit) != 0) {
            let group = (index * 32 + bit + 1) as i32;
            set_option_number(file, ADD_MEMBERSHIP, group).during("Joining group", || {
                format!("{group} of netlink protocol {}", entry.protocol)
            })?;
        }
    }
    Ok(())
}

/// `struct sockaddr_nl`.
fn address(port: u32, groups: u32) -> Vec<u8> {
    let mut bytes = (libc::AF_NETLINK as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&port.to_ne_bytes());
    bytes.extend_from_slice(&groups.to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_comes_back_with_its_groups() {
        let entry = NetlinkSkEntry {
            protocol: libc::NETLINK_ROUTE.cast_unsigned(),
            groups: vec![0b101],
            opts: floe_image::messages::SkOptsEntry {
                so_sndbuf: 8192,
                so_rcvbuf: 8192,
                ..Default::default()
            },
            ..NetlinkSkEntry::default()
        };
        let made = make(&entry).expect("no privileges needed");
        assert!(!has_unread(made.as_fd()).expect("pollable"));
        let inode = rustix::fs::fstat(&made).expect("open").st_ino as u32;
        let listed = netlink_sockets().expect("sock_diag");
        let found = listed.iter().find(|found| found.inode == inode);
        assert_eq!(found.map(|found| found.groups[0]), Some(0b101));
    }
}
