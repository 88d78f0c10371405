//! TCP and UDP on loopback.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::net::sockopt;

use super::{Check, Missing, Place, Program, fact, unchanged};

pub const PROGRAMS: &[Program] = &[
    Program::new("tcp-listen", tcp_listen),
    Program::new("tcp-established", tcp_established).with(&["--tcp-established"]),
    Program::new("tcp-queued", tcp_queued).with(&["--tcp-established"]),
    Program::new("tcp-half-closed", tcp_half_closed).with(&["--tcp-established"]),
    Program::new("tcp6-established", tcp6_established).with(&["--tcp-established"]),
    Program::new("udp", udp),
    Program::new("inet-options", rare_options),
];

/// A connection to a program that is not in the tree, and that program.
pub const WITH_PEER: &[Program] = &[
    Program::new("tcp-with-peer", tcp_with_peer).with(&["--tcp-established"]),
    Program::new("tcp-peer", tcp_peer),
];

const LIMIT: Option<Duration> = Some(Duration::from_secs(10));

fn pair(address: impl Into<SocketAddr>) -> anyhow::Result<(TcpListener, TcpStream, TcpStream)> {
    let listener = TcpListener::bind(address.into())?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    for stream in [&client, &server] {
        stream.set_read_timeout(LIMIT)?;
        stream.set_nodelay(true)?;
    }
    Ok((listener, client, server))
}

fn say(from: &mut TcpStream, to: &mut TcpStream, text: &[u8]) -> anyhow::Result<()> {
    from.write_all(text)?;
    let mut found = vec![0; text.len()];
    to.read_exact(&mut found)?;
    ensure!(found == text, "other bytes than were sent");
    Ok(())
}

/// Options that programs set, as the kernel has them.
fn options(socket: &impl std::os::fd::AsFd) -> anyhow::Result<Vec<(String, String)>> {
    Ok(vec![
        fact("reuse address", sockopt::socket_reuseaddr(socket)?),
        fact("keepalive", sockopt::socket_keepalive(socket)?),
        fact("send buffer", sockopt::socket_send_buffer_size(socket)?),
        fact("receive buffer", sockopt::socket_recv_buffer_size(socket)?),
        fact("no delay", sockopt::tcp_nodelay(socket)?),
        fact("idle", format!("{:?}", sockopt::tcp_keepidle(socket)?)),
        fact("linger", format!("{:?}", sockopt::socket_linger(socket)?)),
    ])
}

fn tcp_listen(_: &Place) -> anyhow::Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    sockopt::set_socket_keepalive(&listener, true)?;
    sockopt::set_tcp_keepidle(&listener, Duration::from_secs(99))?;
    let address = listener.local_addr()?;
    let copy = listener.try_clone()?;
    let mut same = unchanged(move || options(&copy))?;
    Ok(Box::new(move || {
        same()?;
        ensure!(listener.local_addr()? == address, "another address");
        let mut client = TcpStream::connect(address).context("connecting")?;
        let (mut server, _) = listener.accept()?;
        say(&mut client, &mut server, b"hello")
    }))
}

fn established(address: impl Into<SocketAddr>) -> anyhow::Result<Check> {
    let (listener, mut client, mut server) = pair(address)?;
    sockopt::set_socket_keepalive(&client, true)?;
    sockopt::set_tcp_keepidle(&client, Duration::from_secs(33))?;
    say(&mut client, &mut server, b"before")?;
    say(&mut server, &mut client, b"before as well")?;
    let names = (client.local_addr()?, client.peer_addr()?);
    let copy = client.try_clone()?;
    // The sizes of buffers are the kernel's to tune while data flows.
    let mut same = unchanged(move || {
        let mut facts = options(&copy)?;
        facts.retain(|(name, _)| !name.ends_with("buffer"));
        Ok(facts)
    })?;
    Ok(Box::new(move || {
        same()?;
        let now = (client.local_addr()?, client.peer_addr()?);
        ensure!(now == names, "{now:?} instead of {names:?}");
        say(&mut client, &mut server, b"from the client")?;
        say(&mut server, &mut client, &[7; 300_000][..100_000])?;
        ensure!(listener.local_addr()? == names.1, "the listener moved");
        Ok(())
    }))
}

fn tcp_established(_: &Place) -> anyhow::Result<Check> {
    established((Ipv4Addr::LOCALHOST, 0))
}

fn tcp6_established(_: &Place) -> anyhow::Result<Check> {
    TcpListener::bind((Ipv6Addr::LOCALHOST, 0))
        .map_err(|error| Missing(format!("no IPv6 on loopback: {error}")))?;
    established((Ipv6Addr::LOCALHOST, 0))
}

fn tcp_with_peer(_: &Place) -> anyhow::Result<Check> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?.to_string();
    // An orphan, that is, nobody's of the tree.
    let peer = Command::new("sh")
        .args(["-c", "\"$0\" tcp-peer \"$1\" </dev/null >/dev/null 2>&1 &"])
        .arg(std::env::current_exe()?)
        .arg(address)
        .status()?;
    ensure!(peer.success(), "the peer does not start");
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(LIMIT)?;
    Ok(Box::new(move || {
        stream.write_all(b"hello")?;
        let mut found = [0; 5];
        stream.read_exact(&mut found).context("the peer's answer")?;
        ensure!(&found == b"hello", "other bytes than were sent");
        Ok(())
    }))
}

/// Says what it hears, until the other end, whose address stands for the directory, closes.
fn tcp_peer(place: &Place) -> anyhow::Result<Check> {
    let address = place.directory.to_str().context("an address")?;
    let mut stream = TcpStream::connect(address)?;
    let mut back = stream.try_clone()?;
    std::io::copy(&mut stream, &mut back)?;
    std::process::exit(0);
}

/// Data that was sent and not read, both ways.
fn tcp_queued(_: &Place) -> anyhow::Result<Check> {
    let (_listener, mut client, mut server) = pair((Ipv4Addr::LOCALHOST, 0))?;
    let forth: Vec<u8> = (0..60_000_u32).map(|byte| (byte / 3) as u8).collect();
    let back: Vec<u8> = (0..90_000_u32).map(|byte| (byte / 5) as u8).collect();
    client.write_all(&forth)?;
    server.write_all(&back)?;
    Ok(Box::new(move || {
        let mut found = vec![0; forth.len()];
        server
            .read_exact(&mut found)
            .context("reading what waits for the server")?;
        ensure!(found == forth, "the server reads other bytes");
        let mut found = vec![0; back.len()];
        client
            .read_exact(&mut found)
            .context("reading what waits for the client")?;
        ensure!(found == back, "the client reads other bytes");
        client.write_all(&forth)?;
        server.write_all(&back)?;
        Ok(())
    }))
}

/// One direction is closed, the other goes on.
fn tcp_half_closed(_: &Place) -> anyhow::Result<Check> {
    let (_listener, mut client, mut server) = pair((Ipv4Addr::LOCALHOST, 0))?;
    client.shutdown(Shutdown::Write)?;
    ensure!(server.read(&mut [0])? == 0, "no end of the stream");
    Ok(Box::new(move || {
        ensure!(server.read(&mut [0])? == 0, "the end of the stream is gone");
        say(&mut server, &mut client, b"the other way")
    }))
}

/// Options that few programs set.
fn rare_options(_: &Place) -> anyhow::Result<Check> {
    let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0))?;
    sockopt::set_tcp_user_timeout(&listener, 7777)?;
    // Every kernel has it, and few have it for their default.
    sockopt::set_tcp_congestion(&listener, "reno")?;
    sockopt::set_ipv6_unicast_hops(&listener, Some(9))?;
    let datagrams = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    datagrams.set_multicast_ttl_v4(9)?;
    datagrams.set_multicast_loop_v4(false)?;
    sockopt::set_ip_recvtos(&datagrams, true)?;
    unchanged(move || {
        Ok(vec![
            fact("user time-out", sockopt::tcp_user_timeout(&listener)?),
            fact("congestion control", sockopt::tcp_congestion(&listener)?),
            fact("hops", sockopt::ipv6_unicast_hops(&listener)?),
            fact("multicast hops", datagrams.multicast_ttl_v4()?),
            fact("multicast loop", datagrams.multicast_loop_v4()?),
            fact("type of service", sockopt::ip_recvtos(&datagrams)?),
        ])
    })
}

fn udp(_: &Place) -> anyhow::Result<Check> {
    let bound = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let connected = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    connected.connect(bound.local_addr()?)?;
    connected.set_broadcast(true)?;
    connected.set_ttl(33)?;
    let names = (bound.local_addr()?, connected.local_addr()?);
    let unbound = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let port = unbound.local_addr()?;
    bound.set_read_timeout(LIMIT)?;
    Ok(Box::new(move || {
        ensure!(
            (bound.local_addr()?, connected.local_addr()?) == names,
            "other addresses"
        );
        ensure!(unbound.local_addr()? == port, "another port");
        ensure!(
            connected.broadcast()? && connected.ttl()? == 33,
            "other options"
        );
        connected.send(b"datagram")?;
        let mut bytes = [0; 64];
        let (length, from) = bound.recv_from(&mut bytes)?;
        ensure!(
            &bytes[..length] == b"datagram" && from == names.1,
            "from {from}"
        );
        Ok(())
    }))
}
