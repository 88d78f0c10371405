//! Making the devices of all namespaces of a tree.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::rc::Rc;

use floe_image::messages::{NdType, NetDeviceEntry};
use floe_kernel::namespace::{Home, Namespace, NsKind};
use floe_kernel::netlink::{NetlinkSocket, attribute};
use floe_kernel::rtnetlink::{Link, LinkRequest, VethPeer, links};
use floe_options::External;

use super::{sit, tun};
use crate::net::error::{Attempt, NetError};
use crate::net::sysctl::{Missing, Protocol, execute_device, from_numbers};

/// `IFF_UP`.
const UP: u32 = 1;

/// A namespace that gets devices.
#[derive(Debug)]
pub struct Network<'i> {
    /// Its number in the images.
    pub id: u32,
    pub namespace: &'i Namespace,
    /// Made in it.
    pub socket: &'i NetlinkSocket,
    pub devices: Vec<NetDeviceEntry>,
}

/// What is outside of the tree.
#[derive(Clone, Copy, Debug)]
pub struct Outside<'a> {
    /// Our own namespace, which devices come from and lead to.
    pub home: &'a Rc<Home>,
    pub external: &'a [External],
    pub missing: Missing,
}

/// Makes all devices of all namespaces.
pub fn execute(networks: &[Network<'_>], outside: Outside<'_>) -> Result<(), NetError> {
    let own = NetlinkSocket::open(libc::NETLINK_ROUTE).during("Opening", || "netlink".into())?;
    let mut maker = Maker {
        networks,
        outside,
        own,
        made: HashSet::new(),
        far_ends: HashSet::new(),
    };
    let all = networks
        .iter()
        .flat_map(|network| network.devices.iter().map(move |device| (network, device)));
    let mut waiting: Vec<_> = all.collect();
    while !waiting.is_empty() {
        let before = waiting.len();
        let mut later = Vec::new();
        for (network, device) in waiting {
            if maker.is_ready(network, device) {
                maker.make(network, device)?;
            } else {
                later.push((network, device));
            }
        }
        if later.len() == before {
            let names: Vec<&str> = later.iter().map(|(_, device)| &*device.name).collect();
            return Err(NetError::Damaged(format!(
                "Network devices whose master or lower device is missing: {}",
                names.join(", ")
            )));
        }
        waiting = later;
    }
    Ok(())
}

struct Maker<'a> {
    networks: &'a [Network<'a>],
    outside: Outside<'a>,
    /// In our own namespace.
    own: NetlinkSocket,
    made: HashSet<(u32, u32)>,
    /// Ends that came into being with their peers.
    far_ends: HashSet<(u32, u32)>,
}

impl Maker<'_> {
    fn is_ready(&self, network: &Network<'_>, device: &NetDeviceEntry) -> bool {
        let made = |index: u32| self.made.contains(&(network.id, index));
        let below = self.below(network, device);
        device.master.is_none_or(made) && below.is_none_or(made)
    }

    /// The device of the same namespace that this one is on top of.
    fn below(&self, network: &Network<'_>, device: &NetDeviceEntry) -> Option<u32> {
        let stacked = matches!(kind_of(device), NdType::Macvlan | NdType::Extlink);
        let here = device.peer_nsid == Some(network.id);
        let other = device.peer_ifindex.filter(|index| *index != device.ifindex);
        let known = |index: &u32| network.devices.iter().any(|one| one.ifindex == *index);
        other.filter(|index| stacked && here && known(index))
    }

    fn make(&mut self, network: &Network<'_>, device: &NetDeviceEntry) -> Result<(), NetError> {
        let what = || format!("network device {}", device.name);
        tracing::debug!(
            device = device.name,
            network = network.id,
            "making a network device"
        );
        self.bring(network, device)?;
        self.made.insert((network.id, device.ifindex));
        if let Some(master) = device.master {
            let request = LinkRequest {
                index: device.ifindex,
                master: Some(master),
                ..LinkRequest::default()
            };
            request
                .change(network.socket)
                .during("Setting the master of", what)?;
        }
        let visit = self.outside.home.visit([network.namespace]);
        let _visit = visit.during("Entering the namespace of", what)?;
        let old = from_numbers(&device.conf);
        let conf4 = if device.conf4.is_empty() {
            &old
        } else {
            &device.conf4
        };
        let missing = self.outside.missing;
        execute_device(Protocol::Ipv4, &device.name, conf4, missing)?;
        execute_device(Protocol::Ipv6, &device.name, &device.conf6, missing)
    }

    fn bring(&mut self, network: &Network<'_>, device: &NetDeviceEntry) -> Result<(), NetError> {
        let what = || format!("network device {}", device.name);
        let socket = network.socket;
        if let Some(original) = self.passed_in(device) {
            return self.move_in(network, device, &original);
        }
        match kind_of(device) {
            NdType::Loopback => request(device, 0).change(socket).during("Setting", what),
            NdType::Veth => self.make_veth(network, device),
            NdType::Tun => {
                {
                    let visit = self.outside.home.visit([network.namespace]);
                    let _visit = visit.during("Entering the namespace of", what)?;
                    tun::execute(device)?;
                }
                request(device, device.ifindex)
                    .change(socket)
                    .during("Setting", what)
            }
            NdType::Bridge => {
                let made = request(device, device.ifindex).make(socket, "bridge", &[]);
                made.during("Making", what)
            }
            NdType::Macvlan => self.make_macvlan(network, device),
            NdType::Sit => {
                let data = device.sit.as_ref().map(sit::encode).unwrap_or_default();
                let made = request(device, device.ifindex).make(socket, "sit", &data);
                made.during("Making", what)
            }
            NdType::Extlink => match &device.floe_kind {
                Some(kind) => {
                    let data = device.floe_data.as_deref().unwrap_or_default();
                    let request = LinkRequest {
                        link: self.below(network, device),
                        ..request(device, device.ifindex)
                    };
                    request.make(socket, kind, data).during("Making", what)
                }
                // Somebody else has put it there.
                None => request(device, 0).change(socket).during("Setting", what),
            },
            NdType::Venet => Err(NetError::Unsupported {
                object: format!("Network device {} (venet)", device.name),
                remedy: "its driver is not part of Linux; remove it before the dump".into(),
            }),
        }
    }

    /// The device of ours that stands for this one, by `--external netdev[NAME]:ORIGINAL`.
    fn passed_in(&self, device: &NetDeviceEntry) -> Option<String> {
        self.outside.external.iter().find_map(|one| match one {
            External::NetDevice { name, original } if *name == device.name => {
                Some(original.clone())
            }
            _ => None,
        })
    }

    /// One of our own devices.
    fn ours(&self, name: &str) -> Result<Link, NetError> {
        let all = links(&self.own).during("Listing", || "network devices".to_string())?;
        let found = all.into_iter().find(|link| link.name == name);
        found.ok_or_else(|| NetError::Unsupported {
            object: format!("Network device {name}, which --external names, is not here"),
            remedy: "make it before the restore".into(),
        })
    }

    fn move_in(
        &self,
        network: &Network<'_>,
        device: &NetDeviceEntry,
        original: &str,
    ) -> Result<(), NetError> {
        let ours = self.ours(original)?;
        let what = || format!("network device {original}");
        let move_only = LinkRequest {
            index: ours.index,
            new_index: Some(device.ifindex),
            namespace: Some(network.namespace.as_fd()),
            name: Some(&device.name),
            ..LinkRequest::default()
        };
        move_only.change(&self.own).during("Moving", what)?;
        // Before it is switched on: most drivers allow no change afterwards.
        let set_address = LinkRequest {
            index: device.ifindex,
            address: device.address.as_deref(),
            ..LinkRequest::default()
        };
        match set_address.change(network.socket) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => tracing::warn!(
                "{} keeps the hardware address of {original}: its driver allows no other",
                device.name
            ),
            other => other.during("Setting", || format!("the address of {}", device.name))?,
        }
        let settings = LinkRequest {
            address: None,
            ..request(device, device.ifindex)
        };
        settings
            .change(network.socket)
            .during("Setting", || format!("network device {}", device.name))
    }

    fn make_veth(
        &mut self,
        network: &Network<'_>,
        device: &NetDeviceEntry,
    ) -> Result<(), NetError> {
        let what = || format!("veth {}", device.name);
        let request = request(device, device.ifindex);
        let outer = self.outside.external.iter().find_map(|one| match one {
            External::Veth {
                inner,
                outer,
                bridge,
            } if *inner == device.name => Some((outer, bridge)),
            _ => None,
        });
        if let Some((outer, bridge)) = outer {
            let home = self.outside.home.namespace(NsKind::Net);
            let peer = VethPeer {
                index: 0,
                name: Some(outer),
                namespace: home.expect("the kernel has network namespaces").as_fd(),
            };
            request
                .make_veth(network.socket, peer)
                .during("Making", what)?;
            return bridge
                .as_ref()
                .map_or(Ok(()), |bridge| self.attach(outer, bridge));
        }
        if self.far_ends.contains(&(network.id, device.ifindex)) {
            return request.change(network.socket).during("Setting", what);
        }
        let other = device
            .peer_nsid
            .and_then(|id| self.networks.iter().find(|network| network.id == id));
        let (Some(other), Some(index)) = (other, device.peer_ifindex) else {
            return Err(NetError::Unsupported {
                object: format!(
                    "The other end of veth {} is outside of the tree",
                    device.name
                ),
                remedy: format!(
                    "say what to call it here: --external veth[{}]:NAME",
                    device.name
                ),
            });
        };
        let peer = VethPeer {
            index,
            name: None,
            namespace: other.namespace.as_fd(),
        };
        request
            .make_veth(network.socket, peer)
            .during("Making", what)?;
        self.far_ends.insert((other.id, index));
        Ok(())
    }

    /// Makes a device of ours a port of a bridge of ours, and switches it on.
    fn attach(&self, device: &str, bridge: &str) -> Result<(), NetError> {
        let request = LinkRequest {
            index: self.ours(device)?.index,
            master: Some(self.ours(bridge)?.index),
            flags: UP,
            ..LinkRequest::default()
        };
        let changed = request.change(&self.own);
        changed.during("Attaching", || format!("{device} to bridge {bridge}"))
    }

    fn make_macvlan(&self, network: &Network<'_>, device: &NetDeviceEntry) -> Result<(), NetError> {
        const MODE: u16 = 1;
        const FLAGS: u16 = 2;
        let what = || format!("macvlan {}", device.name);
        let entry = device.macvlan.clone().unwrap_or_default();
        let mut data = Vec::new();
        attribute(&mut data, MODE, &entry.mode.to_ne_bytes());
        if let Some(flags) = entry.flags {
            attribute(&mut data, FLAGS, &(flags as u16).to_ne_bytes());
        }
        let parent = self.outside.external.iter().find_map(|one| match one {
            External::Macvlan { inner, outer } if *inner == device.name => Some(outer),
            _ => None,
        });
        if let Some(parent) = parent {
            let request = LinkRequest {
                link: Some(self.ours(parent)?.index),
                namespace: Some(network.namespace.as_fd()),
                ..request(device, device.ifindex)
            };
            return request
                .make(&self.own, "macvlan", &data)
                .during("Making", what);
        }
        let Some(below) = self.below(network, device) else {
            return Err(NetError::Unsupported {
                object: format!(
                    "The device below macvlan {} is outside of the tree",
                    device.name
                ),
                remedy: format!("name one of ours: --external macvlan[{}]:NAME", device.name),
            });
        };
        let request = LinkRequest {
            link: Some(below),
            ..request(device, device.ifindex)
        };
        request
            .make(network.socket, "macvlan", &data)
            .during("Making", what)
    }
}

fn kind_of(device: &NetDeviceEntry) -> NdType {
    NdType::try_from(device.r#type).unwrap_or(NdType::Extlink)
}

/// What every device gets.
fn request(device: &NetDeviceEntry, index: u32) -> LinkRequest<'_> {
    LinkRequest {
        index,
        flags: device.flags,
        name: Some(&device.name),
        mtu: Some(device.mtu),
        address: device.address.as_deref(),
        ..LinkRequest::default()
    }
}
