//! Packets that a TCP connection's peer would have sent, made up and fed to our own end.
//!
//! Contract relied on: a packet sent through a raw socket to a local address takes the loopback device and is
//! received as any other; its source address need not be local.

use std::io;

use crate::nftables::{Flow, PASS_MARK};
use crate::socket::{send_to, socket};
use crate::sockopt::{SocketOption, set_option_number};
use std::os::fd::AsFd;

/// A segment without data, acknowledging what it must.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub sequence: u32,
    pub acknowledged: u32,
    pub window: u16,
    /// It is the last one of its sender.
    pub fin: bool,
}

const HEADER: usize = 20;

/// Feeds a segment to the local socket that is the target of `flow`. `EPERM` without CAP_NET_RAW.
pub fn feed(flow: &Flow, segment: &Segment) -> io::Result<()> {
    let v4 = flow.source.len() == 4;
    let family = if v4 { libc::AF_INET } else { libc::AF_INET6 };
    let raw = socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    let mark = SocketOption(libc::SOL_SOCKET, libc::SO_MARK);
    set_option_number(raw.as_fd(), mark, PASS_MARK.cast_signed())?;
    let mut packet = if v4 {
        ipv4_header(flow)
    } else {
        ipv6_header(flow)
    };
    packet.extend_from_slice(&tcp_header(flow, segment));
    let mut address = (family as u16).to_ne_bytes().to_vec();
    if v4 {
        address.extend_from_slice(&[0; 2]);
        address.extend_from_slice(&flow.target);
        address.resize(16, 0);
    } else {
        address.extend_from_slice(&[0; 6]);
        address.extend_from_slice(&flow.target);
        address.resize(28, 0);
    }
    send_to(raw.as_fd(), &packet, &address)
}

/// The kernel fills in the checksum.
fn ipv4_header(flow: &Flow) -> Vec<u8> {
    const HOPS: u8 = 64;
    let length = (2 * HEADER) as u16;
    let mut header = vec![0x45, 0];
    header.extend_from_slice(&length.to_be_bytes());
    header.extend_from_slice(&[0, 0, 0, 0, HOPS, libc::IPPROTO_TCP as u8, 0, 0]);
    header.extend_from_slice(&flow.source);
    header.extend_from_slice(&flow.target);
    header
}

fn ipv6_header(flow: &Flow) -> Vec<u8> {
    const HOPS: u8 = 64;
    let mut header = vec![0x60, 0, 0, 0];
    header.extend_from_slice(&(HEADER as u16).to_be_bytes());
    header.extend_from_slice(&[libc::IPPROTO_TCP as u8, HOPS]);
    header.extend_from_slice(&flow.source);
    header.extend_from_slice(&flow.target);
    header
}

fn tcp_header(flow: &Flow, segment: &Segment) -> [u8; HEADER] {
    const ACK: u8 = 0x10;
    const FIN: u8 = 1;
    let mut header = [0u8; HEADER];
    header[..2].copy_from_slice(&flow.source_port.to_be_bytes());
    header[2..4].copy_from_slice(&flow.target_port.to_be_bytes());
    header[4..8].copy_from_slice(&segment.sequence.to_be_bytes());
    header[8..12].copy_from_slice(&segment.acknowledged.to_be_bytes());
    header[12] = (HEADER as u8 / 4) << 4;
    header[13] = if segment.fin { ACK | FIN } else { ACK };
    header[14..16].copy_from_slice(&segment.window.to_be_bytes());
    let mut pseudo = flow.source.clone();
    pseudo.extend_from_slice(&flow.target);
    pseudo.extend_from_slice(&[0, libc::IPPROTO_TCP as u8, 0, HEADER as u8]);
    pseudo.extend_from_slice(&header);
    header[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    header
}

/// RFC 1071, over an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_sums_up_to_nothing() {
        let flow = Flow {
            source: vec![10, 0, 0, 1],
            source_port: 80,
            target: vec![10, 0, 0, 2],
            target_port: 4711,
        };
        let segment = Segment {
            sequence: 0xdead_beef,
            acknowledged: 17,
            window: 512,
            fin: true,
        };
        let header = tcp_header(&flow, &segment);
        let mut pseudo = vec![10, 0, 0, 1, 10, 0, 0, 2, 0, 6, 0, 20];
        pseudo.extend_from_slice(&header);
        assert_eq!(checksum(&pseudo), 0);
    }
}
