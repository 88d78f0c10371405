//! Neighbours and forwarding entries that somebody has set (`ip neigh`, `bridge fdb`).
//!
//! Saved:    permanent neighbours, proxies, static entries of bridges: the kernel's own messages.
//! Rebuilt:  sent back. Needs: the devices.
//! Not kept: what was learned, which is learned again; multicast groups of bridges.

use std::io;

use floe_kernel::netlink::{
    Message, NLM_F_CREATE, NLM_F_EXCL, NetlinkSocket, attribute, attributes, messages,
};

use super::error::{Attempt, NetError};

const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;
/// `NUD_NOARP`: how a bridge calls an entry that was set.
const STATIC: u16 = 0x40;
/// `NUD_PERMANENT`
const PERMANENT: u16 = 0x80;
const NTF_MASTER: u8 = 4;
const NTF_PROXY: u8 = 8;
/// `NTF_EXT_LEARNED`: set by a program that learns for the kernel.
const NTF_EXT_LEARNED: u8 = 16;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NDA_VLAN: u16 = 5;
const NDA_MASTER: u16 = 9;
const NDA_PROTOCOL: u16 = 12;
/// Size of `struct ndmsg`.
const HEADER: usize = 12;
const STATE: usize = 8;
const FLAGS: usize = 10;

/// Lists what was set in the socket's namespace.
pub fn collect(socket: &NetlinkSocket) -> Result<Vec<u8>, NetError> {
    let mut image = Vec::new();
    let questions = [
        (libc::AF_INET, 0),
        (libc::AF_INET6, 0),
        (libc::AF_INET, NTF_PROXY),
        (libc::AF_INET6, NTF_PROXY),
        (libc::AF_BRIDGE, 0),
    ];
    for (family, flags) in questions {
        let mut body = [0; HEADER];
        (body[0], body[FLAGS]) = (family as u8, flags);
        let dump = match socket.dump_raw(RTM_GETNEIGH, &body) {
            // A kernel without the protocol, or without bridges.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)
                ) =>
            {
                continue;
            }
            other => other.during("Listing", || "neighbours".to_string())?,
        };
        for entry in messages(&dump) {
            let entry = entry.during("Reading", || "an answer of netlink".to_string())?;
            if is_set(entry) {
                image.extend_from_slice(entry.whole);
                image.resize(image.len().next_multiple_of(4), 0);
            }
        }
    }
    Ok(image)
}

fn find(entry: Message<'_>, wanted: u16) -> Option<&[u8]> {
    let mut all = attributes(entry.body.get(HEADER..).unwrap_or_default());
    all.find(|(kind, _)| *kind == wanted)
        .map(|(_, value)| value)
}

fn is_set(entry: Message<'_>) -> bool {
    let Some(header) = entry.body.get(..HEADER) else {
        return false;
    };
    let state = u16::from_ne_bytes([header[STATE], header[STATE + 1]]);
    if i32::from(header[0]) == libc::AF_BRIDGE {
        // The bridge's own addresses are there by themselves, and belong to itself.
        let master = find(entry, NDA_MASTER);
        return master.is_some_and(|master| *master != header[4..8])
            && state & (STATIC | PERMANENT) != 0;
    }
    header[FLAGS] & NTF_PROXY != 0 || state & PERMANENT != 0
}

/// Sends the messages of an image back; what is there already is left.
pub fn execute(socket: &NetlinkSocket, image: &[u8]) -> Result<(), NetError> {
    let all = messages(image).collect::<io::Result<Vec<_>>>();
    for entry in all.during("Reading", || "the image of neighbours".to_string())? {
        let body = request(entry);
        match socket.request(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_EXCL, &body) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            other => other.during("Adding", || "a neighbour".to_string())?,
        }
    }
    Ok(())
}

/// The message without what the kernel says and does not take.
fn request(entry: Message<'_>) -> Vec<u8> {
    let mut body = entry.body.get(..HEADER).unwrap_or(&[0; HEADER]).to_vec();
    let keep = NTF_PROXY | NTF_EXT_LEARNED;
    body[FLAGS] &= keep;
    if i32::from(body[0]) == libc::AF_BRIDGE {
        body[FLAGS] |= NTF_MASTER;
    }
    for (kind, value) in attributes(entry.body.get(HEADER..).unwrap_or_default()) {
        if matches!(kind, NDA_DST | NDA_LLADDR | NDA_VLAN | NDA_PROTOCOL) {
            attribute(&mut body, kind, value);
        }
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;
    use floe_kernel::netlink::message;

    #[test]
    fn what_was_learned_is_left_out() {
        let entry = |state: u16, flags: u8| {
            let mut body = [0; HEADER];
            (body[0], body[FLAGS]) = (libc::AF_INET as u8, flags);
            body[STATE..STATE + 2].copy_from_slice(&state.to_ne_bytes());
            message(RTM_NEWNEIGH, 0, &body)
        };
        let kept = |bytes: &[u8]| is_set(messages(bytes).next().expect("one").expect("whole"));
        assert!(kept(&entry(PERMANENT, 0)));
        assert!(kept(&entry(0, NTF_PROXY)));
        assert!(!kept(&entry(2, 0)));
        assert!(!kept(&entry(STATIC, 0)));
    }
}
