//! Addresses in images and in system calls.

use std::net::IpAddr;

use floe_image::messages::InetSkEntry;
use floe_kernel::nftables::Flow;

use crate::restore::PlanError;

/// Address and port of one end, as the images have them: words as they lie in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct End {
    pub words: Vec<u32>,
    pub port: u32,
}

impl End {
    /// From `struct sockaddr_in` or `sockaddr_in6`; `None` for another family or too few bytes.
    pub fn from_sockaddr(bytes: &[u8]) -> Option<Self> {
        let family = i32::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let port = u32::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?));
        let address = match family {
            libc::AF_INET => bytes.get(4..8)?,
            libc::AF_INET6 => bytes.get(8..24)?,
            _ => return None,
        };
        let words = address.chunks_exact(4);
        let words = words.filter_map(|word| Some(u32::from_ne_bytes(word.try_into().ok()?)));
        Some(End {
            words: words.collect(),
            port,
        })
    }

    /// `struct sockaddr_in` or `sockaddr_in6`; `scope` is the number of a device.
    pub fn to_sockaddr(&self, family: u32, scope: u32) -> Vec<u8> {
        let mut bytes = (family as u16).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&(self.port as u16).to_be_bytes());
        if family == libc::AF_INET.cast_unsigned() {
            bytes.extend_from_slice(&self.bytes());
            bytes.resize(16, 0);
        } else {
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&self.bytes());
            bytes.extend_from_slice(&scope.to_ne_bytes());
        }
        bytes
    }

    fn bytes(&self) -> Vec<u8> {
        self.words
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect()
    }

    /// The address; `None` where it has the length of none.
    pub fn ip(&self) -> Option<IpAddr> {
        let bytes = self.bytes();
        let four = <[u8; 4]>::try_from(&bytes[..]).map(IpAddr::from).ok();
        four.or_else(|| <[u8; 16]>::try_from(&bytes[..]).map(IpAddr::from).ok())
    }

    /// Whether no address was chosen.
    pub fn is_unspecified(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Whether the address means something on one device only (RFC 4291: `fe80::/10` and multicast of
    /// interface or link scope).
    pub fn needs_device(&self) -> bool {
        match *self.bytes() {
            [0xfe, second, ..] => second & 0xc0 == 0x80 && self.words.len() == 4,
            [0xff, second, ..] => matches!(second & 0xf, 1 | 2) && self.words.len() == 4,
            _ => false,
        }
    }
}

/// The end that the socket is bound to.
pub(super) fn source(entry: &InetSkEntry) -> Result<End, PlanError> {
    end(entry, &entry.src_addr, entry.src_port)
}

/// The end that the socket is connected to.
pub(super) fn target(entry: &InetSkEntry) -> Result<End, PlanError> {
    end(entry, &entry.dst_addr, entry.dst_port)
}

fn end(entry: &InetSkEntry, words: &[u32], port: u32) -> Result<End, PlanError> {
    let count = match entry.family.cast_signed() {
        libc::AF_INET => 1,
        libc::AF_INET6 => 4,
        family => {
            let what = format!("socket {} is of family {family}", entry.ino);
            return Err(PlanError::damaged("files.img", what));
        }
    };
    // The oldest images have four words for IPv4 too.
    match words.get(..count) {
        Some(words) if port <= u32::from(u16::MAX) => Ok(End {
            words: words.to_vec(),
            port,
        }),
        _ => {
            let what = format!("socket {} has a damaged address", entry.ino);
            Err(PlanError::damaged("files.img", what))
        }
    }
}

/// What the packets that a connection sends look like. IPv6 sockets may speak IPv4.
pub(super) fn outgoing(source: &End, target: &End) -> Flow {
    let mapped = |end: &End| end.words.len() == 4 && end.bytes().starts_with(&MAPPED);
    let bytes = |end: &End| {
        if mapped(target) {
            end.bytes()[12..].to_vec()
        } else {
            end.bytes()
        }
    };
    Flow {
        source: bytes(source),
        source_port: source.port as u16,
        target: bytes(target),
        target_port: target.port as u16,
    }
}

/// The first bytes of an IPv4 address in IPv6 (`::ffff:0:0/96`).
const MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_addresses_go_there_and_back() {
        let end = End {
            words: vec![u32::from_ne_bytes([10, 0, 0, 1])],
            port: 8080,
        };
        let v4 = end.to_sockaddr(libc::AF_INET.cast_unsigned(), 0);
        assert_eq!((v4.len(), &v4[2..8]), (16, &[0x1f, 0x90, 10, 0, 0, 1][..]));
        assert_eq!(End::from_sockaddr(&v4), Some(end));
        let end = End {
            words: vec![1, 2, 3, 4],
            port: 1,
        };
        let v6 = end.to_sockaddr(libc::AF_INET6.cast_unsigned(), 7);
        assert_eq!((v6.len(), v6[24]), (28, 7));
        assert_eq!(End::from_sockaddr(&v6), Some(end));
    }

    #[test]
    fn mapped_addresses_travel_as_ipv4() {
        let mapped = |last| End {
            words: vec![0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), last],
            port: 1,
        };
        assert_eq!(outgoing(&mapped(5), &mapped(6)).source, 5u32.to_ne_bytes());
        let plain = End {
            words: vec![1, 2, 3, 4],
            port: 1,
        };
        assert_eq!(outgoing(&plain, &plain).target.len(), 16);
    }

    #[test]
    fn link_local_addresses_need_a_device() {
        let end = |first: [u8; 4]| End {
            words: vec![u32::from_ne_bytes(first), 0, 0, 1],
            port: 1,
        };
        assert!(end([0xfe, 0x80, 0, 0]).needs_device());
        assert!(end([0xff, 2, 0, 0]).needs_device());
        assert!(!end([0x20, 1, 0, 0]).needs_device());
    }
}
