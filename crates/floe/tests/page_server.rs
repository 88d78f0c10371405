//! Pages sent to a page server: by the command and by requests.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use floe_image::messages::{CriuPageServerInfo, CriuReqType};
use testkit::rpc::{Client, no_options, request};
use testkit::skips::as_root;
use testkit::{Engine, Fixture, skips};

fn floe() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

/// A server of `engine` with pages in `place`, and its port.
fn serve(engine: &Engine, place: &Path, options: &[&str]) -> anyhow::Result<(Child, String)> {
    fs::create_dir_all(place)?;
    // Taken and given back: free for the server, most likely.
    let port = std::net::TcpListener::bind(("127.0.0.1", 0))?
        .local_addr()?
        .port()
        .to_string();
    let child = Command::new(&engine.path)
        .args([
            "page-server",
            "-v4",
            "-o",
            "page-server.log",
            "--port",
            &port,
            "-D",
        ])
        .arg(place)
        .args(options)
        .stdin(Stdio::null())
        .spawn()?;
    let entry = format!(":{:04X} ", port.parse::<u16>()?);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !listens(&entry)? {
        ensure!(Instant::now() < deadline, "the page server does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok((child, port))
}

/// Whether a socket of the kernel's table listens at a port, which is written as there.
fn listens(port: &str) -> anyhow::Result<bool> {
    let table = fs::read_to_string("/proc/net/tcp")?;
    Ok(table
        .lines()
        .any(|line| line.contains(port) && line.contains(" 0A ")))
}

fn gather(local: &Path, remote: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(local)? {
        let entry = entry?;
        let name = entry.file_name();
        ensure!(
            !name.to_string_lossy().starts_with("pages-"),
            "{name:?} was written here"
        );
        fs::copy(entry.path(), remote.join(name))?;
    }
    Ok(())
}

fn ended_well(mut child: Child) -> anyhow::Result<()> {
    let status = child.wait()?;
    ensure!(status.success(), "the page server: {status}");
    Ok(())
}

/// A cycle whose pages go from `dumper` to a server of `receiver`.
fn through(dumper: &Engine, receiver: &Engine) -> anyhow::Result<()> {
    let mut fixture = Fixture::start("memory-private")?;
    let remote = fixture.home().join("remote");
    let (server, port) = serve(receiver, &remote, &[])?;
    let to = ["--page-server", "--address", "127.0.0.1", "--port", &port];
    fixture.dump(dumper, &to)?;
    ended_well(server)?;
    gather(fixture.images(), &remote)?;
    fixture.set_images(remote);
    fixture.restore(&floe(), &[])?;
    fixture.check()
}

#[test]
fn pages_go_to_a_server_and_come_back() {
    as_root("pages_go_to_a_server_and_come_back", || {
        through(&floe(), &floe())
    });
}

#[test]
fn a_peer_speaks_the_same_protocol() {
    as_root("a_peer_speaks_the_same_protocol", || {
        let Some(peer) = Engine::peer() else {
            return skips::skip(
                "a_peer_speaks_the_same_protocol",
                "no peer (FLOE_PEER_CRIU)",
            );
        };
        through(&floe(), &peer).context("floe to criu")?;
        through(&peer, &floe()).context("criu to floe")
    });
}

#[test]
fn a_dump_without_its_server_leaves_the_program_alone() {
    as_root("a_dump_without_its_server_leaves_the_program_alone", || {
        let mut fixture = Fixture::start("memory-private")?;
        let to = ["--page-server", "--address", "127.0.0.1", "--port", "1"];
        let outcome = fixture.try_dump(&floe(), &to, &[])?;
        ensure!(!outcome.status.success());
        ensure!(
            outcome.cause().contains("is it running"),
            "{}",
            outcome.cause()
        );
        fixture.check()
    });
}

#[test]
fn a_server_whose_dump_is_killed_leaves_no_pages() {
    as_root("a_server_whose_dump_is_killed_leaves_no_pages", || {
        let mut fixture = Fixture::start("memory-private")?;
        let mut broken = 0;
        for step in 1.. {
            let remote = fixture.home().join(format!("remote-{step}"));
            let (mut server, port) = serve(&floe(), &remote, &[])?;
            let to = ["--page-server", "--address", "127.0.0.1", "--port", &port];
            let fault = format!("step:{step}");
            let outcome = fixture.try_dump(&floe(), &to, &[("FLOE_FAULT", &fault)])?;
            if !listens(&format!(":{:04X} ", port.parse::<u16>()?))? && !server.wait()?.success() {
                broken += 1;
                let left: Vec<_> = fs::read_dir(&remote)?
                    .flatten()
                    .map(|entry| entry.file_name())
                    .collect();
                ensure!(left == ["page-server.log"], "step {step}: {left:?}");
            }
            let _ = server.kill();
            server.wait()?;
            if outcome.status.success() {
                break;
            }
        }
        ensure!(broken > 1, "the server was reached {broken} times");
        Ok(())
    });
}

#[test]
fn requests_start_servers_that_take_a_dump() {
    as_root("requests_start_servers_that_take_a_dump", || {
        for kind in [CriuReqType::PageServer, CriuReqType::PageServerChld] {
            by_request(kind).with_context(|| format!("{kind:?}"))?;
        }
        Ok(())
    });
}

fn by_request(kind: CriuReqType) -> anyhow::Result<()> {
    let mut fixture = Fixture::start("memory-private")?;
    let remote = fixture.home().join("remote");
    fs::create_dir_all(&remote)?;
    let mut client = Client::start(&floe().path, &remote.join("printed"))?;
    let mut opts = no_options();
    opts.images_dir = Some(remote.display().to_string());
    opts.ps = Some(CriuPageServerInfo::default());
    let mut asked = request(kind, opts);
    asked.keep_open = Some(true);
    let answer = client.call(&asked)?;
    ensure!(answer.success, "{answer:?}");
    let server = answer.ps.context("the server's pid and port")?;
    let port = server.port.context("a port")?.to_string();
    let to = ["--page-server", "--address", "127.0.0.1", "--port", &port];
    fixture.dump(&floe(), &to)?;
    if kind == CriuReqType::PageServerChld {
        let mut wait = request(CriuReqType::WaitPid, no_options());
        wait.pid = server.pid.and_then(|pid| u32::try_from(pid).ok());
        let answer = client.call(&wait)?;
        ensure!(answer.status == Some(0), "{answer:?}");
    } else {
        let proc = format!("/proc/{}", server.pid.context("a pid")?);
        let deadline = Instant::now() + Duration::from_secs(20);
        // Nobody but init reaps it.
        while fs::read_to_string(format!("{proc}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
            ensure!(Instant::now() < deadline, "the page server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    gather(fixture.images(), &remote)?;
    fixture.set_images(remote);
    fixture.restore(&floe(), &[])?;
    fixture.check()
}
