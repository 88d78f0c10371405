//! Addresses, routes and routing rules (`rtnetlink(7)`).
//!
//! Saved:    the kernel's own messages behind a magic number, as `ip addr|route|rule save` write them.
//! Rebuilt:  the messages are sent back, routes in the order that they need each other. Needs: the devices.
//! Not kept: neighbours, routes that the kernel derives (cached ones, those of the local table).
//!
//! CRIU feeds these images to `ip ... restore`, so they must be what that takes: routing rules of IPv6 that
//! every namespace has are left out, since `ip` would add them a second time.

use std::collections::HashSet;
use std::io;

use floe_kernel::netlink::{Message, NLM_F_CREATE, NetlinkSocket, attributes, messages};

use super::error::{Attempt, NetError};

const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;

const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTM_F_CLONED: u32 = 0x200;
const RT_TABLE_LOCAL: u32 = 255;
const RTPROT_KERNEL: u8 = 2;
/// Size of `struct rtmsg` and of `struct fib_rule_hdr`.
const ROUTE_HEADER: usize = 12;

const ADDRESSES: u32 = 0x4736_1222;
const ROUTES: u32 = 0x4531_1224;
const RULES: u32 = 0x7170_6986;

/// The images of one namespace; an empty one is not written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IpDump {
    pub addresses: Vec<u8>,
    pub routes: Vec<u8>,
    pub routes6: Vec<u8>,
    pub rules: Vec<u8>,
}

/// Asks for addresses, routes and rules of the socket's namespace.
pub fn collect(socket: &NetlinkSocket) -> Result<IpDump, NetError> {
    let ask = |kind, family: i32, what: &str| {
        let mut body = [0; ROUTE_HEADER];
        body[0] = family as u8;
        // `struct ifaddrmsg` is shorter; the kernel takes what it needs.
        socket
            .dump_raw(kind, &body)
            .during("Listing", || what.to_string())
    };
    let addresses = ask(RTM_GETADDR, libc::AF_UNSPEC, "addresses")?;
    let routes = ask(RTM_GETROUTE, libc::AF_INET, "IPv4 routes")?;
    let rules = ask(RTM_GETRULE, libc::AF_INET, "IPv4 rules")?;
    let (mut routes6, mut rules6) = (Vec::new(), Vec::new());
    if std::fs::exists("/proc/sys/net/ipv6").unwrap_or(false) {
        routes6 = ask(RTM_GETROUTE, libc::AF_INET6, "IPv6 routes")?;
        rules6 = ask(RTM_GETRULE, libc::AF_INET6, "IPv6 rules")?;
    }
    let mut rules = image(RULES, &rules, |_| true)?;
    rules.extend(image(RULES, &rules6, |rule| !is_default_rule(rule))?.split_off(4));
    Ok(IpDump {
        addresses: image(ADDRESSES, &addresses, |_| true)?,
        routes: without_state(image(ROUTES, &routes, is_kept_route)?),
        routes6: without_state(image(ROUTES, &routes6, is_kept_route)?),
        rules,
    })
}

/// A magic and the messages that are kept.
fn image(magic: u32, dump: &[u8], keep: impl Fn(Message<'_>) -> bool) -> Result<Vec<u8>, NetError> {
    let mut image = magic.to_ne_bytes().to_vec();
    for message in messages(dump) {
        let message = message.during("Reading", || "an answer of netlink".to_string())?;
        if keep(message) {
            image.extend_from_slice(message.whole);
            image.resize(image.len().next_multiple_of(4), 0);
        }
    }
    Ok(image)
}

/// An image of routes without what the kernel says about the state of their links and does not take back.
fn without_state(mut image: Vec<u8>) -> Vec<u8> {
    const MAGIC: usize = 4;
    const HEADER: usize = 16;
    let mut at = MAGIC;
    while let Some(size) = image.get(at..).and_then(word) {
        if let Some(body) = image.get_mut(at + HEADER..at + size as usize) {
            clear_state(body);
        }
        at += (size as usize).next_multiple_of(4).max(HEADER);
    }
    image
}

/// Clears flags of the route, and of each of its hops if it has several.
fn clear_state(body: &mut [u8]) {
    /// `RTNH_F_DEAD`, `OFFLOAD`, `LINKDOWN`, `UNRESOLVED`, `TRAP`.
    const STATE: u8 = 1 | 8 | 16 | 32 | 64;
    const FLAGS: usize = 8;
    const HOP_FLAGS: usize = 2;
    if let Some(flags) = body.get_mut(FLAGS) {
        *flags &= !STATE;
    }
    let mut at = ROUTE_HEADER;
    let short = |body: &[u8], at: usize| {
        let bytes = body.get(at..at + 2)?.try_into().ok()?;
        Some(usize::from(u16::from_ne_bytes(bytes)))
    };
    while let (Some(size), Some(kind)) = (short(body, at), short(body, at + 2)) {
        let mut hop = at + 4;
        while kind == usize::from(RTA_MULTIPATH) && hop < at + size {
            let Some(length) = short(body, hop).filter(|length| *length >= 8) else {
                break;
            };
            body[hop + HOP_FLAGS] &= !STATE;
            hop += length.next_multiple_of(4);
        }
        at += size.next_multiple_of(4).max(4);
    }
}

fn byte(message: Message<'_>, at: usize) -> u8 {
    message.body.get(at).copied().unwrap_or(0)
}

fn find(message: Message<'_>, wanted: u16) -> Option<&[u8]> {
    let mut all = attributes(message.body.get(ROUTE_HEADER..).unwrap_or_default());
    all.find(|(kind, _)| *kind == wanted)
        .map(|(_, value)| value)
}

fn word(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

fn is_kept_route(route: Message<'_>) -> bool {
    let flags = route.body.get(8..).and_then(word).unwrap_or(0);
    let table = find(route, RTA_TABLE).and_then(word);
    let table = table.unwrap_or_else(|| u32::from(byte(route, 4)));
    let derived = table == RT_TABLE_LOCAL && byte(route, 5) == RTPROT_KERNEL;
    flags & RTM_F_CLONED == 0 && !derived
}

/// One of the two that every namespace has for IPv6: `0: lookup local`, `32766: lookup main`.
fn is_default_rule(rule: Message<'_>) -> bool {
    const FRA_PRIORITY: u16 = 6;
    const LOCAL: (u32, u8) = (0, 255);
    const MAIN: (u32, u8) = (32766, 254);
    let priority = find(rule, FRA_PRIORITY).and_then(word).unwrap_or(0);
    let place = (priority, byte(rule, 4));
    byte(rule, 0) == libc::AF_INET6 as u8 && [LOCAL, MAIN].contains(&place)
}

/// The messages of an image; an empty image has none.
fn open<'i>(image: &'i [u8], magic: u32, what: &str) -> Result<Vec<Message<'i>>, NetError> {
    if image.is_empty() {
        return Ok(Vec::new());
    }
    let damaged = || NetError::Damaged(format!("The image of {what} is damaged"));
    let rest = image.strip_prefix(&magic.to_ne_bytes());
    let all = messages(rest.ok_or_else(damaged)?).collect::<io::Result<Vec<_>>>();
    all.map_err(|_| damaged())
}

/// Gives the devices their addresses.
pub fn execute_addresses(socket: &NetlinkSocket, image: &[u8]) -> Result<(), NetError> {
    for message in open(image, ADDRESSES, "addresses")? {
        add(socket, RTM_NEWADDR, message).during("Adding", || address(message))?;
    }
    Ok(())
}

/// What an address is called in an error.
fn address(message: Message<'_>) -> String {
    const IFA_ADDRESS: u16 = 1;
    const HEADER: usize = 8;
    let mut all = attributes(message.body.get(HEADER..).unwrap_or_default());
    let bytes = all.find(|(kind, _)| *kind == IFA_ADDRESS);
    let shown = bytes.map_or_else(|| "?".to_string(), |(_, bytes)| shown(bytes));
    let device = message.body.get(4..).and_then(word).unwrap_or(0);
    format!("address {shown} to device {device}")
}

fn shown(address: &[u8]) -> String {
    let v4: Option<[u8; 4]> = address.try_into().ok();
    let v6: Option<[u8; 16]> = address.try_into().ok();
    match (v4, v6) {
        (Some(v4), _) => std::net::Ipv4Addr::from(v4).to_string(),
        (_, Some(v6)) => std::net::Ipv6Addr::from(v6).to_string(),
        _ => format!("{address:x?}"),
    }
}

/// Adds the routes of one family: first networks that are on a link, last what goes through a gateway.
pub fn execute_routes(socket: &NetlinkSocket, image: &[u8]) -> Result<(), NetError> {
    let image = without_state(image.to_vec());
    let mut routes = open(&image, ROUTES, "routes")?;
    routes.sort_by_key(|route| {
        let has = |kind| find(*route, kind).is_some();
        if has(RTA_GATEWAY) || has(RTA_VIA) || has(RTA_MULTIPATH) {
            2
        } else {
            u8::from(has(RTA_PREFSRC))
        }
    });
    for route in routes {
        add(socket, RTM_NEWROUTE, route).during("Adding", || {
            const RTA_DST: u16 = 1;
            let target = find(route, RTA_DST).map(shown);
            let target = target.unwrap_or_else(|| "default".into());
            format!("route {target}/{}", byte(route, 1))
        })?;
    }
    Ok(())
}

/// Makes the rules those of the image; without any the namespace keeps what it has.
pub fn execute_rules(socket: &NetlinkSocket, image: &[u8]) -> Result<(), NetError> {
    let wanted = open(image, RULES, "routing rules")?;
    if wanted.is_empty() {
        return Ok(());
    }
    let dump = |family: i32| {
        let mut body = [0; ROUTE_HEADER];
        body[0] = family as u8;
        let dump = socket.dump_raw(RTM_GETRULE, &body);
        dump.during("Listing", || "routing rules".to_string())
    };
    let v4 = dump(libc::AF_INET)?;
    let there = messages(&v4).collect::<io::Result<Vec<_>>>();
    let there = there.during("Listing", || "routing rules".to_string())?;
    let keep: HashSet<&[u8]> = wanted.iter().map(|rule| rule.body).collect();
    let mut known: HashSet<&[u8]> = there.iter().map(|rule| rule.body).collect();
    for rule in there.iter().filter(|rule| !keep.contains(rule.body)) {
        let deleted = socket.request(RTM_DELRULE, 0, rule.body);
        deleted.during("Deleting", || "a routing rule".to_string())?;
    }
    for rule in wanted {
        if known.insert(rule.body) {
            add(socket, RTM_NEWRULE, rule).during("Adding", || "a routing rule".to_string())?;
        }
    }
    Ok(())
}

/// Sends a message of an image back; what is there already is left.
fn add(socket: &NetlinkSocket, kind: u16, message: Message<'_>) -> io::Result<()> {
    if message.kind != kind {
        return Err(io::ErrorKind::InvalidData.into());
    }
    match socket.request(kind, NLM_F_CREATE, message.body) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use floe_kernel::netlink::message;

    #[test]
    fn local_routes_of_the_kernel_are_left_out_and_those_of_users_kept() {
        let route = |table: u8, protocol: u8| {
            let mut body = [0; ROUTE_HEADER];
            (body[0], body[4], body[5]) = (libc::AF_INET as u8, table, protocol);
            message(RTM_NEWROUTE, 0, &body)
        };
        let kept = |bytes: &[u8]| {
            let message = messages(bytes).next().expect("one").expect("whole");
            is_kept_route(message)
        };
        assert!(!kept(&route(255, RTPROT_KERNEL)));
        assert!(kept(&route(255, 4)));
        assert!(kept(&route(254, RTPROT_KERNEL)));
    }

    #[test]
    fn the_state_of_links_is_no_part_of_a_route() {
        let mut body = vec![0u8; ROUTE_HEADER];
        body[8] = 16 | 4;
        let hops = [8, 0, 17 | 4, 0, 3, 0, 0, 0, 8, 0, 16, 0, 4, 0, 0, 0];
        floe_kernel::netlink::attribute(&mut body, RTA_MULTIPATH, &hops);
        let route = message(RTM_NEWROUTE, 0, &body);
        let image = without_state([&ROUTES.to_ne_bytes()[..], &route].concat());
        let opened = open(&image, ROUTES, "routes").expect("whole");
        assert_eq!(opened[0].body[8], 4);
        let kept = find(opened[0], RTA_MULTIPATH).expect("there");
        assert_eq!((kept[2], kept[10]), (4, 0));
    }

    #[test]
    fn images_with_another_magic_are_refused() {
        assert!(open(&RULES.to_ne_bytes(), ROUTES, "routes").is_err());
        assert!(open(&[], ROUTES, "routes").expect("none").is_empty());
        let cut = [&ROUTES.to_ne_bytes()[..], &[40, 0, 0, 0]].concat();
        assert!(open(&cut, ROUTES, "routes").is_err());
    }
}
