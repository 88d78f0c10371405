//! Making the devices of all namespaces of a tree.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use floe_image::messages::{NdType, NetDeviceEntry};
use floe_kernel::namespace::{Home, Namespace, NsKind};
use floe_kernel::netlink::{NetlinkSocket, attribute, attributes};
use floe_kernel::rtnetlink::{Link, LinkIndex, LinkRequest, VethPeer, link, links, queue_counts};
use floe_options::External;

use super::{PLAIN, extra, sit, tun};
use crate::net::error::{Attempt, NetError};
use crate::net::sysctl::{Missing, Protocol, execute_device, from_numbers, without_question};

/// `IFF_UP`.
const UP: u32 = 1;
/// Kinds that need another device.
const STACKED: [&str; 3] = ["macvlan", "ipvlan", "vlan"];

/// A namespace that gets devices.
#[derive(Debug)]
pub struct Network<'i> {
    /// Its number in the images.
    pub id: u32,
    pub namespace: &'i Namespace,
    /// Made in it.
    pub socket: &'i NetlinkSocket,
    pub devices: Vec<NetDeviceEntry>,
    /// Devices that were still asking whether somebody else has an address of theirs.
    pub asking: HashSet<u32>,
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
        order: Vec::new(),
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
    maker.switch_on()
}

struct Maker<'a> {
    networks: &'a [Network<'a>],
    outside: Outside<'a>,
    /// In our own namespace.
    own: NetlinkSocket,
    made: HashSet<(u32, u32)>,
    /// The same, in the order in which they were made.
    order: Vec<(u32, u32)>,
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
        let foreign = self.is_foreign(device);
        if !foreign {
            self.order.push((network.id, device.ifindex));
        }
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
        let conf6 = if network.asking.contains(&device.ifindex) {
            device.conf6.clone()
        } else {
            without_question(&device.conf6)
        };
        execute_device(Protocol::Ipv6, &device.name, &conf6, missing)?;
        if foreign {
            return Ok(());
        }
        // Some ways to an address need the secret among the settings.
        extra::execute(network.socket, device)
    }

    /// Whether somebody else has put a device there, and with a number that need not be the saved one.
    fn is_foreign(&self, device: &NetDeviceEntry) -> bool {
        let outside = kind_of(device) == NdType::Extlink && device.floe_kind.is_none();
        outside && self.passed_in(device).is_none()
    }

    /// Devices come up when all are there and set: what a protocol does then depends on settings, and a bridge
    /// without ports would think that it has a carrier.
    fn switch_on(&self) -> Result<(), NetError> {
        for (id, index) in &self.order {
            let network = self.networks.iter().find(|network| network.id == *id);
            let network = network.expect("devices were made in it");
            let device = network.devices.iter().find(|one| one.ifindex == *index);
            let device = device.expect("it was made");
            if device.flags & UP == 0 {
                continue;
            }
            let request = LinkRequest {
                index: device.ifindex,
                flags: device.flags,
                ..LinkRequest::default()
            };
            request
                .change(network.socket)
                .during("Switching on", || format!("network device {}", device.name))?;
        }
        Ok(())
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
                wait_until_idle(socket, device)?;
                request(device, device.ifindex)
                    .change(socket)
                    .during("Setting", what)
            }
            NdType::Bridge => {
                let made = request(device, device.ifindex).make(socket, "bridge", &[]);
                made.during("Making", what)
            }
            NdType::Macvlan => self.make_stacked(network, device, "macvlan", &macvlan_data(device)),
            NdType::Sit => {
                let data = device.sit.as_ref().map(sit::encode).unwrap_or_default();
                let made = request(device, device.ifindex).make(socket, "sit", &data);
                made.during("Making", what)
            }
            NdType::Extlink => match &device.floe_kind {
                Some(kind) if PLAIN.contains(&kind.as_str()) => {
                    let data = extra::data_to_make(device, kind);
                    self.make_stacked(network, device, kind, &data)
                }
                Some(kind) => Err(NetError::Damaged(format!(
                    "Network device {} is of a kind that is not made: {kind}",
                    device.name
                ))),
                // It is there, and may be in use.
                None => {
                    let request = LinkRequest {
                        flags: device.flags,
                        ..request(device, 0)
                    };
                    request.change(socket).during("Setting", what)
                }
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
        let queues = queue_counts(device.floe_link.as_deref().unwrap_or_default());
        let request = LinkRequest {
            attributes: &queues,
            ..request(device, device.ifindex)
        };
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
                attributes: &[],
            };
            request
                .make_veth(network.socket, peer)
                .during("Making", what)?;
            return bridge
                .as_ref()
                .map_or(Ok(()), |bridge| self.attach(outer, bridge));
        }
        if self.far_ends.contains(&(network.id, device.ifindex)) {
            let request = LinkRequest {
                attributes: &[],
                ..request
            };
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
        let far = other.devices.iter().find(|far| far.ifindex == index);
        let far = far.and_then(|far| far.floe_link.as_deref());
        let queues = queue_counts(far.unwrap_or_default());
        let peer = VethPeer {
            index,
            name: None,
            namespace: other.namespace.as_fd(),
            attributes: &queues,
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

    /// Makes a device that may be on top of another one, of its namespace or of ours.
    fn make_stacked(
        &self,
        network: &Network<'_>,
        device: &NetDeviceEntry,
        kind: &str,
        data: &[u8],
    ) -> Result<(), NetError> {
        let what = || format!("{kind} {}", device.name);
        let parent = self.outside.external.iter().find_map(|one| match one {
            External::Macvlan { inner, outer } if *inner == device.name => Some(outer),
            _ => None,
        });
        let queues = queue_counts(device.floe_link.as_deref().unwrap_or_default());
        let plain = LinkRequest {
            attributes: &queues,
            ..request(device, device.ifindex)
        };
        if let Some(parent) = parent {
            let request = LinkRequest {
                link: Some(self.ours(parent)?.index),
                namespace: Some(network.namespace.as_fd()),
                ..plain
            };
            return request.make(&self.own, kind, data).during("Making", what);
        }
        let below = self.below(network, device);
        if below.is_none() && STACKED.contains(&kind) {
            return Err(NetError::Unsupported {
                object: format!(
                    "The device below {kind} {} is outside of the tree",
                    device.name
                ),
                remedy: format!("name one of ours: --external macvlan[{}]:NAME", device.name),
            });
        }
        let request = LinkRequest {
            link: below,
            ..plain
        };
        request
            .make(network.socket, kind, data)
            .during("Making", what)
    }
}

/// The driver's attributes of a macvlan.
fn macvlan_data(device: &NetDeviceEntry) -> Vec<u8> {
    const MODE: u16 = 1;
    const FLAGS: u16 = 2;
    let entry = device.macvlan.clone().unwrap_or_default();
    let mut data = Vec::new();
    attribute(&mut data, MODE, &entry.mode.to_ne_bytes());
    if let Some(flags) = entry.flags {
        attribute(&mut data, FLAGS, &(flags as u16).to_ne_bytes());
    }
    data
}

/// Waits, for a moment at most, until the kernel has noticed that nobody is attached to a device that had no carrier:
/// before, it hands out an address when the device comes up, and a bridge forwards to it.
fn wait_until_idle(socket: &NetlinkSocket, device: &NetDeviceEntry) -> Result<(), NetError> {
    const OPERSTATE: u16 = 16;
    const DOWN: u8 = 2;
    const RUNNING: u32 = 0x40;
    const LIMIT: Duration = Duration::from_millis(100);
    let begin = Instant::now();
    while device.flags & (UP | RUNNING) == UP && begin.elapsed() < LIMIT {
        let now = link(socket, LinkIndex(device.ifindex));
        let now = now.during("Reading", || format!("network device {}", device.name))?;
        if attributes(&now.attributes).any(|one| one == (OPERSTATE, &[DOWN])) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn kind_of(device: &NetDeviceEntry) -> NdType {
    NdType::try_from(device.r#type).unwrap_or(NdType::Extlink)
}

/// What every device gets before it is switched on.
fn request(device: &NetDeviceEntry, index: u32) -> LinkRequest<'_> {
    LinkRequest {
        index,
        flags: device.flags & !UP,
        name: Some(&device.name),
        mtu: Some(device.mtu),
        address: device.address.as_deref(),
        ..LinkRequest::default()
    }
}
