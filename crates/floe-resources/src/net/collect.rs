//! Writing the images of a network namespace.

use std::os::fd::AsFd;
use std::rc::Rc;

use floe_image::ImageKind;
use floe_image::messages::{NetnsEntry, NetnsId};
use floe_kernel::namespace::NsKind;
use floe_kernel::netlink::NetlinkSocket;
use floe_kernel::rtnetlink::{links, namespace_id};
use floe_options::{DumpOptions, External};

use super::conntrack::{self, Tracked};
use super::error::{Attempt, NetError};
use super::link::{self, Surroundings, TunDevices};
use super::sysctl::{Protocol, collect_device, collect_ipv4, collect_unix};
use super::{firewall, ip_dump, neighbour, nexthop, settings};
use crate::collect::{CollectError, Collector, Obstacle};
use crate::namespace::{TreeNamespace, TreeNamespaces};

/// Writes the images of a namespace; see [`crate::namespace`].
pub fn collect(
    namespace: &TreeNamespace,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let id = u64::from(namespace.id);
    if let Some(name) = external_name(namespace, collector.options) {
        let entry = NetnsEntry {
            ext_key: Some(name.to_string()),
            ..NetnsEntry::default()
        };
        return Ok(collector.side(ImageKind::Netns, id)?.append(&entry)?);
    }
    let known = collector.namespaces().all();
    let Some(namespace) = known.iter().find(|known| known.id == namespace.id) else {
        return Ok(());
    };
    // Files of tun devices tell what the devices themselves do not.
    let namespace = Rc::clone(namespace);
    collector.defer(move |collector| {
        collect_content(&namespace, collector).map_err(|error| as_obstacle(&namespace, error))
    });
    Ok(())
}

/// By what name restore will be given a namespace that is somebody else's.
pub fn external_name<'o>(namespace: &TreeNamespace, options: &'o DumpOptions) -> Option<&'o str> {
    options.external.iter().find_map(|one| match one {
        External::NetNamespace { inode, name }
            if *inode == namespace.namespace.identity().inode =>
        {
            Some(name.as_str())
        }
        _ => None,
    })
}

fn as_obstacle(namespace: &TreeNamespace, error: CollectError) -> CollectError {
    match error {
        CollectError::Net(NetError::Unsupported { object, remedy }) => {
            CollectError::Unsupported(Obstacle {
                pid: namespace.member,
                object,
                remedy,
            })
        }
        error => error,
    }
}

fn collect_content(
    namespace: &TreeNamespace,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let id = u64::from(namespace.id);
    let raw = |collector: &mut Collector<'_>, kind, bytes: &[u8]| -> Result<(), CollectError> {
        if !bytes.is_empty() {
            collector.side(kind, id)?.append_raw(bytes)?;
        }
        Ok(())
    };
    let mut tuns = std::mem::take(collector.cache(TunDevices::default));
    let content = {
        let namespaces = collector.namespaces();
        let _visit = namespaces.visit(&[namespace])?;
        read(namespace, namespaces, collector.options, &mut tuns)?
    };
    *collector.cache(TunDevices::default) = tuns;
    if let Some(settings) = &content.settings {
        collector.side(ImageKind::Netns, id)?.append(settings)?;
        let devices = collector.side(ImageKind::Netdev, id)?;
        for device in &content.devices {
            devices.append(device)?;
        }
    }
    raw(collector, ImageKind::Ifaddr, &content.ip.addresses)?;
    raw(collector, ImageKind::Route, &content.ip.routes)?;
    raw(collector, ImageKind::Route6, &content.ip.routes6)?;
    raw(collector, ImageKind::Rule, &content.ip.rules)?;
    raw(collector, ImageKind::Iptables, &content.rules.iptables)?;
    raw(collector, ImageKind::Ip6tables, &content.rules.ip6tables)?;
    raw(collector, ImageKind::Nftables, &content.rules.nftables)?;
    raw(collector, ImageKind::NetnfCt, &content.tracked.connections)?;
    raw(
        collector,
        ImageKind::NetnfExp,
        &content.tracked.expectations,
    )
}

/// Everything that is kept of a namespace.
#[derive(Default)]
struct Content {
    settings: Option<NetnsEntry>,
    devices: Vec<floe_image::messages::NetDeviceEntry>,
    ip: ip_dump::IpDump,
    rules: firewall::Rules,
    tracked: Tracked,
}

/// Reads the namespace that the calling thread is in.
fn read(
    namespace: &TreeNamespace,
    namespaces: &TreeNamespaces,
    options: &DumpOptions,
    tuns: &mut TunDevices,
) -> Result<Content, NetError> {
    let tracked = conntrack::collect()?;
    if options.empty_net {
        return Ok(Content {
            tracked,
            ..Content::default()
        });
    }
    let socket = NetlinkSocket::open(libc::NETLINK_ROUTE).during("Opening", || "netlink".into())?;
    // A namespace gets its id here when a device in it is first listed.
    links(&socket).during("Listing", || "network devices".to_string())?;
    let nsids = others(&socket, namespaces)?;
    let around = Surroundings {
        own: namespace.id,
        others: &nsids,
        external: &options.external,
    };
    // Before the devices: reading one of tun may give it a carrier for a moment, and so an address.
    let mut ip = ip_dump::collect(&socket)?;
    let devices = link::collect(&socket, around, tuns)?;
    let own = |bytes: Vec<u8>| Some(bytes).filter(|bytes| !bytes.is_empty());
    let floe_rules = ip.all_rules.take();
    Ok(Content {
        devices,
        ip,
        rules: firewall::collect()?,
        tracked,
        settings: Some(NetnsEntry {
            def_conf4: collect_device(Protocol::Ipv4, "default")?,
            all_conf4: collect_device(Protocol::Ipv4, "all")?,
            def_conf6: collect_device(Protocol::Ipv6, "default")?,
            all_conf6: collect_device(Protocol::Ipv6, "all")?,
            unix_conf: collect_unix()?,
            ipv4_sysctl: collect_ipv4()?,
            nsids,
            floe_settings: settings::collect()?,
            floe_nexthops: own(nexthop::collect(&socket)?),
            floe_neighbours: own(neighbour::collect(&socket)?),
            floe_rules,
            ..NetnsEntry::default()
        }),
    })
}

/// The ids that the namespace of the socket has for those of the tree.
fn others(socket: &NetlinkSocket, namespaces: &TreeNamespaces) -> Result<Vec<NetnsId>, NetError> {
    let mut found = Vec::new();
    for other in namespaces
        .all()
        .iter()
        .filter(|one| one.kind() == NsKind::Net)
    {
        let id = namespace_id(socket, other.namespace.as_fd());
        let id = id.during("Asking for the id of", || {
            format!("network namespace {}", other.id)
        })?;
        found.extend(id.map(|value| NetnsId {
            target_ns_id: other.id,
            netnsid_value: value,
        }));
    }
    Ok(found)
}
