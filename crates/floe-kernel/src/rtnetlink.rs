//! Network devices and ids of network namespaces by rtnetlink.
//!
//! Contract relied on: rtnetlink(7). A request acts on the network namespace that its socket was made in. The
//! kernel gives a namespace an id in another one when it first has to name it there (a veth's peer).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::netlink::{NLM_F_APPEND, NLM_F_CREATE, NetlinkSocket, attribute, attributes, nested};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_NEWLINKPROP: u16 = 108;
const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_NEW_IFINDEX: u16 = 49;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const IFLA_NUM_TX_QUEUES: u16 = 31;
const IFLA_NUM_RX_QUEUES: u16 = 32;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const VETH_INFO_PEER: u16 = 1;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;

/// Size of `struct ifinfomsg`.
const LINK_HEADER: usize = 16;

/// The number of a network device within its namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkIndex(pub u32);

/// One network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// `ARPHRD_*`.
    pub hardware: u16,
    /// `IFF_*`.
    pub flags: u32,
    pub name: String,
    pub mtu: u32,
    pub address: Option<Vec<u8>>,
    /// The number of the device below it or at its other end.
    pub link: Option<u32>,
    /// The id of the namespace where that one is, if it is another.
    pub link_namespace: Option<i32>,
    pub master: Option<u32>,
    /// What the driver calls itself; empty for none.
    pub kind: String,
    /// The driver's own attributes.
    pub data: Vec<u8>,
    /// What its master calls itself; empty for none.
    pub port_kind: String,
    /// What its master keeps about it.
    pub port: Vec<u8>,
    /// All attributes, as the kernel wrote them.
    pub attributes: Vec<u8>,
}

/// Every device of the socket's namespace.
pub fn links(socket: &NetlinkSocket) -> io::Result<Vec<Link>> {
    let mut found = Vec::new();
    socket.dump(RTM_GETLINK, &header(0, 0), |body| {
        found.push(parse_link(body).ok_or(io::ErrorKind::InvalidData)?);
        Ok(())
    })?;
    Ok(found)
}

/// One device by its number.
pub fn link(socket: &NetlinkSocket, index: LinkIndex) -> io::Result<Link> {
    let answer = socket.ask(RTM_GETLINK, &header(index.0, 0))?;
    Ok(parse_link(&answer).ok_or(io::ErrorKind::InvalidData)?)
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        hardware: u16::from_ne_bytes(body.get(2..4)?.try_into().ok()?),
        index: word(body.get(4..)?)?,
        flags: word(body.get(8..)?)?,
        attributes: body.get(LINK_HEADER..)?.to_vec(),
        ..Link::default()
    };
    for (kind, value) in attributes(body.get(LINK_HEADER..)?) {
        match kind {
            IFLA_ADDRESS => link.address = Some(value.to_vec()),
            IFLA_IFNAME => link.name = text(value),
            IFLA_MTU => link.mtu = word(value)?,
            IFLA_LINK => link.link = Some(word(value)?),
            IFLA_LINK_NETNSID => link.link_namespace = Some(word(value)?.cast_signed()),
            IFLA_MASTER => link.master = Some(word(value)?),
            IFLA_LINKINFO => {
                for (kind, value) in attributes(value) {
                    match kind {
                        IFLA_INFO_KIND => link.kind = text(value),
                        IFLA_INFO_DATA => link.data = value.to_vec(),
                        IFLA_INFO_SLAVE_KIND => link.port_kind = text(value),
                        IFLA_INFO_SLAVE_DATA => link.port = value.to_vec(),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(link)
}

/// What is asked for a device; the parts that are `None` stay as they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkRequest<'a> {
    /// 0: the kernel chooses, or finds the device by its name.
    pub index: u32,
    /// All of `IFF_*` that can be set; 0 leaves them.
    pub flags: u32,
    pub name: Option<&'a str>,
    pub mtu: Option<u32>,
    pub address: Option<&'a [u8]>,
    /// The device below.
    pub link: Option<u32>,
    pub master: Option<u32>,
    /// Where the device is to be.
    pub namespace: Option<BorrowedFd<'a>>,
    /// The number that it is to have there.
    pub new_index: Option<u32>,
    /// Further attributes, as the kernel writes them.
    pub attributes: &'a [u8],
}

/// The other end of a veth pair in the making.
#[derive(Clone, Copy, Debug)]
pub struct VethPeer<'a> {
    /// 0: the kernel chooses.
    pub index: u32,
    pub name: Option<&'a str>,
    pub namespace: BorrowedFd<'a>,
    /// Further attributes, as the kernel writes them.
    pub attributes: &'a [u8],
}

/// What a driver is told about a device that is there already.
#[derive(Clone, Copy, Debug)]
pub enum Told<'a> {
    /// To the driver of the device.
    Device(&'a [u8]),
    /// To the driver of its master.
    Port(&'a [u8]),
}

/// The attributes of a link message that say how many queues it has.
pub fn queue_counts(link: &[u8]) -> Vec<u8> {
    let mut counts = Vec::new();
    for (kind, value) in attributes(link) {
        if matches!(kind, IFLA_NUM_TX_QUEUES | IFLA_NUM_RX_QUEUES) {
            attribute(&mut counts, kind, value);
        }
    }
    counts
}

impl LinkRequest<'_> {
    /// Makes the device with a driver and the driver's own attributes.
    pub fn make(&self, socket: &NetlinkSocket, kind: &str, data: &[u8]) -> io::Result<()> {
        let mut body = self.body();
        nested(&mut body, IFLA_LINKINFO, |info| {
            attribute(info, IFLA_INFO_KIND, kind.as_bytes());
            if !data.is_empty() {
                nested(info, IFLA_INFO_DATA, |inner| inner.extend_from_slice(data));
            }
        });
        socket.request(RTM_NEWLINK, NLM_F_CREATE, &body)
    }

    /// Makes a pair of veth devices.
    pub fn make_veth(&self, socket: &NetlinkSocket, peer: VethPeer<'_>) -> io::Result<()> {
        let mut end = header(peer.index, 0).to_vec();
        if let Some(name) = peer.name {
            attribute(&mut end, IFLA_IFNAME, &terminated(name));
        }
        let namespace = peer.namespace.as_raw_fd().to_ne_bytes();
        attribute(&mut end, IFLA_NET_NS_FD, &namespace);
        end.extend_from_slice(peer.attributes);
        let mut data = Vec::new();
        attribute(&mut data, VETH_INFO_PEER, &end);
        self.make(socket, "veth", &data)
    }

    /// Changes a device that is there.
    pub fn change(&self, socket: &NetlinkSocket) -> io::Result<()> {
        socket.request(RTM_SETLINK, 0, &self.body())
    }

    /// Gives drivers new attributes; `kind` is the driver's name.
    pub fn tell(&self, socket: &NetlinkSocket, kind: &str, told: Told<'_>) -> io::Result<()> {
        let (kind_at, data_at, data) = match told {
            Told::Device(data) => (IFLA_INFO_KIND, IFLA_INFO_DATA, data),
            Told::Port(data) => (IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA, data),
        };
        let mut body = self.body();
        nested(&mut body, IFLA_LINKINFO, |info| {
            attribute(info, kind_at, kind.as_bytes());
            nested(info, data_at, |inner| inner.extend_from_slice(data));
        });
        socket.request(RTM_NEWLINK, 0, &body)
    }

    fn body(&self) -> Vec<u8> {
        let mut body = header(self.index, self.flags).to_vec();
        let mut number = |kind, value: Option<u32>| {
            if let Some(value) = value {
                attribute(&mut body, kind, &value.to_ne_bytes());
            }
        };
        number(IFLA_LINK, self.link);
        number(IFLA_MTU, self.mtu);
        number(IFLA_MASTER, self.master);
        number(IFLA_NEW_IFINDEX, self.new_index);
        let namespace = self.namespace.map(|fd| fd.as_raw_fd().cast_unsigned());
        number(IFLA_NET_NS_FD, namespace);
        if let Some(name) = self.name {
            attribute(&mut body, IFLA_IFNAME, &terminated(name));
        }
        if let Some(address) = self.address {
            attribute(&mut body, IFLA_ADDRESS, address);
        }
        body.extend_from_slice(self.attributes);
        body
    }
}

/// Gives a device further names: `names` is the attribute that lists them.
pub fn add_names(socket: &NetlinkSocket, index: LinkIndex, names: &[u8]) -> io::Result<()> {
    let body = [&header(index.0, 0)[..], names].concat();
    socket.request(RTM_NEWLINKPROP, NLM_F_CREATE | NLM_F_APPEND, &body)
}

/// Deletes a device by its number.
pub fn delete_link(socket: &NetlinkSocket, index: LinkIndex) -> io::Result<()> {
    socket.request(RTM_DELLINK, 0, &header(index.0, 0))
}

/// The id that a network namespace has in the one of the socket; `None` for none.
pub fn namespace_id(socket: &NetlinkSocket, namespace: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let answer = socket.ask(RTM_GETNSID, &namespace_body(namespace, None))?;
    let mut found = attributes(answer.get(4..).unwrap_or_default());
    let id = found.find(|(kind, _)| *kind == NETNSA_NSID);
    let id = id.and_then(|(_, value)| word(value)).map(u32::cast_signed);
    Ok(id.filter(|id| *id >= 0))
}

/// Gives a network namespace an id in the one of the socket.
pub fn set_namespace_id(
    socket: &NetlinkSocket,
    namespace: BorrowedFd<'_>,
    id: i32,
) -> io::Result<()> {
    socket.request(RTM_NEWNSID, 0, &namespace_body(namespace, Some(id)))
}

/// `struct rtgenmsg`, padded, and its attributes.
fn namespace_body(namespace: BorrowedFd<'_>, id: Option<i32>) -> Vec<u8> {
    let mut body = vec![0; 4];
    let number = namespace.as_raw_fd().to_ne_bytes();
    attribute(&mut body, NETNSA_FD, &number);
    if let Some(id) = id {
        attribute(&mut body, NETNSA_NSID, &id.to_ne_bytes());
    }
    body
}

/// `struct ifinfomsg`. Without a mask of flags the kernel takes all of them.
fn header(index: u32, flags: u32) -> [u8; LINK_HEADER] {
    let mut header = [0; LINK_HEADER];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header
}

fn terminated(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&value[..end.unwrap_or(value.len())]).into_owned()
}

fn word(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::Noise;

    #[test]
    fn answers_survive_any_bytes() {
        let mut body = vec![1; 72];
        for kind in [0, 1, 2, 3, 4, 6, 8, 18] {
            crate::netlink::attribute(&mut body, kind, &[7; 9]);
        }
        Noise::damage(&body, |bytes| drop(parse_link(bytes)));
    }

    #[test]
    fn the_loopback_device_is_listed() {
        let socket = NetlinkSocket::open(libc::NETLINK_ROUTE).expect("no privilege needed");
        let links = links(&socket).expect("listed");
        let lo = links.iter().find(|link| link.name == "lo").expect("there");
        assert_eq!((lo.hardware, lo.kind.as_str()), (libc::ARPHRD_LOOPBACK, ""));
        assert!(lo.mtu > 0 && lo.index > 0);
    }
}
