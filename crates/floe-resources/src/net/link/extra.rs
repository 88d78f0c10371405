//! What is set on a device beyond what CRIU's images have a place for: attributes of rtnetlink, kept as they are.
//!
//! At restore only those are sent that differ from what the new device has: a kernel may refuse others even
//! where they change nothing.

use floe_image::messages::{NdType, NetDeviceEntry};
use floe_kernel::netlink::{NetlinkSocket, attribute, attributes, nested};
use floe_kernel::rtnetlink::{Link, LinkIndex, LinkRequest, Told, add_names, link};

use crate::net::error::{Attempt, NetError};

const IFLA_TXQLEN: u16 = 13;
const IFLA_IFALIAS: u16 = 20;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_GROUP: u16 = 27;
const IFLA_NUM_TX_QUEUES: u16 = 31;
const IFLA_NUM_RX_QUEUES: u16 = 32;
const IFLA_GSO_MAX_SEGS: u16 = 40;
const IFLA_GSO_MAX_SIZE: u16 = 41;
const IFLA_XDP: u16 = 43;
const IFLA_PROP_LIST: u16 = 52;
const IFLA_GRO_MAX_SIZE: u16 = 58;
const IFLA_GSO_IPV4_MAX_SIZE: u16 = 63;
const IFLA_GRO_IPV4_MAX_SIZE: u16 = 64;

/// Can be changed on a device that is there.
const CHANGEABLE: [u16; 8] = [
    IFLA_TXQLEN,
    IFLA_IFALIAS,
    IFLA_GROUP,
    IFLA_GSO_MAX_SEGS,
    IFLA_GSO_MAX_SIZE,
    IFLA_GRO_MAX_SIZE,
    IFLA_GSO_IPV4_MAX_SIZE,
    IFLA_GRO_IPV4_MAX_SIZE,
];

/// `IFLA_BR_*` that are settings: the rest are timers, numbers and what the kernel counts.
fn is_bridge_setting(kind: u16) -> bool {
    matches!(kind, 1..=9 | 22..=39 | 41..=46 | 49)
}

/// `IFLA_BRPORT_*` that are settings.
fn is_port_setting(kind: u16) -> bool {
    matches!(kind, 2..=11 | 25 | 27..=33 | 37 | 39 | 40 | 42 | 43)
}

/// Fills the parts of an entry that are ours.
pub fn collect(link: &Link, entry: &mut NetDeviceEntry) -> Result<(), NetError> {
    refuse_programs(link)?;
    let mut kept = Vec::new();
    for (kind, value) in attributes(&link.attributes) {
        let counts = matches!(kind, IFLA_NUM_TX_QUEUES | IFLA_NUM_RX_QUEUES);
        if counts || CHANGEABLE.contains(&kind) || kind == IFLA_PROP_LIST {
            attribute(&mut kept, kind, value);
        }
    }
    if let Some(mode) = address_mode(&link.attributes) {
        with_address_mode(&mut kept, mode);
    }
    entry.floe_link = Some(kept);
    if link.kind == "bridge" {
        entry.floe_data = Some(filtered(&link.data, is_bridge_setting));
    }
    if link.port_kind == "bridge" {
        entry.floe_port = Some(filtered(&link.port, is_port_setting));
    }
    Ok(())
}

fn refuse_programs(link: &Link) -> Result<(), NetError> {
    const ATTACHED: u16 = 2;
    let mut all = attributes(&link.attributes);
    let xdp = all.find(|(kind, _)| *kind == IFLA_XDP);
    let mut inner = xdp.into_iter().flat_map(|(_, value)| attributes(value));
    if inner.any(|(kind, value)| kind == ATTACHED && value != [0]) {
        return Err(NetError::Unsupported {
            object: format!("The XDP program of network device {}", link.name),
            remedy: format!("detach it: ip link set {} xdp off", link.name),
        });
    }
    Ok(())
}

fn filtered(data: &[u8], keep: fn(u16) -> bool) -> Vec<u8> {
    let mut kept = Vec::new();
    for (kind, value) in attributes(data).filter(|(kind, _)| keep(*kind)) {
        attribute(&mut kept, kind, value);
    }
    kept
}

/// How a device gets addresses of IPv6 by itself (`IFLA_INET6_ADDR_GEN_MODE`).
fn address_mode(link: &[u8]) -> Option<u8> {
    const MODE: u16 = 8;
    let find = |bytes: &[u8], wanted: u16| {
        let mut all = attributes(bytes);
        all.find(|(kind, _)| *kind == wanted)
            .map(|(_, value)| value.to_vec())
    };
    let family = find(&find(link, IFLA_AF_SPEC)?, libc::AF_INET6 as u16)?;
    find(&family, MODE)?.first().copied()
}

fn with_address_mode(bytes: &mut Vec<u8>, mode: u8) {
    const MODE: u16 = 8;
    nested(bytes, IFLA_AF_SPEC, |families| {
        nested(families, libc::AF_INET6 as u16, |family| {
            attribute(family, MODE, &[mode]);
        });
    });
}

/// Sends what differs to a device that is there, before it is switched on.
pub fn execute(socket: &NetlinkSocket, entry: &NetDeviceEntry) -> Result<(), NetError> {
    let what = || format!("network device {}", entry.name);
    let index = LinkIndex(entry.ifindex);
    let now = link(socket, index).during("Reading", what)?;
    let wanted = entry.floe_link.as_deref().unwrap_or_default();
    let mut changes = differing(wanted, &now.attributes);
    let mode = address_mode(wanted).filter(|mode| address_mode(&now.attributes) != Some(*mode));
    if let Some(mode) = mode {
        with_address_mode(&mut changes, mode);
    }
    let bare = LinkRequest {
        index: entry.ifindex,
        ..LinkRequest::default()
    };
    for (kind, value) in attributes(&changes) {
        let mut one = Vec::new();
        attribute(&mut one, kind, value);
        let only = LinkRequest {
            attributes: &one,
            ..bare
        };
        // A driver or a kernel may have other limits here.
        if let Err(error) = only.change(socket) {
            let name = &entry.name;
            tracing::warn!(
                "network device {name} does not take back its attribute {kind}: {error}"
            );
        }
    }
    let has = |attribute: &(u16, &[u8])| attributes(&now.attributes).any(|one| one == *attribute);
    let mut names = attributes(wanted).filter(|(kind, _)| *kind == IFLA_PROP_LIST);
    if let Some((kind, value)) = names.next().filter(|list| !has(list)) {
        let mut list = Vec::new();
        nested(&mut list, kind, |inner| inner.extend_from_slice(value));
        add_names(socket, index, &list).during("Naming", what)?;
    }
    if entry.r#type == NdType::Bridge as i32 {
        let wanted = entry.floe_data.as_deref().unwrap_or_default();
        let changes = different(wanted, &now.data);
        if !changes.is_empty() {
            let told = bare.tell(socket, "bridge", Told::Device(&changes));
            told.during("Setting", || format!("bridge {}", entry.name))?;
        }
    }
    let wanted = entry.floe_port.as_deref().unwrap_or_default();
    let changes = different(wanted, &now.port);
    if !changes.is_empty() && now.port_kind == "bridge" {
        let told = bare.tell(socket, "bridge", Told::Port(&changes));
        told.during("Setting", || format!("bridge port {}", entry.name))?;
    }
    Ok(())
}

/// What can be changed and is to be.
fn differing(wanted: &[u8], now: &[u8]) -> Vec<u8> {
    filtered(&different(wanted, now), |kind| CHANGEABLE.contains(&kind))
}

/// The wanted attributes that are not as wanted.
fn different(wanted: &[u8], now: &[u8]) -> Vec<u8> {
    let mut changes = Vec::new();
    for (kind, value) in attributes(wanted) {
        if !attributes(now).any(|one| one == (kind, value)) {
            attribute(&mut changes, kind, value);
        }
    }
    changes
}

/// `IFLA_VLAN_FLAGS`, a `struct ifla_vlan_flags`: flags, and which of them are meant (`if_link.h`).
const VLAN_FLAGS: u16 = 2;
/// Those that there are (`if_vlan.h`).
const VLAN_FLAGS_MASK: u32 = 0x1f;

/// The driver's attributes to make a device with. Of the flags of a VLAN the kernel tells only where one is set,
/// though a new one has a flag of its own; and it tells of more bits than it takes.
pub fn data_to_make(device: &NetDeviceEntry, kind: &str) -> Vec<u8> {
    let data = device.floe_data.clone().unwrap_or_default();
    if kind != "vlan" {
        return data;
    }
    let told = attributes(&data).find(|(found, _)| *found == VLAN_FLAGS);
    let flags = told.and_then(|(_, value)| value.first_chunk::<4>());
    let mut made = filtered(&data, |found| found != VLAN_FLAGS);
    let mask = VLAN_FLAGS_MASK.to_ne_bytes();
    let flags = [flags.copied().unwrap_or_default(), mask].concat();
    attribute(&mut made, VLAN_FLAGS, &flags);
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vlan_is_made_with_the_flags_that_it_had() {
        let made = |data: &[u8]| {
            let device = NetDeviceEntry {
                floe_data: Some(data.to_vec()),
                ..NetDeviceEntry::default()
            };
            let made = data_to_make(&device, "vlan");
            let all: Vec<_> = attributes(&made)
                .map(|(kind, value)| (kind, value.to_vec()))
                .collect();
            all
        };
        let (mut id, mut set) = (Vec::new(), Vec::new());
        attribute(&mut id, 1, &[5, 0]);
        attribute(&mut set, VLAN_FLAGS, &[3, 0, 0, 0, 255, 255, 255, 255]);
        let flags = |flags| (VLAN_FLAGS, vec![flags, 0, 0, 0, 0x1f, 0, 0, 0]);
        assert_eq!(
            made(&[id.clone(), set].concat()),
            [(1, vec![5, 0]), flags(3)]
        );
        assert_eq!(made(&id), [(1, vec![5, 0]), flags(0)]);
    }
}
