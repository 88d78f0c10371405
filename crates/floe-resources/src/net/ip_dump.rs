//! Addresses, routes and routing rules (`rtnetlink(7)`).
//!
//! Saved:    the kernel's own messages behind a magic number, as `ip addr|route|rule save` write them.
//! Rebuilt:  the messages are sent back, routes in the order that they need each other. Needs: devices, next hops.
//! Not kept: routes that the kernel derives (cached ones, those of the local table).
//!
//! CRIU feeds these images to `ip ... restore`, so they must be what that takes: routing rules of IPv6 that
//! every namespace has are left out, since `ip` would add them a second time.

use std::collections::HashSet;
use std::io;
use std::time::{Duration, Instant};

use floe_kernel::netlink::{Message, NLM_F_CREATE, NetlinkSocket, attribute, attributes, messages};

use super::error::{Attempt, NetError};

const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
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
const RTA_OIF: u16 = 4;
const RTA_CACHEINFO: u16 = 12;
const RTA_ENCAP_TYPE: u16 = 21;
const RTA_ENCAP: u16 = 22;
const RTA_EXPIRES: u16 = 23;
const RTA_NH_ID: u16 = 30;
const RTM_F_CLONED: u32 = 0x200;
const RT_TABLE_LOCAL: u32 = 255;
const RTPROT_KERNEL: u8 = 2;
/// Size of `struct rtmsg` and of `struct fib_rule_hdr`.
const ROUTE_HEADER: usize = 12;
/// Size of `struct ifaddrmsg`.
const ADDRESS_HEADER: usize = 8;
const LOOPBACK6: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// Priority and table of the two rules that every namespace has for IPv6.
const V6_DEFAULTS: [(u32, u8); 2] = [(0, 255), (32766, 254)];

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
    /// All rules where the namespace lacks some that a new one has; for a field of ours.
    pub all_rules: Option<Vec<u8>>,
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
    let all_rules = lacks_defaults(&rules, &rules6).then(|| [&rules[..], &rules6].concat());
    let mut rules = image(RULES, &rules, |_| true)?;
    rules.extend(image(RULES, &rules6, |rule| !is_default_rule(rule))?.split_off(4));
    Ok(IpDump {
        addresses: image(ADDRESSES, &addresses, |_| true)?,
        routes: without_state(image(ROUTES, &routes, is_kept_route)?),
        routes6: without_state(image(ROUTES, &routes6, is_kept_route)?),
        rules,
        all_rules,
    })
}

/// Whether one of the rules is gone that every namespace begins with.
fn lacks_defaults(v4: &[u8], v6: &[u8]) -> bool {
    let places = |dump| {
        let rules = messages(dump).filter_map(Result::ok);
        rules.map(place_of).collect::<HashSet<_>>()
    };
    const V4: [(u32, u8); 3] = [(0, 255), (32766, 254), (32767, 253)];
    let lacks = |dump, defaults: &[(u32, u8)]| {
        let there = places(dump);
        defaults.iter().any(|place| !there.contains(place))
    };
    lacks(v4, &V4)
        || std::fs::exists("/proc/sys/net/ipv6").unwrap_or(false) && lacks(v6, &V6_DEFAULTS)
}

/// Priority and table of a rule.
fn place_of(rule: Message<'_>) -> (u32, u8) {
    const FRA_PRIORITY: u16 = 6;
    let priority = find(rule, FRA_PRIORITY).and_then(word).unwrap_or(0);
    (priority, byte(rule, 4))
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
    byte(rule, 0) == libc::AF_INET6 as u8 && V6_DEFAULTS.contains(&place_of(rule))
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
    let wanted = open(image, ADDRESSES, "addresses")?;
    let is_v6 = |message: &&Message<'_>| byte(**message, 0) == libc::AF_INET6 as u8;
    let (v6, v4): (Vec<&Message<'_>>, Vec<_>) = wanted.iter().partition(is_v6);
    // The kernel puts a new address of IPv6 before the others.
    for message in v4.into_iter().chain(v6.into_iter().rev()) {
        add(socket, RTM_NEWADDR, *message).during("Adding", || address(*message))?;
    }
    if !image.is_empty() {
        remove_unwanted(socket, &wanted)?;
        wait_until_usable(socket, &wanted)?;
    }
    Ok(())
}

/// The devices of an image's addresses that cannot be used yet.
pub fn with_tentative(image: &[u8]) -> Result<HashSet<u32>, NetError> {
    let all = open(image, ADDRESSES, "addresses")?.into_iter();
    let waiting = all.filter(|one| is_tentative(*one));
    Ok(waiting.map(|one| identity(one).2).collect())
}

/// What makes an address: family, length, device and bytes.
fn identity(message: Message<'_>) -> (u8, u8, u32, Vec<u8>) {
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    let rest = message.body.get(ADDRESS_HEADER..).unwrap_or_default();
    let find = |wanted: u16| attributes(rest).find(|(kind, _)| *kind == wanted);
    let bytes = find(IFA_LOCAL).or_else(|| find(IFA_ADDRESS));
    (
        byte(message, 0),
        byte(message, 1),
        message.body.get(4..).and_then(word).unwrap_or(0),
        bytes.map_or_else(Vec::new, |(_, bytes)| bytes.to_vec()),
    )
}

/// Takes away what a device got by itself as it was switched on, and had lost before the dump.
fn remove_unwanted(socket: &NetlinkSocket, wanted: &[Message<'_>]) -> Result<(), NetError> {
    let keep: HashSet<_> = wanted.iter().map(|one| identity(*one)).collect();
    let now = list_addresses(socket)?;
    for message in messages(&now).filter_map(Result::ok) {
        let own = identity(message);
        let by_itself =
            own.3 == [127, 0, 0, 1] || own.3.starts_with(&[0xfe, 0x80]) || own.3 == LOOPBACK6;
        if by_itself && !keep.contains(&own) {
            match socket.request(RTM_DELADDR, 0, message.body) {
                Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
                other => other.during("Removing", || address(message))?,
            }
        }
    }
    Ok(())
}

/// Waits, for a moment at most, until addresses can be used that could be: the kernel sees to that in the background.
fn wait_until_usable(socket: &NetlinkSocket, wanted: &[Message<'_>]) -> Result<(), NetError> {
    const LIMIT: Duration = Duration::from_millis(200);
    const PAUSE: Duration = Duration::from_millis(1);
    let usable = wanted.iter().filter(|one| !is_tentative(**one));
    let usable: HashSet<_> = usable.map(|one| identity(*one)).collect();
    let begin = Instant::now();
    loop {
        let now = list_addresses(socket)?;
        let mut all = messages(&now).filter_map(Result::ok);
        let waits = all.any(|one| is_tentative(one) && usable.contains(&identity(one)));
        if !waits || begin.elapsed() > LIMIT {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
}

fn is_tentative(message: Message<'_>) -> bool {
    const TENTATIVE: u8 = 0x40;
    byte(message, 2) & TENTATIVE != 0 && byte(message, 0) == libc::AF_INET6 as u8
}

fn list_addresses(socket: &NetlinkSocket) -> Result<Vec<u8>, NetError> {
    let dump = socket.dump_raw(RTM_GETADDR, &[0; ROUTE_HEADER]);
    dump.during("Listing", || "addresses".to_string())
}

/// What an address is called in an error.
fn address(message: Message<'_>) -> String {
    const IFA_ADDRESS: u16 = 1;
    let mut all = attributes(message.body.get(ADDRESS_HEADER..).unwrap_or_default());
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
        if has(RTA_GATEWAY) || has(RTA_VIA) || has(RTA_MULTIPATH) || has(RTA_NH_ID) {
            2
        } else {
            u8::from(has(RTA_PREFSRC))
        }
    });
    for route in routes {
        let body = route_request(route);
        let request = Message {
            body: &body,
            ..route
        };
        add(socket, RTM_NEWROUTE, request).during("Adding", || {
            const RTA_DST: u16 = 1;
            let target = find(route, RTA_DST).map(shown);
            let target = target.unwrap_or_else(|| "default".into());
            format!("route {target}/{}", byte(route, 1))
        })?;
    }
    Ok(())
}

/// The message as the kernel takes it: when the route ends, and one way to say where it leads.
fn route_request(route: Message<'_>) -> Vec<u8> {
    const HOPS: [u16; 6] = [
        RTA_OIF,
        RTA_GATEWAY,
        RTA_VIA,
        RTA_MULTIPATH,
        RTA_ENCAP_TYPE,
        RTA_ENCAP,
    ];
    let mut body = route.body.to_vec();
    if find(route, RTA_NH_ID).is_some() {
        body.truncate(ROUTE_HEADER);
        let all = attributes(route.body.get(ROUTE_HEADER..).unwrap_or_default());
        for (kind, value) in all.filter(|(kind, _)| !HOPS.contains(kind)) {
            attribute(&mut body, kind, value);
        }
    }
    // The third number, in hundredths of a second.
    let left = find(route, RTA_CACHEINFO).and_then(|info| info.get(8..).and_then(word));
    let seconds = left.unwrap_or(0).cast_signed() / 100;
    if seconds > 0 && byte(route, 0) == libc::AF_INET6 as u8 {
        attribute(&mut body, RTA_EXPIRES, &seconds.to_ne_bytes());
    }
    body
}

/// Makes the rules of both protocols those of a dump of ours, whatever the namespace began with.
pub fn execute_all_rules(socket: &NetlinkSocket, image: &[u8]) -> Result<(), NetError> {
    let wanted = messages(image).collect::<io::Result<Vec<_>>>();
    let wanted = wanted.during("Reading", || "the image of routing rules".to_string())?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        let of_family = wanted
            .iter()
            .filter(|rule| i32::from(byte(**rule, 0)) == family);
        let of_family: Vec<Message<'_>> = of_family.copied().collect();
        if family == libc::AF_INET6 && !std::fs::exists("/proc/sys/net/ipv6").unwrap_or(false) {
            continue;
        }
        become_rules(socket, family, &of_family)?;
    }
    Ok(())
}

/// Makes the rules those of the image; without any the namespace keeps what it has.
pub fn execute_rules(socket: &NetlinkSocket, image: &[u8]) -> Result<(), NetError> {
    let wanted = open(image, RULES, "routing rules")?;
    if wanted.is_empty() {
        return Ok(());
    }
    become_rules(socket, libc::AF_INET, &wanted)
}

/// Deletes rules of a protocol that are not wanted, and adds those that are not there.
fn become_rules(
    socket: &NetlinkSocket,
    family: i32,
    wanted: &[Message<'_>],
) -> Result<(), NetError> {
    let mut body = [0; ROUTE_HEADER];
    body[0] = family as u8;
    let dump = socket.dump_raw(RTM_GETRULE, &body);
    let dump = dump.during("Listing", || "routing rules".to_string())?;
    let there = messages(&dump).collect::<io::Result<Vec<_>>>();
    let there = there.during("Listing", || "routing rules".to_string())?;
    let keep: HashSet<&[u8]> = wanted.iter().map(|rule| rule.body).collect();
    let mut known: HashSet<&[u8]> = there.iter().map(|rule| rule.body).collect();
    for rule in there.iter().filter(|rule| !keep.contains(rule.body)) {
        let deleted = socket.request(RTM_DELRULE, 0, rule.body);
        deleted.during("Deleting", || "a routing rule".to_string())?;
    }
    for rule in wanted {
        if known.insert(rule.body) {
            add(socket, RTM_NEWRULE, *rule).during("Adding", || "a routing rule".to_string())?;
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
