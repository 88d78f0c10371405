//! Connections that a helper of the kernel expects, as FTP's second ones. Needs root and a kernel that tracks
//! FTP; says `skipped` without.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use floe_kernel::ids::HostPid;
use floe_kernel::namespace::{Namespace, NsKind, enter};
use floe_kernel::netlink::{NLM_F_CREATE, NetlinkSocket, attribute, attributes, messages, nested};
use testkit::{process, skips};

const LIMIT: Duration = Duration::from_secs(20);

/// netlink(7).
const NETLINK_NETFILTER: i32 = 12;
/// `IPCTNL_MSG_CT_NEW` and `IPCTNL_MSG_EXP_NEW` with their subsystems.
const CONNECTION: u16 = 1 << 8;
const EXPECTATION: u16 = 2 << 8;
/// `struct nfgenmsg` of IPv4.
const HEADER: [u8; 4] = [2, 0, 0, 0];

type End = ([u8; 4], u16);

const CLIENT: End = ([10, 0, 0, 1], 1000);
const SERVER: End = ([10, 0, 0, 2], 21);

/// `CTA_TUPLE_*` of TCP.
fn tuple(body: &mut Vec<u8>, kind: u16, (from, to): (End, End)) {
    nested(body, kind, |tuple| {
        nested(tuple, 1, |ip| {
            attribute(ip, 1, &from.0);
            attribute(ip, 2, &to.0);
        });
        nested(tuple, 2, |protocol| {
            attribute(protocol, 1, &[6]);
            attribute(protocol, 2, &from.1.to_be_bytes());
            attribute(protocol, 3, &to.1.to_be_bytes());
        });
    });
}

/// An established connection that the helper watches.
fn connection() -> Vec<u8> {
    const SEEN_ASSURED_CONFIRMED: u32 = 2 | 4 | 8;
    let mut body = HEADER.to_vec();
    tuple(&mut body, 1, (CLIENT, SERVER));
    tuple(&mut body, 2, (SERVER, CLIENT));
    attribute(&mut body, 3, &SEEN_ASSURED_CONFIRMED.to_be_bytes());
    nested(&mut body, 4, |info| {
        nested(info, 1, |tcp| attribute(tcp, 1, &[3]))
    });
    nested(&mut body, 5, |help| attribute(help, 1, b"ftp\0"));
    attribute(&mut body, 7, &3000u32.to_be_bytes());
    body
}

/// The server may connect from any port to one of the client's.
fn expectation() -> Vec<u8> {
    let mut body = HEADER.to_vec();
    tuple(&mut body, 1, (CLIENT, SERVER));
    tuple(&mut body, 2, ((SERVER.0, 0), (CLIENT.0, 5000)));
    tuple(&mut body, 3, (([255; 4], 0), ([255; 4], 0xffff)));
    attribute(&mut body, 4, &900u32.to_be_bytes());
    attribute(&mut body, 8, &1u32.to_be_bytes());
    body
}

/// Does something in the network of a task.
fn inside<T: Send + 'static>(
    pid: i32,
    work: impl FnOnce(NetlinkSocket) -> std::io::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let thread = std::thread::spawn(move || {
        enter(&Namespace::of_task(HostPid(pid), NsKind::Net)?)?;
        work(NetlinkSocket::open(NETLINK_NETFILTER)?)
    });
    Ok(thread.join().expect("no panic")?)
}

/// An attribute.
type Attribute = (u16, Vec<u8>);

/// What is expected: its attributes but for the number and the time that is left.
fn expected(pid: i32) -> anyhow::Result<Vec<Vec<Attribute>>> {
    const CHANGING: [u16; 2] = [4, 5];
    let raw = inside(pid, |socket| socket.dump_raw(EXPECTATION + 1, &HEADER))?;
    let mut all = Vec::new();
    for message in messages(&raw) {
        let body = message?.body;
        let found = attributes(&body[HEADER.len()..]);
        let found = found.filter(|(kind, _)| !CHANGING.contains(kind));
        all.push(found.map(|(kind, value)| (kind, value.to_vec())).collect());
    }
    Ok(all)
}

fn floe(arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(env!("CARGO_BIN_EXE_floe"))
        .args(arguments)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{arguments:?}: {said}");
    Ok(())
}

#[test]
fn expected_connections_come_back() {
    let name = "expected_connections_come_back";
    skips::as_root(name, || {
        process::adopt_orphans()?;
        let images = tempfile::tempdir()?;
        let directory = images.path().to_str().context("UTF-8")?;
        let child = Command::new("setsid")
            .args(["unshare", "--net", "sleep", "1000"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let pid = i32::try_from(child.id())?;
        let started = std::time::Instant::now();
        while std::fs::read_to_string(format!("/proc/{pid}/comm"))?.trim() != "sleep" {
            ensure!(started.elapsed() < LIMIT, "the tree does not stand");
            std::thread::sleep(Duration::from_millis(5));
        }
        let made = inside(pid, |socket| {
            socket.request(CONNECTION, NLM_F_CREATE, &connection())?;
            socket.request(EXPECTATION, NLM_F_CREATE, &expectation())
        });
        if made.is_err() {
            process::kill_ours(&[pid], LIMIT)?;
            return skips::skip(name, "no helper for FTP in this kernel");
        }
        let before = expected(pid)?;
        ensure!(before.len() == 1, "{before:?}");
        floe(&["dump", "-t", &pid.to_string(), "-D", directory])?;
        process::wait_for_ends(&[pid], LIMIT)?;
        floe(&["restore", "-d", "-D", directory])?;
        let after = expected(pid);
        process::kill_ours(&[pid], LIMIT)?;
        ensure!(before == after?, "{before:?}");
        Ok(())
    });
}
