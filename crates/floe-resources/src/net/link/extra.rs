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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_sent() {
        let mut now = Vec::new();
        attribute(&mut now, IFLA_TXQLEN, &1000u32.to_ne_bytes());
        attribute(&mut now, IFLA_GROUP, &[0; 4]);
        let mut wanted = Vec::new();
        attribute(&mut wanted, IFLA_TXQLEN, &77u32.to_ne_bytes());
        attribute(&mut wanted, IFLA_GROUP, &[0; 4]);
        attribute(&mut wanted, IFLA_NUM_TX_QUEUES, &[4, 0, 0, 0]);
        let changes = differing(&wanted, &now);
        let kinds: Vec<u16> = attributes(&changes).map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [IFLA_TXQLEN]);
    }

    #[test]
    fn the_way_to_addresses_is_read_back() {
        let mut bytes = Vec::new();
        with_address_mode(&mut bytes, 1);
        assert_eq!(address_mode(&bytes), Some(1));
    }
}
