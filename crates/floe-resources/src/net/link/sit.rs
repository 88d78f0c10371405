//! IPv6 tunnels over IPv4 (`sit`): the driver's attributes, one by one as the image has them.

use floe_image::messages::SitEntry;
use floe_kernel::netlink::{attribute, attributes};

/// `IFLA_IPTUN_*`.
mod raw {
    pub const LINK: u16 = 1;
    pub const LOCAL: u16 = 2;
    pub const REMOTE: u16 = 3;
    pub const TTL: u16 = 4;
    pub const TOS: u16 = 5;
    pub const FLAGS: u16 = 8;
    pub const PROTO: u16 = 9;
    pub const PMTUDISC: u16 = 10;
    pub const RD_PREFIX: u16 = 11;
    pub const RELAY_PREFIX: u16 = 12;
    pub const RD_PREFIXLEN: u16 = 13;
    pub const RELAY_PREFIXLEN: u16 = 14;
    pub const ENCAP_TYPE: u16 = 15;
    pub const ENCAP_FLAGS: u16 = 16;
    pub const ENCAP_SPORT: u16 = 17;
    pub const ENCAP_DPORT: u16 = 18;
}

/// Reads the driver's attributes.
pub fn collect(data: &[u8]) -> SitEntry {
    let mut entry = SitEntry::default();
    for (kind, value) in attributes(data) {
        let number = Some(number(value));
        let address = || words(value).into_iter().filter(|word| *word != 0).collect();
        match kind {
            raw::LINK => entry.link = number,
            raw::LOCAL => entry.local = address(),
            raw::REMOTE => entry.remote = address(),
            raw::TTL => entry.ttl = number,
            raw::TOS => entry.tos = number,
            raw::FLAGS => entry.flags = number,
            raw::PROTO => entry.proto = number,
            raw::PMTUDISC => entry.pmtudisc = (number != Some(0)).then_some(true),
            raw::RD_PREFIX => entry.rd_prefix = words(value),
            raw::RELAY_PREFIX => entry.relay_prefix = words(value),
            raw::RD_PREFIXLEN => entry.rd_prefixlen = number.filter(|length| *length != 0),
            raw::RELAY_PREFIXLEN => entry.relay_prefixlen = number.filter(|length| *length != 0),
            raw::ENCAP_TYPE => entry.encap_type = number,
            raw::ENCAP_FLAGS => entry.encap_flags = number,
            raw::ENCAP_SPORT => entry.encap_sport = number,
            raw::ENCAP_DPORT => entry.encap_dport = number,
            _ => {}
        }
    }
    // A prefix counts only with its length.
    if entry.rd_prefixlen.is_none() {
        entry.rd_prefix.clear();
        entry.relay_prefixlen = None;
    }
    if entry.relay_prefixlen.is_none() {
        entry.relay_prefix.clear();
    }
    entry
}

/// Writes the driver's attributes.
pub fn encode(entry: &SitEntry) -> Vec<u8> {
    let mut data = Vec::new();
    let mut put = |kind, value: Option<u32>, size: usize| {
        if let Some(value) = value {
            attribute(&mut data, kind, &value.to_le_bytes()[..size]);
        }
    };
    put(raw::LINK, entry.link, 4);
    put(raw::TTL, entry.ttl, 1);
    put(raw::TOS, entry.tos, 1);
    put(raw::FLAGS, entry.flags, 2);
    put(raw::PROTO, entry.proto, 1);
    put(raw::PMTUDISC, entry.pmtudisc.map(u32::from), 1);
    put(raw::ENCAP_TYPE, entry.encap_type, 2);
    put(raw::ENCAP_FLAGS, entry.encap_flags, 2);
    put(raw::ENCAP_SPORT, entry.encap_sport, 2);
    put(raw::ENCAP_DPORT, entry.encap_dport, 2);
    put(raw::RD_PREFIXLEN, entry.rd_prefixlen, 2);
    put(raw::RELAY_PREFIXLEN, entry.relay_prefixlen, 2);
    let mut put = |kind, words: &[u32]| {
        if !words.is_empty() {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            attribute(&mut data, kind, &bytes);
        }
    };
    put(raw::LOCAL, &entry.local);
    put(raw::REMOTE, &entry.remote);
    put(raw::RD_PREFIX, &entry.rd_prefix);
    put(raw::RELAY_PREFIX, &entry.relay_prefix);
    data
}

fn number(value: &[u8]) -> u32 {
    let bytes = value.iter().take(4).enumerate();
    bytes.fold(0, |all, (place, byte)| {
        all | u32::from(*byte) << (8 * place)
    })
}

fn words(value: &[u8]) -> Vec<u32> {
    let chunks = value.chunks_exact(4);
    chunks
        .map(|chunk| u32::from_ne_bytes(chunk.try_into().expect("chunks of four")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_back() {
        let entry = SitEntry {
            local: vec![0x0100_000a],
            remote: vec![0x0200_000a],
            ttl: Some(64),
            pmtudisc: Some(true),
            rd_prefixlen: Some(16),
            rd_prefix: vec![0x0220, 0, 0, 0],
            encap_sport: Some(0x1234),
            ..SitEntry::default()
        };
        assert_eq!(collect(&encode(&entry)), entry);
    }
}
