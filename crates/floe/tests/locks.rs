//! The engine is killed at every step while it holds the packets of a connection back: nothing stays locked, unless
//! the tree has ended and waits for its restore. Needs root, iptables, nftables and util-linux.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use testkit::{Engine, Fixture, process, skips};

const LIMIT: Duration = Duration::from_secs(10);
/// Steps after which a loop over all of them is taken for endless.
const MOST_STEPS: u32 = 300;

fn floe() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

/// Rules that hold packets back, of both families, and all tables, in our network.
fn locks() -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for (program, arguments) in [
        ("iptables-save", &[][..]),
        ("ip6tables-save", &[]),
        ("nft", &["list", "tables"]),
    ] {
        let output = Command::new(program).args(arguments).output()?;
        ensure!(output.status.success(), "{program}: {output:?}");
        let text = String::from_utf8(output.stdout)?;
        // Also a table of iptables that has no rule any more: there was none before.
        let lines = text.lines().filter(|line| {
            line.contains("DROP") || line.contains("CRIU") || line.contains("table ")
        });
        found.extend(lines.map(str::to_string));
    }
    found.sort();
    Ok(found)
}

/// Waits for the rules to be these: a process that undoes what a killed one has left takes a moment.
fn soon(wanted: &[String]) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let found = locks()?;
        if found == wanted {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{found:?} instead of {wanted:?}");
        std::thread::yield_now();
    }
}

/// Breaks dumps that leave the tree running at every step, then those that end it, with a restore of each of these
/// that succeeds; then a restore at every step.
fn break_all(method: &str) -> anyhow::Result<()> {
    let lock = ["--network-lock", method];
    let mut fixture = Fixture::start("tcp-with-peer")?;
    fixture.check()?;
    for ending in [false, true] {
        let options = [&lock[..], &["--leave-running"]].concat();
        let options = if ending { &lock[..] } else { &options };
        for step in 1.. {
            ensure!(step < MOST_STEPS, "the dump has no last step");
            let broken = || format!("dump by {method}, ending: {ending}, broken at step {step}");
            let pids = fixture.family();
            let fault = format!("step:{step}");
            let outcome = fixture.try_dump(&floe(), options, &[("FLOE_FAULT", &fault)])?;
            if outcome.status.success() {
                break;
            }
            if process::exists(pids[0])
                && process::status_field(pids[0], "State")
                    .is_some_and(|state| !state.starts_with('Z'))
            {
                soon(&[]).with_context(broken)?;
                fixture.check().with_context(broken)?;
                continue;
            }
            process::wait_for_ends(&pids, LIMIT)?;
            ensure!(!locks()?.is_empty(), "{}: its end was heard", broken());
            fixture.restore(&floe(), &lock).with_context(broken)?;
            soon(&[]).with_context(broken)?;
            fixture.check().with_context(broken)?;
        }
    }
    let pids = [fixture.pid];
    break_restores(&mut fixture, &pids, method)
}

/// The tree has ended, and its connection is locked.
fn break_restores(fixture: &mut Fixture, pids: &[i32], method: &str) -> anyhow::Result<()> {
    let dumped = locks()?;
    ensure!(!dumped.is_empty(), "nothing was locked by {method}");
    for step in 1..MOST_STEPS {
        let fault = format!("step:{step}");
        let options = ["--network-lock", method];
        let outcome = fixture.try_restore(&floe(), &options, &[("FLOE_FAULT", &fault)])?;
        let broken = || format!("restore by {method} broken at step {step}");
        if outcome.status.success() {
            soon(&[]).with_context(broken)?;
            return fixture.check().with_context(broken);
        }
        if locks()?.is_empty() {
            // The last steps are those of a tree whose connections go on already.
            return Ok(());
        }
        process::wait_for_ends(pids, LIMIT).with_context(broken)?;
        soon(&dumped).with_context(broken)?;
    }
    bail!("the restore has no last step")
}

/// Set in the copy of a test that runs in a network of its own.
const INSIDE: &str = "FLOE_TEST_IN_NETWORK";

fn in_own_network(name: &str, run: fn() -> anyhow::Result<()>) {
    if !skips::is_root(name) {
        return;
    }
    if std::env::var_os(INSIDE).is_some() {
        let broken = run();
        // A peer whose connection ended without a word waits on.
        let own = i32::try_from(std::process::id()).expect("a pid");
        process::kill_ours(&process::family(own)[1..], LIMIT).expect("peers end");
        return broken.unwrap_or_else(|error| panic!("{error:#}"));
    }
    if !Path::new("/usr/sbin/iptables-save").exists() || !Path::new("/usr/sbin/nft").exists() {
        skips::skip(name, "iptables is not installed").expect("the skip is listed");
        return;
    }
    let own = std::env::current_exe().expect("our own path");
    let own = own.to_str().expect("UTF-8");
    let script = format!("ip link set lo up; exec {own} --exact {name} --nocapture");
    let output = Command::new("unshare")
        .args(["--net", "sh", "-ec", &script])
        .env(INSIDE, "1")
        .output()
        .expect("unshare runs");
    let said =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{}", said.join("\n"));
}

#[test]
fn no_rule_of_iptables_stays_when_the_engine_is_killed() {
    in_own_network(
        "no_rule_of_iptables_stays_when_the_engine_is_killed",
        || break_all("iptables"),
    );
}

#[test]
fn no_table_of_nftables_stays_when_the_engine_is_killed() {
    in_own_network(
        "no_table_of_nftables_stays_when_the_engine_is_killed",
        || break_all("nftables"),
    );
}

#[test]
fn a_restore_that_closes_connections_unlocks_them() {
    in_own_network("a_restore_that_closes_connections_unlocks_them", || {
        for method in ["iptables", "nftables"] {
            let unlocked = locks()?;
            let mut fixture = Fixture::start("tcp-with-peer")?;
            fixture.dump(&floe(), &["--network-lock", method])?;
            ensure!(locks()? != unlocked, "{method}: nothing was locked");
            fixture.restore(&floe(), &["--tcp-close"])?;
            ensure!(locks()? == unlocked, "{method}: {:?} stays", locks()?);
            ensure!(fixture.check().is_err(), "its connection is closed");
            fixture.kill()?;
        }
        Ok(())
    });
}
