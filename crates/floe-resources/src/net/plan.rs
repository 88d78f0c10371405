//! Filling network namespaces again.

use std::io::Read;
use std::os::fd::AsFd;

use floe_image::messages::{NetDeviceEntry, NetnsEntry};
use floe_image::{ImageDir, ImageKind};
use floe_kernel::netlink::NetlinkSocket;
use floe_kernel::rtnetlink::{LinkRequest, set_namespace_id};
use floe_options::{External, RestoreOptions};
use floe_plan::Handle;

use super::conntrack;
use super::error::{Attempt, NetError};
use super::firewall::{self, Rules};
use super::ip_dump::{
    IpDump, execute_addresses, execute_all_rules, execute_routes, execute_rules, with_tentative,
};
use super::link::{self, Network, Outside};
use super::locks::{has_connections, lock_network, rules_come_last};
use super::settings::{self, Stage};
use super::sysctl::{
    Missing, Protocol, execute_device, execute_whole, from_numbers, without_question,
};
use super::{neighbour, nexthop};
use crate::namespace::{filled, made};
use crate::restore::{ExecuteError, PlanError, Planner, World};

/// Devices of all namespaces are there.
const DEVICES: Handle = Handle::Object("network devices", 0);
/// The longest image of rules, addresses or routes that is taken.
const LONGEST: u64 = 256 << 20;

/// The namespace has its own settings.
fn set(id: u32) -> Handle {
    Handle::Object("network settings", u64::from(id))
}

/// Adds the steps that fill a namespace; see [`crate::namespace`].
pub fn plan(id: u32, planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let dir = &planner.images.dir;
    let settings: Option<NetnsEntry> = dir.read_optional(ImageKind::Netns, u64::from(id))?;
    let external = settings.as_ref().is_some_and(|one| one.ext_key.is_some());
    if external {
        let name = format!("network namespace {id} is somebody else's");
        planner.step(name, (&[made(id)], &[filled(id)]), |_| Ok(()));
        return Ok(());
    }
    let empty = planner.options.empty_net;
    let all = networks(dir)?;
    if !empty && all.first() == Some(&id) {
        plan_devices(&all, planner)?;
    }
    let mut needs = vec![made(id)];
    let targets = settings.iter().flat_map(|settings| &settings.nsids);
    needs.extend(targets.map(|nsid| made(nsid.target_ns_id)));
    let settings = settings.filter(|_| !empty).unwrap_or_default();
    let locked = has_connections(id, planner);
    let name = format!("settings of network namespace {id}");
    planner.step(name, (&needs, &[set(id)]), move |world| {
        if locked {
            lock_network(id, world)?;
        }
        execute_settings(id, &settings, world)?;
        if empty {
            world.in_namespace(id, |_| Ok(raise_loopback()?))?;
        }
        Ok(())
    });
    let name = format!("addresses, routes and rules of network namespace {id}");
    let content = Content::read(dir, id, empty)?;
    let missing = missing(planner.options);
    let alone = empty || !all.contains(&id);
    let needs = [if alone { set(id) } else { DEVICES }];
    planner.step(name, (&needs, &[filled(id)]), move |world| {
        world.in_namespace(id, |_| Ok(content.execute(missing)?))?;
        if locked {
            // They might drop what rebuilds the connections.
            rules_come_last(id, content.rules, world);
            return Ok(());
        }
        world.in_namespace(id, |_| Ok(firewall::execute(&content.rules)?))?;
        Ok(())
    });
    Ok(())
}

/// The namespaces of the images whose content is ours to make.
fn networks(dir: &ImageDir) -> Result<Vec<u32>, PlanError> {
    let mut own = Vec::new();
    for id in dir.ids(ImageKind::Netdev)? {
        let settings: Option<NetnsEntry> = dir.read_optional(ImageKind::Netns, id)?;
        if settings.is_none_or(|settings| settings.ext_key.is_none()) {
            own.extend(u32::try_from(id));
        }
    }
    own.sort_unstable();
    Ok(own)
}

fn plan_devices(all: &[u32], planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let dir = &planner.images.dir;
    let mut content = Vec::new();
    for id in all {
        let devices: Vec<NetDeviceEntry> = dir.read_all(ImageKind::Netdev, u64::from(*id))?;
        let addresses = raw_image(dir, ImageKind::Ifaddr, *id)?;
        content.push((*id, devices, addresses));
    }
    let count: usize = content.iter().map(|(_, devices, _)| devices.len()).sum();
    let needs: Vec<Handle> = all.iter().map(|id| set(*id)).collect();
    let name = format!("make {count} network devices");
    planner.step(name, (&needs, &[DEVICES]), move |world| {
        let external = all_external(world.options);
        let home = world.namespaces().home()?;
        let mut places = Vec::new();
        for (id, ..) in &content {
            let namespace = world.namespaces().get(*id)?;
            places.push((namespace, world.in_namespace(*id, |_| Ok(rtnetlink()?))?));
        }
        let pairs = content.into_iter().zip(&places);
        let networks: Vec<Network<'_>> = pairs
            .map(|((id, devices, addresses), (namespace, socket))| {
                Ok(Network {
                    id,
                    namespace,
                    socket,
                    devices,
                    asking: with_tentative(&addresses)?,
                })
            })
            .collect::<Result<_, NetError>>()?;
        let outside = Outside {
            home: &home,
            external: &external,
            missing: missing(world.options),
        };
        Ok(link::execute(&networks, outside)?)
    });
    Ok(())
}

/// `--external`, and `--veth-pair`, which says the same in older words.
fn all_external(options: &RestoreOptions) -> Vec<External> {
    let pairs = options.veth_pairs.iter().map(|pair| {
        let (outer, bridge) = match pair.outer.split_once('@') {
            Some((outer, bridge)) => (outer, Some(bridge.to_string())),
            None => (pair.outer.as_str(), None),
        };
        External::Veth {
            inner: pair.inner.clone(),
            outer: outer.to_string(),
            bridge,
        }
    });
    options.external.iter().cloned().chain(pairs).collect()
}

fn missing(options: &RestoreOptions) -> Missing {
    if options.weak_sysctls {
        Missing::Pass
    } else {
        Missing::Refuse
    }
}

fn rtnetlink() -> Result<NetlinkSocket, NetError> {
    NetlinkSocket::open(libc::NETLINK_ROUTE).during("Opening", || "netlink".to_string())
}

fn execute_settings(
    id: u32,
    settings: &NetnsEntry,
    world: &mut World<'_>,
) -> Result<(), ExecuteError> {
    let missing = missing(world.options);
    world.in_namespace(id, |world| {
        let (old_all, old_default) = (
            from_numbers(&settings.all_conf),
            from_numbers(&settings.def_conf),
        );
        let all4 = if settings.all_conf4.is_empty() {
            &old_all
        } else {
            &settings.all_conf4
        };
        let default4 = if settings.def_conf4.is_empty() {
            &old_default
        } else {
            &settings.def_conf4
        };
        execute_device(Protocol::Ipv4, "all", all4, missing)?;
        execute_device(Protocol::Ipv4, "default", default4, missing)?;
        let all6 = without_question(&settings.all_conf6);
        execute_device(Protocol::Ipv6, "all", &all6, missing)?;
        execute_device(Protocol::Ipv6, "default", &settings.def_conf6, missing)?;
        execute_whole(&settings.unix_conf, &settings.ipv4_sysctl, missing)?;
        settings::execute(&settings.floe_settings, Stage::Namespace, missing);
        let socket = rtnetlink()?;
        for nsid in &settings.nsids {
            let target = world.namespaces().get(nsid.target_ns_id)?;
            match set_namespace_id(&socket, target.as_fd(), nsid.netnsid_value) {
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                other => other.during("Numbering", || {
                    format!("network namespace {}", nsid.target_ns_id)
                })?,
            }
        }
        Ok(())
    })
}

/// A namespace that is left empty has its loopback device up: engines that ask for it (runc) fill in
/// the rest, and connections within the tree need a way.
fn raise_loopback() -> Result<(), NetError> {
    let request = LinkRequest {
        name: Some("lo"),
        flags: libc::IFF_UP as u32,
        ..LinkRequest::default()
    };
    let socket = rtnetlink()?;
    request
        .change(&socket)
        .during("Raising device", || "lo".into())
}

/// An image of the kernel's own messages; empty for none.
fn raw_image(dir: &ImageDir, kind: ImageKind, id: u32) -> Result<Vec<u8>, PlanError> {
    let name = kind.file_name(u64::from(id));
    let mut bytes = Vec::new();
    if let Some(file) = dir.open_file(&name)? {
        let read = file.take(LONGEST).read_to_end(&mut bytes);
        read.map_err(|error| PlanError::damaged(&name, error.to_string()))?;
    }
    Ok(bytes)
}

/// What refers to devices.
#[derive(Default)]
struct Content {
    ip: IpDump,
    rules: Rules,
    connections: Vec<u8>,
    expectations: Vec<u8>,
    whole: NetnsEntry,
    devices: Vec<NetDeviceEntry>,
}

impl Content {
    fn read(dir: &ImageDir, id: u32, empty: bool) -> Result<Self, PlanError> {
        let raw = |kind| raw_image(dir, kind, id);
        let tracked = Content {
            connections: raw(ImageKind::NetnfCt)?,
            expectations: raw(ImageKind::NetnfExp)?,
            ..Content::default()
        };
        if empty {
            return Ok(tracked);
        }
        Ok(Content {
            whole: dir
                .read_optional(ImageKind::Netns, u64::from(id))?
                .unwrap_or_default(),
            devices: dir.read_all(ImageKind::Netdev, u64::from(id))?,
            ip: IpDump {
                addresses: raw(ImageKind::Ifaddr)?,
                routes: raw(ImageKind::Route)?,
                routes6: raw(ImageKind::Route6)?,
                rules: raw(ImageKind::Rule)?,
                all_rules: None,
            },
            rules: Rules {
                nftables: raw(ImageKind::Nftables)?,
                iptables: raw(ImageKind::Iptables)?,
                ip6tables: raw(ImageKind::Ip6tables)?,
            },
            ..tracked
        })
    }

    /// Acts on the namespace that the calling thread is in; packet rules are left to the caller.
    fn execute(&self, missing: Missing) -> Result<(), NetError> {
        let socket = rtnetlink()?;
        execute_addresses(&socket, &self.ip.addresses)?;
        let whole = &self.whole;
        // What the devices did without while they were switched on, and what that changed.
        execute_device(Protocol::Ipv6, "all", &whole.all_conf6, missing)?;
        for device in &self.devices {
            execute_device(Protocol::Ipv6, &device.name, &device.conf6, missing)?;
        }
        settings::execute(&whole.floe_settings, Stage::Devices, missing);
        let own = |bytes: &'_ Option<Vec<u8>>| bytes.clone().unwrap_or_default();
        nexthop::execute(&socket, &own(&whole.floe_nexthops))?;
        execute_routes(&socket, &self.ip.routes)?;
        execute_routes(&socket, &self.ip.routes6)?;
        match &whole.floe_rules {
            Some(rules) => execute_all_rules(&socket, rules)?,
            None => execute_rules(&socket, &self.ip.rules)?,
        }
        neighbour::execute(&socket, &own(&whole.floe_neighbours))?;
        conntrack::execute(&self.connections)?;
        conntrack::execute(&self.expectations)
    }
}
