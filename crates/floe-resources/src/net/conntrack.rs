//! Tracked connections and expected ones (`NETLINK_NETFILTER`, conntrack).
//!
//! Saved:    the kernel's own messages, one behind the other.
//! Rebuilt:  the messages are sent back; TCP is tracked leniently from then on. Needs: nothing.
//! Not kept: counters, and entries of the kernel that run out meanwhile.

use floe_kernel::netlink::{Message, NLM_F_CREATE, NetlinkSocket, attributes, messages};

use super::error::{Attempt, NetError};

/// Subsystem and `IPCTNL_MSG_CT_NEW`; the request for a dump is one more.
const CONNECTION: u16 = 1 << 8;
/// Subsystem and `IPCTNL_MSG_EXP_NEW`.
const EXPECTATION: u16 = 2 << 8;
/// Size of `struct nfgenmsg`.
const HEADER: usize = 4;

/// The images of one namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tracked {
    pub connections: Vec<u8>,
    pub expectations: Vec<u8>,
}

/// Lists what the namespace of the calling thread tracks; nothing where the kernel cannot track.
pub fn collect() -> Result<Tracked, NetError> {
    let Ok(socket) = NetlinkSocket::open(libc::NETLINK_NETFILTER) else {
        return Ok(Tracked::default());
    };
    let list = |kind: u16, what: &str| match socket.dump_raw(kind + 1, &[0; HEADER]) {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EINVAL | libc::ENOENT | libc::EOPNOTSUPP)
            ) =>
        {
            Ok(Vec::new())
        }
        other => other.during("Listing", || what.to_string()),
    };
    Ok(Tracked {
        connections: list(CONNECTION, "tracked connections")?,
        expectations: list(EXPECTATION, "expected connections")?,
    })
}

/// Sends the messages of an image back.
pub fn execute(image: &[u8]) -> Result<(), NetError> {
    if image.is_empty() {
        return Ok(());
    }
    let what = || "tracked connections".to_string();
    let socket = NetlinkSocket::open(libc::NETLINK_NETFILTER).during("Restoring", what)?;
    for message in messages(image) {
        let message = message.during("Reading", what)?;
        if message.kind != CONNECTION && message.kind != EXPECTATION {
            return Err(NetError::Damaged(format!(
                "The image of tracked connections has a message of type {:#x}",
                message.kind
            )));
        }
        match socket.request(message.kind, NLM_F_CREATE, &lenient(message)) {
            // CRIU lists connections in the image of expectations, too.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            other => other.during("Restoring", what)?,
        }
    }
    Ok(())
}

/// The body with the flag for lenient tracking set in both directions: sequence numbers moved while nobody
/// looked.
fn lenient(message: Message<'_>) -> Vec<u8> {
    const PROTOCOL: u16 = 4;
    const TCP: u16 = 1;
    const FLAGS: [u16; 2] = [4, 5];
    const BE_LIBERAL: u8 = 8;
    let mut body = message.body.to_vec();
    if message.kind != CONNECTION {
        return body;
    }
    let inner = |value: &[u8], wanted: u16| -> Option<Vec<u8>> {
        let mut all = attributes(value);
        all.find(|(kind, _)| *kind == wanted)
            .map(|(_, value)| value.to_vec())
    };
    let tcp = inner(body.get(HEADER..).unwrap_or_default(), PROTOCOL)
        .and_then(|protocol| inner(&protocol, TCP));
    let Some(tcp) = tcp else {
        return body;
    };
    // The attribute is found once more as a run of bytes: it is unique, as it holds its own length.
    let Some(at) = body.windows(tcp.len()).position(|window| window == tcp) else {
        return body;
    };
    let mut offset = at;
    for (kind, value) in attributes(&tcp) {
        if FLAGS.contains(&kind) && value.len() >= 2 {
            body[offset + 4] |= BE_LIBERAL;
            body[offset + 5] |= BE_LIBERAL;
        }
        offset += (4 + value.len()).next_multiple_of(4);
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;
    use floe_kernel::netlink::{attribute, message, nested};

    #[test]
    fn both_directions_become_lenient() {
        let mut body = vec![2, 0, 0, 0];
        attribute(&mut body, 3, &[1, 2, 3, 4]);
        nested(&mut body, 4, |protocol| {
            nested(protocol, 1, |tcp| {
                attribute(tcp, 1, &[3]);
                attribute(tcp, 4, &[0x23, 0x23]);
                attribute(tcp, 5, &[0x01, 0]);
            });
        });
        let whole = message(CONNECTION, 0, &body);
        let changed = lenient(messages(&whole).next().expect("one").expect("whole"));
        let differing: Vec<(u8, u8)> = body
            .iter()
            .zip(&changed)
            .filter(|(before, after)| before != after)
            .map(|(before, after)| (*before, *after))
            .collect();
        assert_eq!(differing, [(0x23, 0x2b), (0x23, 0x2b), (1, 9), (0, 8)]);
    }
}
