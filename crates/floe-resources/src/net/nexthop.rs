//! Next hops that routes refer to by number (`ip nexthop`).
//!
//! Saved:    the kernel's own messages.
//! Rebuilt:  sent back, groups behind their members. Needs: the devices.
//! Not kept: what resilient groups count; the kernel does not take it back.

use std::io;

use floe_kernel::netlink::{Message, NLM_F_CREATE, NetlinkSocket, attribute, attributes, messages};

use super::error::{Attempt, NetError};

const RTM_NEWNEXTHOP: u16 = 104;
const RTM_GETNEXTHOP: u16 = 106;
const NHA_ID: u16 = 1;
const NHA_GROUP: u16 = 2;
const NHA_GROUP_TYPE: u16 = 3;
const NHA_BLACKHOLE: u16 = 4;
const NHA_OIF: u16 = 5;
const NHA_GATEWAY: u16 = 6;
const NHA_ENCAP_TYPE: u16 = 7;
const NHA_ENCAP: u16 = 8;
const NHA_FDB: u16 = 11;
/// Size of `struct nhmsg`.
const HEADER: usize = 8;

/// Lists the next hops of the socket's namespace; nothing where the kernel has no such objects.
pub fn collect(socket: &NetlinkSocket) -> Result<Vec<u8>, NetError> {
    match socket.dump_raw(RTM_GETNEXTHOP, &[0; HEADER]) {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::EINVAL | libc::EPERM)
            ) =>
        {
            Ok(Vec::new())
        }
        other => other.during("Listing", || "next hops".to_string()),
    }
}

/// Sends the messages of an image back.
pub fn execute(socket: &NetlinkSocket, image: &[u8]) -> Result<(), NetError> {
    let all = messages(image).collect::<io::Result<Vec<_>>>();
    let mut all = all.during("Reading", || "the image of next hops".to_string())?;
    all.sort_by_key(|hop| find(*hop, NHA_GROUP).is_some());
    for hop in all {
        let made = socket.request(RTM_NEWNEXTHOP, NLM_F_CREATE, &request(hop));
        made.during("Adding", || {
            let id = find(hop, NHA_ID).and_then(|id| id.try_into().ok());
            format!("next hop {}", id.map_or(0, u32::from_ne_bytes))
        })?;
    }
    Ok(())
}

fn find(hop: Message<'_>, wanted: u16) -> Option<&[u8]> {
    let mut all = attributes(hop.body.get(HEADER..).unwrap_or_default());
    all.find(|(kind, _)| *kind == wanted)
        .map(|(_, value)| value)
}

/// The message without what the kernel says and does not take.
fn request(hop: Message<'_>) -> Vec<u8> {
    /// `RTNH_F_ONLINK`, the only flag that is not a state.
    const ON_LINK: u8 = 4;
    const ENCAP_NESTED: u16 = NHA_ENCAP | 1 << 15;
    let mut body = hop.body.get(..HEADER).unwrap_or(&[0; HEADER]).to_vec();
    // Scope and the reserved byte.
    (body[1], body[3]) = (0, 0);
    body[4] &= ON_LINK;
    body[5..HEADER].fill(0);
    for (kind, value) in attributes(hop.body.get(HEADER..).unwrap_or_default()) {
        match kind {
            NHA_ENCAP => attribute(&mut body, ENCAP_NESTED, value),
            NHA_ID | NHA_GROUP | NHA_GROUP_TYPE | NHA_BLACKHOLE | NHA_OIF | NHA_GATEWAY
            | NHA_ENCAP_TYPE | NHA_FDB => attribute(&mut body, kind, value),
            _ => {}
        }
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;
    use floe_kernel::netlink::message;

    #[test]
    fn states_are_no_part_of_a_next_hop() {
        let mut body = vec![2, 253, 4, 0, 1 | 4 | 16, 0, 0, 0];
        attribute(&mut body, NHA_ID, &[1, 0, 0, 0]);
        attribute(&mut body, 14, &[9; 4]);
        let whole = message(RTM_NEWNEXTHOP, 0, &body);
        let sent = request(messages(&whole).next().expect("one").expect("whole"));
        assert_eq!(sent[..HEADER], [2, 0, 4, 0, 4, 0, 0, 0]);
        assert_eq!(attributes(&sent[HEADER..]).count(), 1);
    }
}
