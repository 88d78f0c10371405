//! Whether the addresses of a checkpoint's sockets are free here.

use std::collections::BTreeSet;
use std::net::UdpSocket;

use floe_archive::check::Row;
use floe_image::ImageKind;
use floe_image::messages::InetSkEntry;
use floe_options::RestoreOptions;
use floe_resources::fd::inet::{AddressFault, address_of, protocol_name};
use floe_resources::restore::TreeImages;

const TCP: u32 = 6;
const UDP: u32 = 17;
/// State of a listening socket in images and in `/proc/net/tcp`.
const LISTENS: u32 = 10;

/// Ports that sockets of the checkpoint listen on and others hold now, and addresses that nobody has here.
pub(super) fn rows(images: &TreeImages, options: &RestoreOptions) -> Vec<Row> {
    if options.join_ns.iter().any(|join| join.kind == "net") {
        return vec![Row::note(
            "ports",
            "the tasks go into another network namespace, whose ports are not looked at",
        )];
    }
    let devices = images.dir.ids(ImageKind::Netdev).unwrap_or_default();
    if !devices.is_empty() {
        return vec![Row::note(
            "ports",
            "the tasks had a network namespace of their own; all its ports are free",
        )];
    }
    let gives_up = options.sockets.tcp_close || images.inventory.tcp_close == Some(true);
    let sockets = images.files.values().filter_map(|file| file.isk.as_ref());
    let bound: Vec<&InetSkEntry> = sockets
        .filter(|socket| socket.src_port != 0 && (!gives_up || takes_port(socket)))
        .collect();
    if bound.is_empty() {
        return vec![Row::good("ports", "no port is needed")];
    }
    let mut faults = taken_ports(&bound);
    faults.extend(absent_addresses(&bound));
    if faults.is_empty() {
        return vec![Row::good("ports", "all ports are free")];
    }
    let bad = |fault: &AddressFault| Row::bad("ports", fault.to_string(), fault.remedy());
    faults.iter().map(bad).collect()
}

fn taken_ports(bound: &[&InetSkEntry]) -> Vec<AddressFault> {
    let tcp = taken(&["tcp", "tcp6"], true);
    let udp = taken(&["udp", "udp6"], false);
    let mut seen = BTreeSet::new();
    let needed = bound.iter().filter(|socket| takes_port(socket));
    let in_use = needed.filter(|socket| match socket.proto {
        TCP => tcp.contains(&socket.src_port),
        _ => udp.contains(&socket.src_port),
    });
    let once = in_use.filter(|socket| seen.insert((socket.proto, socket.src_port)));
    once.map(|socket| AddressFault::PortTaken {
        protocol: protocol_name(socket),
        port: socket.src_port,
    })
    .collect()
}

/// Addresses of IPv4 that no device has. IPv6 sockets are bound freely.
fn absent_addresses(bound: &[&InetSkEntry]) -> Vec<AddressFault> {
    let freely = |socket: &InetSkEntry| {
        let options = socket.ip_opts.as_ref();
        options.is_some_and(|options| options.freebind == Some(true))
    };
    let named = bound.iter().filter(|socket| !freely(socket));
    let addresses: BTreeSet<_> = named
        .filter_map(|socket| address_of(socket))
        .filter(|address| address.is_ipv4() && !address.is_unspecified())
        .collect();
    let is_absent = |error: std::io::Error| error.kind() == std::io::ErrorKind::AddrNotAvailable;
    addresses
        .into_iter()
        .filter(|address| UdpSocket::bind((*address, 0)).is_err_and(is_absent))
        .map(|address| AddressFault::NotHere { address })
        .collect()
}

fn takes_port(socket: &InetSkEntry) -> bool {
    (socket.proto == TCP && socket.state == LISTENS) || socket.proto == UDP
}

/// Local ports in tables of `/proc/net`; of TCP only those that are listened on.
fn taken(tables: &[&str], only_listening: bool) -> BTreeSet<u32> {
    let texts = tables
        .iter()
        .filter_map(|table| std::fs::read_to_string(format!("/proc/net/{table}")).ok());
    let mut ports = BTreeSet::new();
    for text in texts {
        for line in text.lines().skip(1) {
            // `0: 00000000:0016 00000000:0000 0A ...`
            let mut words = line.split_whitespace().skip(1);
            let local = words.next().and_then(|address| address.rsplit_once(':'));
            let state = words
                .nth(1)
                .and_then(|state| u32::from_str_radix(state, 16).ok());
            let port = local.and_then(|(_, port)| u32::from_str_radix(port, 16).ok());
            if let Some(port) = port.filter(|_| !only_listening || state == Some(LISTENS)) {
                ports.insert(port);
            }
        }
    }
    ports
}
