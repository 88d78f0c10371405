//! Packet sockets (`packet(7)`).
//!
//! Saved:    type, protocol, device, version of rings, flags, memberships, rings, fanout, options, owner.
//! Rebuilt:  bound to the device of the same number, then the rest. Needs: the devices.
//! Not kept: captured packets. Mappings of rings are `vma::socket`'s.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use floe_image::messages::{FdTypes, FileEntry, PacketMclist, PacketRing, PacketSockEntry};
use floe_kernel::sock_diag::{PacketRing as ListedRing, PacketSocket as Listed, packet_sockets};
use floe_kernel::socket::{bind, socket};
use floe_kernel::sockopt::{SocketOption, set_option_bytes, set_option_number};

use super::socket_options::{collect_options, family_of, set_options};
use super::{FdKind, FdRestore, file_entry, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::net::{SocketPlace, in_every_network, network_number};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, plan_owner, set_flags};

/// See the module.
pub struct PacketSocket;

/// `SOCK_PACKET`, the older interface without a link-level address.
const SOCK_PACKET: u32 = 10;
/// The longest address of a membership.
const LONGEST_ADDRESS: usize = 32;

const AUXDATA: u32 = 2;
const ORIGDEV: u32 = 4;
const VNET_HDR: u32 = 8;
const LOSS: u32 = 16;

const fn packet(name: i32) -> SocketOption {
    SocketOption(libc::SOL_PACKET, name)
}

struct Table(HashMap<u32, Listed>);

impl Table {
    fn read(collector: &Collector<'_>) -> Result<Self, CollectError> {
        let listed = in_every_network(collector, "packet sockets", packet_sockets)?;
        Ok(Table(
            listed
                .into_iter()
                .map(|socket| (socket.inode, socket))
                .collect(),
        ))
    }
}

impl FdKind for PacketSocket {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.target().starts_with(b"socket:[") && family_of(fd.file()) == Some(libc::AF_PACKET)
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let inode = fd.stat().st_ino as u32;
        let refuse = |what: &str, remedy: &str| {
            let what = format!("packet socket {inode}: {what}");
            Err(CollectError::Unsupported(Obstacle::fd(
                fd.pid(),
                fd.fd(),
                what,
                remedy,
            )))
        };
        let Some(listed) = collector
            .try_cache(|collector| Table::read(collector))?
            .0
            .get(&inode)
            .cloned()
        else {
            return refuse(
                "in no network namespace of the tree",
                "close it before the checkpoint",
            );
        };
        if listed.memberships.iter().any(|one| one.count != 1) {
            return refuse(
                "an address was joined twice",
                "leave it once before the checkpoint",
            );
        }
        let options = collect_options(fd.file(), libc::AF_PACKET)
            .map_err(|error| fd.failed("Reading socket options", error))?;
        let entry = PacketSockEntry {
            id: id.0,
            flags: fd.flags(),
            fown: fd.owner()?,
            opts: options,
            ns_id: network_number(fd, collector)?,
            ..entry_of(&listed)
        };
        Ok(FileEntry {
            psk: Some(entry),
            ..file_entry(FdTypes::Packetsk, id)
        })
    }
}

fn entry_of(listed: &Listed) -> PacketSockEntry {
    let memberships = listed.memberships.iter().map(|one| PacketMclist {
        index: one.device,
        r#type: one.kind.into(),
        addr: one.address.clone(),
    });
    PacketSockEntry {
        r#type: listed.kind.into(),
        // The image has it as socket(2) takes it.
        protocol: listed.protocol.to_be().into(),
        ifindex: listed.device,
        version: listed.version,
        reserve: listed.reserve,
        aux_data: listed.flags & AUXDATA != 0,
        orig_dev: listed.flags & ORIGDEV != 0,
        vnet_hdr: listed.flags & VNET_HDR != 0,
        loss: listed.flags & LOSS != 0,
        timestamp: listed.timestamp,
        copy_thresh: listed.copy_threshold,
        mclist: memberships.collect(),
        fanout: listed.fanout,
        rx_ring: listed.receive_ring.map(ring_entry),
        tx_ring: listed.send_ring.map(ring_entry),
        ..PacketSockEntry::default()
    }
}

fn ring_entry(ring: ListedRing) -> PacketRing {
    PacketRing {
        block_size: ring.block_size,
        block_nr: ring.block_count,
        frame_size: ring.frame_size,
        frame_nr: ring.frame_count,
        retire_tmo: ring.retire_timeout,
        sizeof_priv: ring.private_size,
        features: ring.features,
    }
}

impl FdRestore for PacketSocket {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Packetsk
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.psk)?;
        if entry
            .mclist
            .iter()
            .any(|one| one.addr.len() > LONGEST_ADDRESS)
        {
            let what = format!("packet socket {:#x} has a membership too long", entry.id);
            return Err(PlanError::damaged("files.img", what));
        }
        let name = format!("make packet socket {:#x}", entry.id);
        let place = SocketPlace::new(planner, entry.ns_id);
        planner.open(entry.id, name, &place.needs(), move |world| {
            place.visit(world, |_| make(entry))
        });
        plan_owner(planner, entry.id, &entry.fown);
        Ok(())
    }
}

fn make(entry: &PacketSockEntry) -> Result<OwnedFd, ExecuteError> {
    let what = || format!("{:#x}", entry.id);
    let [kind, protocol] = [entry.r#type, entry.protocol].map(u32::cast_signed);
    let file = socket(libc::AF_PACKET, kind, protocol).during("Making packet socket", what)?;
    if entry.r#type == SOCK_PACKET {
        bind_by_name(file.as_fd(), entry).during("Binding packet socket", what)?;
    } else {
        bind(file.as_fd(), &address(entry.ifindex)).during("Binding packet socket", what)?;
        set_packet_options(file.as_fd(), entry).during("Setting options of packet socket", what)?;
    }
    set_flags(file.as_fd(), entry.flags)?;
    set_options(file.as_fd(), &entry.opts)?;
    Ok(file)
}

/// `struct sockaddr_ll` with a device alone; the protocol stays that of the socket.
fn address(device: u32) -> Vec<u8> {
    let mut bytes = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&device.to_ne_bytes());
    bytes.resize(20, 0);
    bytes
}

fn bind_by_name(file: BorrowedFd<'_>, entry: &PacketSockEntry) -> io::Result<()> {
    const NAME: usize = 14;
    if entry.ifindex == 0 {
        return Ok(());
    }
    let name = rustix::net::netdevice::index_to_name(file, entry.ifindex)?;
    let mut bytes = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
    bytes.extend(name.bytes().take(NAME - 1));
    bytes.resize(2 + NAME, 0);
    bind(file, &bytes)
}

fn set_packet_options(file: BorrowedFd<'_>, entry: &PacketSockEntry) -> io::Result<()> {
    let set = |name, value: u32| set_option_number(file, packet(name), value.cast_signed());
    set(libc::PACKET_VERSION, entry.version)?;
    set(libc::PACKET_RESERVE, entry.reserve)?;
    set(libc::PACKET_TIMESTAMP, entry.timestamp)?;
    set(libc::PACKET_COPY_THRESH, entry.copy_thresh)?;
    for (name, on) in [
        (libc::PACKET_AUXDATA, entry.aux_data),
        (libc::PACKET_ORIGDEV, entry.orig_dev),
        (libc::PACKET_VNET_HDR, entry.vnet_hdr),
        (libc::PACKET_LOSS, entry.loss),
    ] {
        if on {
            set(name, 1)?;
        }
    }
    for one in &entry.mclist {
        let mut bytes = one.index.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&(one.r#type as u16).to_ne_bytes());
        bytes.extend_from_slice(&(one.addr.len() as u16).to_ne_bytes());
        bytes.extend_from_slice(&one.addr);
        bytes.resize(8 + LONGEST_ADDRESS, 0);
        set_option_bytes(file, packet(libc::PACKET_ADD_MEMBERSHIP), &bytes)?;
    }
    for (name, ring) in [
        (libc::PACKET_RX_RING, &entry.rx_ring),
        (libc::PACKET_TX_RING, &entry.tx_ring),
    ] {
        if let Some(ring) = ring {
            set_option_bytes(file, packet(name), &ring_bytes(ring))?;
        }
    }
    // CRIU's default for an absent number is all ones.
    match entry.fanout {
        None | Some(u32::MAX) => Ok(()),
        Some(fanout) => set(libc::PACKET_FANOUT, fanout),
    }
}

/// `struct tpacket_req3`, of which older versions read the start.
fn ring_bytes(ring: &PacketRing) -> Vec<u8> {
    let words = [
        ring.block_size,
        ring.block_nr,
        ring.frame_size,
        ring.frame_nr,
        ring.retire_tmo,
        ring.sizeof_priv,
        ring.features,
    ];
    words.into_iter().flat_map(u32::to_ne_bytes).collect()
}
