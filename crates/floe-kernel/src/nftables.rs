//! A table of nftables that drops the packets of some TCP connections.
//!
//! Contract relied on: a batch of nfnetlink messages is one transaction; a table with the owner flag (Linux
//! 5.12) goes away with the netlink socket that made it, so nothing stays behind a process that is killed.

mod marked;

use std::io;

use crate::netlink::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkSocket, attribute, attributes,
    message, nested,
};

pub use marked::{IpFamily, MarkedTable};

/// Packets with this mark pass: those that the engine makes itself. CRIU's own value, so that either
/// engine's packets pass the other's table.
pub const PASS_MARK: u32 = 0xc114;

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const SUBSYSTEM: u16 = 10;
const NFPROTO_INET: u8 = 1;

const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const NEW_SET: u16 = 9;
const NEW_ELEMENTS: u16 = 12;

const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
/// The first 32-bit register.
const REGISTER: u32 = 8;

/// One direction of a TCP connection, addresses in network order: 4 or 16 bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    pub source: Vec<u8>,
    pub source_port: u16,
    pub target: Vec<u8>,
    pub target_port: u16,
}

impl Flow {
    /// The other direction.
    pub fn reversed(&self) -> Flow {
        Flow {
            source: self.target.clone(),
            source_port: self.target_port,
            target: self.source.clone(),
            target_port: self.source_port,
        }
    }

    /// As the key of a set: ports take a whole register each.
    fn key(&self) -> Vec<u8> {
        let mut key = self.source.clone();
        key.extend_from_slice(&self.source_port.to_be_bytes());
        key.extend_from_slice(&[0; 2]);
        key.extend_from_slice(&self.target);
        key.extend_from_slice(&self.target_port.to_be_bytes());
        key.extend_from_slice(&[0; 2]);
        key
    }
}

/// How long a table stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// Until the socket that made it is closed.
    Owner,
    /// Until it is deleted.
    Persistent,
}

/// Makes the table `name` of family `inet`, which drops all packets of these flows, in both hooks that
/// local sockets are behind. `EEXIST` where there is one of this name.
pub fn add_table(
    socket: &NetlinkSocket,
    name: &str,
    lifetime: Lifetime,
    flows: &[Flow],
) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.table(name, lifetime);
    for (chain, hook) in [("output", 3u32), ("input", 1)] {
        batch.chain(name, chain, hook);
        batch.rule(name, chain, &pass_marked());
    }
    for (index, family) in [Family::V4, Family::V6].into_iter().enumerate() {
        let chosen: Vec<&Flow> = flows
            .iter()
            .filter(|flow| flow.source.len() == family.address_size())
            .collect();
        let set = family.set();
        batch.set(name, set, family, index as u32 + 1);
        for some in chosen.chunks(500) {
            batch.elements(name, set, some);
        }
        for chain in ["output", "input"] {
            batch.rule(name, chain, &drop_flows(family, index as u32 + 1));
        }
    }
    batch.commit(socket)
}

/// Makes the table `name` of family `inet`, which drops every packet that local sockets send or would get, but
/// for marked ones. `EEXIST` where there is one of this name.
pub fn add_closed_table(socket: &NetlinkSocket, name: &str, lifetime: Lifetime) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.table(name, lifetime);
    for (chain, hook) in [("output", 3u32), ("input", 1)] {
        batch.chain(name, chain, hook);
        batch.rule(name, chain, &pass_marked());
        let mut drop_all = Vec::new();
        verdict(&mut drop_all, NF_DROP);
        batch.rule(name, chain, &drop_all);
    }
    batch.commit(socket)
}

/// The names of all tables of all families; none where the kernel has no nftables.
pub fn table_names(socket: &NetlinkSocket) -> io::Result<Vec<String>> {
    const GET_TABLE: u16 = 1;
    const NAME: u16 = 1;
    let mut names = Vec::new();
    let found = socket.dump(SUBSYSTEM << 8 | GET_TABLE, &[0; 4], |body| {
        let name = attributes(body.get(4..).unwrap_or_default()).find(|(kind, _)| *kind == NAME);
        let name = name.map(|(_, name)| name.strip_suffix(&[0]).unwrap_or(name));
        names.push(String::from_utf8_lossy(name.unwrap_or_default()).into_owned());
        Ok(())
    });
    match found {
        // No such subsystem, or none that can list.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
            Ok(Vec::new())
        }
        other => other.map(|()| names),
    }
}

/// Deletes the table `name` of family `inet`; `ENOENT` where there is none.
pub fn delete_table(socket: &NetlinkSocket, name: &str) -> io::Result<()> {
    let mut batch = Batch::new();
    let mut body = Vec::new();
    attribute(&mut body, 1, &text(name));
    batch.add(DELETE_TABLE, 0, &body);
    batch.commit(socket)
}

#[derive(Clone, Copy)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn address_size(self) -> usize {
        match self {
            Family::V4 => 4,
            Family::V6 => 16,
        }
    }

    fn set(self) -> &'static str {
        match self {
            Family::V4 => "conns4",
            Family::V6 => "conns6",
        }
    }

    /// `nft`'s number of the address type, for its listing only.
    fn type_number(self) -> u32 {
        match self {
            Family::V4 => 7,
            Family::V6 => 8,
        }
    }

    /// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
    fn protocol(self) -> u8 {
        match self {
            Family::V4 => 2,
            Family::V6 => 10,
        }
    }

    /// Where source and target addresses are in the header.
    fn address_offsets(self) -> (u32, u32) {
        match self {
            Family::V4 => (12, 16),
            Family::V6 => (8, 24),
        }
    }
}

/// A transaction in the making.
struct Batch {
    family: u8,
    bytes: Vec<u8>,
    count: usize,
}

impl Batch {
    fn new() -> Self {
        Batch {
            family: NFPROTO_INET,
            bytes: message(BATCH_BEGIN, NLM_F_REQUEST, &batch_header()),
            count: 0,
        }
    }

    fn add(&mut self, kind: u16, flags: u16, body: &[u8]) {
        let mut whole = vec![self.family, 0, 0, 0];
        whole.extend_from_slice(body);
        let kind = SUBSYSTEM << 8 | kind;
        let flags = flags | NLM_F_REQUEST | NLM_F_ACK;
        self.bytes.extend_from_slice(&message(kind, flags, &whole));
        self.count += 1;
    }

    fn table(&mut self, name: &str, lifetime: Lifetime) {
        const OWNER: u32 = 2;
        let mut body = Vec::new();
        attribute(&mut body, 1, &text(name));
        if lifetime == Lifetime::Owner {
            attribute(&mut body, 2, &OWNER.to_be_bytes());
        }
        self.add(NEW_TABLE, NLM_F_CREATE | NLM_F_EXCL, &body);
    }

    fn chain(&mut self, table: &str, name: &str, hook: u32) {
        let mut body = Vec::new();
        attribute(&mut body, 1, &text(table));
        attribute(&mut body, 3, &text(name));
        nested(&mut body, 4, |place| {
            attribute(place, 1, &hook.to_be_bytes());
            attribute(place, 2, &0u32.to_be_bytes());
        });
        attribute(&mut body, 5, &NF_ACCEPT.to_be_bytes());
        attribute(&mut body, 7, &text("filter"));
        self.add(NEW_CHAIN, NLM_F_CREATE, &body);
    }

    fn rule(&mut self, table: &str, chain: &str, expressions: &[u8]) {
        const NLM_F_APPEND: u16 = 0x800;
        let mut body = Vec::new();
        attribute(&mut body, 1, &text(table));
        attribute(&mut body, 2, &text(chain));
        nested(&mut body, 4, |list| list.extend_from_slice(expressions));
        self.add(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, &body);
    }

    fn set(&mut self, table: &str, name: &str, family: Family, id: u32) {
        const INET_SERVICE: u32 = 13;
        let address = family.type_number();
        let kind = address << 18 | INET_SERVICE << 12 | address << 6 | INET_SERVICE;
        let size = 2 * family.address_size() as u32 + 8;
        let mut body = Vec::new();
        attribute(&mut body, 1, &text(table));
        attribute(&mut body, 2, &text(name));
        attribute(&mut body, 3, &0u32.to_be_bytes());
        attribute(&mut body, 4, &kind.to_be_bytes());
        attribute(&mut body, 5, &size.to_be_bytes());
        attribute(&mut body, 10, &id.to_be_bytes());
        self.add(NEW_SET, NLM_F_CREATE, &body);
    }

    fn elements(&mut self, table: &str, set: &str, flows: &[&Flow]) {
        let mut body = Vec::new();
        attribute(&mut body, 1, &text(table));
        attribute(&mut body, 2, &text(set));
        nested(&mut body, 3, |list| {
            for flow in flows {
                nested(list, 1, |element| {
                    nested(element, 1, |key| attribute(key, 1, &flow.key()));
                });
            }
        });
        self.add(NEW_ELEMENTS, NLM_F_CREATE, &body);
    }

    fn commit(mut self, socket: &NetlinkSocket) -> io::Result<()> {
        self.bytes
            .extend_from_slice(&message(BATCH_END, NLM_F_REQUEST, &batch_header()));
        socket.transact(&self.bytes, self.count)
    }
}

/// `struct nfgenmsg` of the messages around a batch.
fn batch_header() -> [u8; 4] {
    let [high, low] = SUBSYSTEM.to_be_bytes();
    [0, 0, high, low]
}

fn text(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// `meta mark 0xc114 accept`.
fn pass_marked() -> Vec<u8> {
    const META_MARK: u32 = 3;
    let mut list = Vec::new();
    meta(&mut list, META_MARK);
    equals(&mut list, &PASS_MARK.to_ne_bytes());
    verdict(&mut list, NF_ACCEPT);
    list
}

/// `ip saddr . tcp sport . ip daddr . tcp dport @set drop`.
fn drop_flows(family: Family, set: u32) -> Vec<u8> {
    const META_NFPROTO: u32 = 15;
    const META_L4PROTO: u32 = 16;
    const NETWORK: u32 = 1;
    const TRANSPORT: u32 = 2;
    let size = family.address_size() as u32;
    let (source, target) = family.address_offsets();
    let after_source = REGISTER + size / 4;
    let mut list = Vec::new();
    meta(&mut list, META_NFPROTO);
    equals(&mut list, &[family.protocol()]);
    meta(&mut list, META_L4PROTO);
    equals(&mut list, &[libc::IPPROTO_TCP as u8]);
    payload(&mut list, REGISTER, [NETWORK, source, size]);
    payload(&mut list, after_source, [TRANSPORT, 0, 2]);
    payload(&mut list, after_source + 1, [NETWORK, target, size]);
    payload(&mut list, after_source + 1 + size / 4, [TRANSPORT, 2, 2]);
    expression(&mut list, "lookup", |data| {
        attribute(data, 1, &text(family.set()));
        attribute(data, 2, &REGISTER.to_be_bytes());
        attribute(data, 4, &set.to_be_bytes());
    });
    verdict(&mut list, NF_DROP);
    list
}

fn expression(list: &mut Vec<u8>, name: &str, fill: impl FnOnce(&mut Vec<u8>)) {
    nested(list, 1, |element| {
        attribute(element, 1, &text(name));
        nested(element, 2, fill);
    });
}

fn meta(list: &mut Vec<u8>, key: u32) {
    expression(list, "meta", |data| {
        attribute(data, 2, &key.to_be_bytes());
        attribute(data, 1, &REGISTER.to_be_bytes());
    });
}

fn equals(list: &mut Vec<u8>, value: &[u8]) {
    expression(list, "cmp", |data| {
        attribute(data, 1, &REGISTER.to_be_bytes());
        attribute(data, 2, &0u32.to_be_bytes());
        nested(data, 3, |inner| attribute(inner, 1, value));
    });
}

fn payload(list: &mut Vec<u8>, register: u32, [base, offset, size]: [u32; 3]) {
    expression(list, "payload", |data| {
        attribute(data, 1, &register.to_be_bytes());
        attribute(data, 2, &base.to_be_bytes());
        attribute(data, 3, &offset.to_be_bytes());
        attribute(data, 4, &size.to_be_bytes());
    });
}

fn verdict(list: &mut Vec<u8>, code: u32) {
    expression(list, "immediate", |data| {
        attribute(data, 1, &0u32.to_be_bytes());
        nested(data, 2, |inner| {
            nested(inner, 2, |verdict| {
                attribute(verdict, 1, &code.to_be_bytes())
            });
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::time::Duration;

    #[test]
    fn a_locked_connection_stands_still_until_its_owner_goes() {
        let netlink = match NetlinkSocket::open(libc::NETLINK_NETFILTER) {
            Ok(netlink) => netlink,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("free");
        let address = listener.local_addr().expect("bound");
        let mut client = std::net::TcpStream::connect(address).expect("listening");
        let (mut server, _) = listener.accept().expect("connected");
        let flow = Flow {
            source: vec![127, 0, 0, 1],
            source_port: client.local_addr().expect("bound").port(),
            target: vec![127, 0, 0, 1],
            target_port: address.port(),
        };
        let name = format!("floe-test-{}", std::process::id());
        let flows = [flow.reversed(), flow];
        match add_table(&netlink, &name, Lifetime::Owner, &flows) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return eprintln!("skipped: no CAP_NET_ADMIN");
            }
            other => other.expect("added"),
        }
        client.write_all(b"late").expect("room");
        server
            .set_read_timeout(Some(Duration::from_millis(50)))
            .expect("valid");
        let mut got = [0; 4];
        assert!(server.read(&mut got).is_err());
        drop(netlink);
        server
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("valid");
        server.read_exact(&mut got).expect("sent again");
    }

    #[test]
    fn a_persistent_table_is_deleted_by_name() {
        let Ok(netlink) = NetlinkSocket::open(libc::NETLINK_NETFILTER) else {
            return eprintln!("skipped: no nftables");
        };
        let name = format!("floe-test-p-{}", std::process::id());
        match add_table(&netlink, &name, Lifetime::Persistent, &[]) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return eprintln!("skipped: no CAP_NET_ADMIN");
            }
            other => other.expect("added"),
        }
        let other = NetlinkSocket::open(libc::NETLINK_NETFILTER).expect("opened above");
        delete_table(&other, &name).expect("there");
        let error = delete_table(&other, &name).expect_err("gone");
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }
}
