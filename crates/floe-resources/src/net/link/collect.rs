//! What is saved of each device of a namespace.

use floe_image::messages::{MacvlanLinkEntry, NdType, NetDeviceEntry, NetnsId};
use floe_kernel::netlink::{NetlinkSocket, attributes};
use floe_kernel::rtnetlink::{Link, links};
use floe_options::External;

use super::tun::TunDevices;
use super::{FALLBACKS, PLAIN, extra, sit, type_of};
use crate::net::error::{Attempt, NetError};
use crate::net::sysctl::{Protocol, collect_device};

/// What the devices of one namespace refer to.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// The number of the namespace in the images.
    pub own: u32,
    /// By which ids it knows the other namespaces of the tree.
    pub others: &'a [NetnsId],
    /// What is outside of the tree.
    pub external: &'a [External],
}

/// Lists the devices of the namespace that the calling thread is in.
pub fn collect(
    socket: &NetlinkSocket,
    around: Surroundings<'_>,
    tuns: &mut TunDevices,
) -> Result<Vec<NetDeviceEntry>, NetError> {
    let found = links(socket).during("Listing", || "network devices".to_string())?;
    let kept = found
        .iter()
        .filter(|link| !FALLBACKS.contains(&(&link.kind, &link.name)));
    kept.map(|link| collect_one(link, around, tuns)).collect()
}

fn collect_one(
    link: &Link,
    around: Surroundings<'_>,
    tuns: &mut TunDevices,
) -> Result<NetDeviceEntry, NetError> {
    let loopback = link.hardware == libc::ARPHRD_LOOPBACK;
    let kind = if loopback {
        NdType::Loopback
    } else {
        type_of(&link.kind).unwrap_or(NdType::Extlink)
    };
    let passed_in = around
        .external
        .iter()
        .any(|one| matches!(one, External::NetDevice { name, .. } if *name == link.name));
    let plain = kind == NdType::Extlink && PLAIN.contains(&link.kind.as_str());
    if (kind == NdType::Extlink && !plain || kind == NdType::Venet) && !passed_in {
        return Err(unknown(link));
    }
    let mut entry = NetDeviceEntry {
        r#type: kind as i32,
        ifindex: link.index,
        mtu: link.mtu,
        flags: link.flags,
        name: link.name.clone(),
        address: link.address.clone().filter(|_| !loopback),
        conf4: collect_device(Protocol::Ipv4, &link.name)?,
        conf6: collect_device(Protocol::Ipv6, &link.name)?,
        peer_ifindex: Some(link.link.unwrap_or(link.index)),
        peer_nsid: peer_namespace(link, around),
        master: link.master,
        ..NetDeviceEntry::default()
    };
    match kind {
        NdType::Macvlan => entry.macvlan = Some(macvlan(link)?),
        NdType::Sit => entry.sit = Some(sit::collect(&link.data)),
        NdType::Tun => entry.tun = Some(tuns.collect(link, around.own)?),
        NdType::Extlink if plain => {
            entry.floe_kind = Some(link.kind.clone());
            entry.floe_data = Some(link.data.clone());
        }
        _ => {}
    }
    extra::collect(link, &mut entry)?;
    Ok(entry)
}

fn unknown(link: &Link) -> NetError {
    let kind = match link.kind.as_str() {
        "" => "a physical device",
        kind => kind,
    };
    NetError::Unsupported {
        object: format!("Network device {} ({kind})", link.name),
        remedy: format!(
            "remove it, or pass another one in at restore: --external netdev[{0}]:{0} for both",
            link.name
        ),
    }
}

/// The number of the namespace where a device's other end is; `None` if that is outside of the tree.
fn peer_namespace(link: &Link, around: Surroundings<'_>) -> Option<u32> {
    let Some(id) = link.link_namespace else {
        return Some(around.own);
    };
    let other = around.others.iter().find(|other| other.netnsid_value == id);
    if other.is_none() {
        tracing::info!(
            device = link.name,
            "the other end is outside of the tree; restore will ask for --external"
        );
    }
    other.map(|other| other.target_ns_id)
}

fn macvlan(link: &Link) -> Result<MacvlanLinkEntry, NetError> {
    const MODE: u16 = 1;
    const FLAGS: u16 = 2;
    let find = |wanted| {
        let mut all = attributes(&link.data);
        all.find(|(kind, _)| *kind == wanted)
            .map(|(_, value)| value)
    };
    let number = |value: &[u8]| {
        let mut bytes = [0; 4];
        let size = value.len().min(4);
        bytes[..size].copy_from_slice(&value[..size]);
        u32::from_ne_bytes(bytes)
    };
    let mode = find(MODE).ok_or_else(|| NetError::Unsupported {
        object: format!("Network device {} (macvlan without a mode)", link.name),
        remedy: "remove it".into(),
    })?;
    Ok(MacvlanLinkEntry {
        mode: number(mode),
        flags: find(FLAGS).map(number),
    })
}
