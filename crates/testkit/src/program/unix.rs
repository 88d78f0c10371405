//! Unix sockets: kinds, names, queues, descriptors in flight.

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};

use anyhow::{Context, ensure};
use rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use super::{Check, Place, Program};

pub const PROGRAMS: &[Program] = &[
    Program::new("unix-stream", stream),
    Program::new("unix-dgram", dgram),
    Program::new("unix-dgram-empty", empty_dgram),
    Program::new("unix-seqpacket", |_| seqpacket([b"one record", b"another"])),
    Program::new("unix-seqpacket-empty", |_| {
        seqpacket([b"one record", b"", b"another", b""])
    }),
    Program::new("unix-listen", listen),
    Program::new("unix-peer-name", peer_name),
    Program::new("unix-deleted", deleted),
    Program::new("unix-rights", rights),
];

/// What waits comes out and goes in again.
fn recycle(from: &mut impl Read, to: &mut impl Write, expected: &[u8]) -> anyhow::Result<()> {
    let mut found = vec![0; expected.len()];
    from.read_exact(&mut found)?;
    ensure!(found == expected, "other bytes than were sent");
    to.write_all(expected)?;
    Ok(())
}

fn stream(_: &Place) -> anyhow::Result<Check> {
    let (mut left, mut right) = UnixStream::pair()?;
    let large: Vec<u8> = (0..100_000_u32).map(|byte| (byte / 7) as u8).collect();
    left.write_all(&large)?;
    right.write_all(b"the other way")?;
    let (mut half, mut closed) = UnixStream::pair()?;
    half.write_all(b"last words")?;
    half.shutdown(std::net::Shutdown::Write)?;
    closed.set_nonblocking(true)?;
    let mut first = true;
    let (mut alone, gone) = UnixStream::pair()?;
    drop(gone);
    Ok(Box::new(move || {
        recycle(&mut right, &mut left, &large)?;
        recycle(&mut left, &mut right, b"the other way")?;
        let mut text = String::new();
        if first {
            closed.read_to_string(&mut text)?;
            ensure!(text == "last words", "before the end: {text:?}");
            first = false;
        }
        ensure!(closed.read(&mut [0])? == 0, "the end is gone");
        ensure!(alone.read(&mut [0])? == 0, "the peer that ended is back");
        Ok(())
    }))
}

fn dgram(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("server");
    let server = UnixDatagram::bind(&path)?;
    let client = UnixDatagram::bind(place.path("client"))?;
    client.connect(&path)?;
    let abstract_name = format!("floe-test-{}", std::process::id());
    let hidden = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&abstract_name)?)?;
    let (left, right) = UnixDatagram::pair()?;
    for socket in [&server, &right, &hidden] {
        socket.set_read_timeout(Some(std::time::Duration::from_secs(10)))?;
    }
    let messages: [&[u8]; 3] = [b"first", b"2", b"third of them"];
    let send = move |client: &UnixDatagram, left: &UnixDatagram| -> anyhow::Result<()> {
        for message in messages {
            client.send(message)?;
            left.send(message)?;
        }
        Ok(())
    };
    send(&client, &left)?;
    Ok(Box::new(move || {
        let mut bytes = [0; 64];
        for message in messages {
            let (length, _) = server.recv_from(&mut bytes)?;
            ensure!(&bytes[..length] == message, "datagram of {length} bytes");
            let length = right.recv(&mut bytes)?;
            ensure!(
                &bytes[..length] == message,
                "datagram of {length} bytes in the pair"
            );
        }
        send(&client, &left)?;
        let address = SocketAddr::from_abstract_name(&abstract_name)?;
        client.send_to_addr(b"to a hidden name", &address)?;
        let (_, from) = hidden.recv_from(&mut bytes)?;
        let name = from.as_pathname().context("the sender has no name")?;
        ensure!(name.ends_with("client"), "from {}", name.display());
        Ok(())
    }))
}

fn seqpacket<const N: usize>(messages: [&'static [u8]; N]) -> anyhow::Result<Check> {
    let (left, right) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let send = move |fd: &OwnedFd| -> anyhow::Result<()> {
        for message in messages {
            rustix::net::send(fd, message, SendFlags::empty())?;
        }
        Ok(())
    };
    send(&left)?;
    Ok(Box::new(move || {
        for message in messages {
            let mut bytes = [0_u8; 64];
            let (_, length) = rustix::net::recv(&right, &mut bytes, RecvFlags::empty())?;
            ensure!(&bytes[..length] == message, "a record of {length} bytes");
        }
        send(&left)
    }))
}

/// Listening by path and by hidden name, and connections that were accepted.
fn listen(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("socket");
    let by_path = UnixListener::bind(&path)?;
    let hidden = format!("floe-listen-{}", std::process::id());
    let by_name = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&hidden)?)?;
    let mut client = UnixStream::connect(&path)?;
    let (mut server, _) = by_path.accept()?;
    server.write_all(b"before")?;
    Ok(Box::new(move || {
        recycle(&mut client, &mut server, b"before")?;
        let mut more = UnixStream::connect(&path).context("connecting by path")?;
        let (mut accepted, _) = by_path.accept()?;
        more.write_all(b"x")?;
        accepted.read_exact(&mut [0])?;
        let owner = sockopt::socket_peercred(&more)?.pid;
        ensure!(owner == rustix::process::getpid(), "{owner:?} listens");
        let address = SocketAddr::from_abstract_name(&hidden)?;
        UnixStream::connect_addr(&address).context("connecting by the hidden name")?;
        by_name.accept()?;
        Ok(())
    }))
}

/// The names at both ends of connections: of listeners with a path, a relative one, a hidden one and one that has
/// gone; of clients that are bound themselves; of an end whose other one has gone.
fn peer_name(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("socket");
    let by_path = UnixListener::bind(&path)?;
    std::env::set_current_dir(&place.directory)?;
    let relative = UnixListener::bind("./relative")?;
    let hidden = format!("floe-accepted-{}", std::process::id());
    let by_name = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&hidden)?)?;
    let gone = UnixListener::bind(place.path("gone"))?;
    let mut ends: Vec<OwnedFd> = Vec::new();
    for (listener, own) in [
        (&by_path, None),
        (&by_path, Some("bound".to_string())),
        (
            &relative,
            Some(format!("\0floe-client-{}", std::process::id())),
        ),
        (&by_name, None),
        (&by_name, Some("also".to_string())),
        (&gone, None),
    ] {
        let client = net::socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
        if let Some(own) = own {
            let address = match own.strip_prefix('\0') {
                Some(name) => SocketAddrUnix::new_abstract_name(name.as_bytes())?,
                None => SocketAddrUnix::new(place.path(&own))?,
            };
            net::bind(&client, &address)?;
        }
        let address: SocketAddrUnix = net::getsockname(listener)?.try_into()?;
        net::connect(&client, &address)?;
        ends.push(client);
        ends.push(listener.accept()?.0.into());
    }
    drop(gone);
    fs::remove_file(place.path("gone"))?;
    let leaving = UnixStream::connect(&path)?;
    ends.push(by_path.accept()?.0.into());
    drop(leaving);
    let names = move || -> anyhow::Result<Vec<String>> {
        let names = ends.iter().flat_map(|end| {
            let own = net::getsockname(end).map(|name| format!("{name:?}"));
            let other = net::getpeername(end).map(|name| format!("{name:?}"));
            [own, other.or_else(|error| Ok(error.to_string()))]
        });
        Ok(names.collect::<Result<_, rustix::io::Errno>>()?)
    };
    let before = names()?;
    Ok(Box::new(move || {
        let now = names()?;
        ensure!(now == before, "{before:?} became {now:?}");
        for listener in [&by_path, &relative, &by_name] {
            let address: SocketAddrUnix = net::getsockname(listener)?.try_into()?;
            let client = net::socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
            net::connect(&client, &address)?;
            listener.accept()?;
        }
        Ok(())
    }))
}

/// A datagram without content is one.
fn empty_dgram(_: &Place) -> anyhow::Result<Check> {
    let (left, right) = UnixDatagram::pair()?;
    right.set_nonblocking(true)?;
    left.send(b"")?;
    left.send(b"x")?;
    Ok(Box::new(move || {
        for expected in [0, 1] {
            let length = right.recv(&mut [0; 8])?;
            ensure!(length == expected, "{length} bytes instead of {expected}");
        }
        left.send(b"")?;
        left.send(b"x")?;
        Ok(())
    }))
}

/// A bound name that was removed; the socket keeps it.
fn deleted(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("removed");
    let listener = UnixListener::bind(&path)?;
    let mut client = UnixStream::connect(&path)?;
    let (mut server, _) = listener.accept()?;
    fs::remove_file(&path)?;
    client.write_all(b"still there")?;
    Ok(Box::new(move || {
        recycle(&mut server, &mut client, b"still there")?;
        ensure!(!path.exists(), "the removed name is back");
        let name = listener.local_addr()?;
        ensure!(
            name.as_pathname() == Some(path.as_path()),
            "bound to {name:?}"
        );
        Ok(())
    }))
}

/// A file and a pipe in flight.
fn rights(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("sent");
    fs::write(&path, "in flight")?;
    let (left, right) = UnixStream::pair()?;
    let file = File::open(&path)?;
    let (pipe, feed) = rustix::pipe::pipe()?;
    rustix::io::write(&feed, b"piped")?;
    send_fds(&left, &[file.as_fd(), pipe.as_fd()])?;
    drop((file, pipe));
    Ok(Box::new(move || {
        let fds = receive_fds(&right)?;
        ensure!(fds.len() == 2, "{} descriptors", fds.len());
        let mut bytes = [0; 64];
        let length = rustix::io::pread(&fds[0], &mut bytes, 0)?;
        ensure!(
            &bytes[..length] == b"in flight",
            "the file has other content"
        );
        let length = rustix::io::read(&fds[1], &mut bytes)?;
        ensure!(&bytes[..length] == b"piped", "the pipe has other content");
        rustix::io::write(&feed, b"piped")?;
        send_fds(&left, &[fds[0].as_fd(), fds[1].as_fd()])
    }))
}

fn send_fds(socket: &UnixStream, fds: &[std::os::fd::BorrowedFd<'_>]) -> anyhow::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    ensure!(
        control.push(SendAncillaryMessage::ScmRights(fds)),
        "no room"
    );
    let data = [IoSlice::new(b"f")];
    rustix::net::sendmsg(socket, &data, &mut control, SendFlags::empty())?;
    Ok(())
}

fn receive_fds(socket: &UnixStream) -> anyhow::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(socket, &mut data, &mut control, RecvFlags::DONTWAIT)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok(fds)
}
