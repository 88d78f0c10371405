//! Chains of pre-dumps that another engine began, ended or restores. Its own pre-dumps need soft-dirty
//! bits, which not every kernel has.

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use testkit::{Engine, Fixture, skips};

/// Rounds before the last dump.
const ROUNDS: usize = 2;
/// Memory that changes between rounds, is moved, shared with a child, or shared for good.
const PROGRAMS: [&str; 4] = [
    "memory-counted",
    "memory-moved",
    "memory-cow",
    "memory-shared",
];

fn floe() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

/// Who does what with a chain.
struct Way<'a> {
    rounds: (&'a Engine, &'a [&'a str]),
    last: (&'a Engine, &'a [&'a str]),
    restore: &'a Engine,
}

/// A last dump failed, and the program runs on.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

/// One life of a program over a chain; answers the log of the last dump.
fn live(name: &str, way: &Way<'_>) -> anyhow::Result<String> {
    let mut fixture = Fixture::start(name)?;
    let base = tempfile::tempdir_in("/dev/shm")?;
    let tree = fixture.pid.to_string();
    for number in 0..ROUNDS {
        let images = base.path().join(number.to_string());
        fs::create_dir_all(&images)?;
        let (engine, more) = way.rounds;
        let previous = number.checked_sub(1).map(|before| format!("../{before}"));
        let mut options = vec!["--track-mem"];
        options.extend_from_slice(more);
        if let Some(previous) = &previous {
            options.extend(["--prev-images-dir", previous]);
        }
        let words = ["pre-dump", "--tree", &tree];
        let outcome = engine.run(&words, &images, "pre-dump.log", &options, &[])?;
        outcome.ok(&format!("round {number} by {}", engine.name))?;
        fixture.check()?;
    }
    let last = base.path().join("last");
    fixture.set_images(last.clone());
    let previous = format!("../{}", ROUNDS - 1);
    let (engine, more) = way.last;
    // Of a program that forks, only now is known whom there is to reap.
    let mut options = vec![
        "--leave-stopped",
        "--track-mem",
        "--prev-images-dir",
        &previous,
    ];
    options.extend_from_slice(more);
    let outcome = fixture.try_dump(engine, &options, &[])?;
    if !outcome.status.success() {
        fixture.check().context("after a dump that was refused")?;
        return Err(Refused(format!(
            "the last dump by {}: {}",
            engine.name,
            outcome.cause()
        ))
        .into());
    }
    let log = fs::read_to_string(last.join("dump.log"))?;
    fixture.kill()?;
    fixture.restore(way.restore, &[])?;
    fixture.check().context("after the restore")?;
    Ok(log)
}

/// The peer, if there is one and we may use it; whether it makes rounds itself.
fn peer(name: &str) -> Option<(Engine, bool)> {
    if !rustix::process::geteuid().is_root() {
        skips::skip(name, "needs root").expect("the skip is listed");
        return None;
    }
    let Some(peer) = Engine::peer() else {
        skips::skip(name, "no peer: FLOE_PEER_CRIU is not set").expect("the skip is listed");
        return None;
    };
    let asked = std::process::Command::new(&peer.path)
        .args(["check", "--feature", "mem_dirty_track"])
        .output();
    let makes_rounds = asked.is_ok_and(|output| output.status.success());
    Some((peer, makes_rounds))
}

fn each(programs: &[&str], test: impl Fn(&str) -> anyhow::Result<()>) {
    for program in programs {
        test(program).unwrap_or_else(|error| panic!("{program}: {error:#}"));
    }
}

/// The files of a chain are the peer's as well.
#[test]
fn the_peer_restores_our_chain() {
    let Some((peer, _)) = peer("the_peer_restores_our_chain") else {
        return;
    };
    let floe = floe();
    // The peer itself makes no chain of a tree that forks and becomes other programs meanwhile.
    let programs = [PROGRAMS.as_slice(), &["memory-churn-without-system-v"]].concat();
    for tracker in floe.trackers().expect("`floe check` answers") {
        each(&programs, |program| {
            let ours: (&Engine, &[&str]) = (&floe, &["--tracker", tracker]);
            let way = Way {
                rounds: ours,
                last: ours,
                restore: &peer,
            };
            live(program, &way).map(drop)
        });
    }
}

fn makes_rounds(name: &str) -> Option<Engine> {
    match peer(name)? {
        (peer, true) => Some(peer),
        _ => {
            skips::skip(name, "no peer that makes rounds here").expect("the skip is listed");
            None
        }
    }
}

#[test]
fn we_restore_the_peers_chain() {
    let Some(peer) = makes_rounds("we_restore_the_peers_chain") else {
        return;
    };
    let way = Way {
        rounds: (&peer, &[]),
        last: (&peer, &[]),
        restore: &floe(),
    };
    each(&PROGRAMS, |program| live(program, &way).map(drop));
}

/// What was written since the peer's round is not known to us, except by comparing.
#[test]
fn our_dump_on_the_peers_rounds_takes_everything_or_compares() {
    let name = "our_dump_on_the_peers_rounds_takes_everything_or_compares";
    let Some(peer) = makes_rounds(name) else {
        return;
    };
    let floe = floe();
    for tracker in floe.trackers().expect("`floe check` answers") {
        for restore in [&floe, &peer] {
            each(&PROGRAMS, |program| {
                let way = Way {
                    rounds: (&peer, &[]),
                    last: (&floe, &["--tracker", tracker]),
                    restore,
                };
                let log = live(program, &way)?;
                let is_told = log.contains("all memory is copied");
                let tracks = ["uffd", "soft-dirty"].contains(&tracker);
                ensure!(is_told == tracks, "with {tracker}: {log}");
                Ok(())
            });
        }
    }
}

/// The peer takes soft-dirty bits as if it had cleared them itself, and may want pages that our rounds do not
/// have: then it refuses, and the program runs on.
#[test]
fn the_peers_dump_on_our_rounds_is_whole_or_refused() {
    let Some(peer) = makes_rounds("the_peers_dump_on_our_rounds_is_whole_or_refused") else {
        return;
    };
    let floe = floe();
    for restore in [&floe, &peer] {
        let way = Way {
            rounds: (&floe, &["--tracker", "soft-dirty"]),
            last: (&peer, &[]),
            restore,
        };
        each(&PROGRAMS, |program| match live(program, &way) {
            Err(error) if error.is::<Refused>() => {
                println!("{program}: {error:#}");
                Ok(())
            }
            other => other.map(drop),
        });
    }
}

/// The name of a chain's parent is a link that both follow.
#[test]
fn a_chain_that_lost_its_first_round_is_refused_by_both() {
    let Some((peer, _)) = peer("a_chain_that_lost_its_first_round_is_refused_by_both") else {
        return;
    };
    let floe = floe();
    let mut fixture = Fixture::start("memory-cow").expect("the program starts");
    let base = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let result = broken(&mut fixture, base.path(), [&floe, &peer]);
    result.unwrap_or_else(|error| panic!("{error:#}"));
}

fn broken(fixture: &mut Fixture, base: &Path, restorers: [&Engine; 2]) -> anyhow::Result<()> {
    let tree = fixture.pid.to_string();
    let first = base.join("first");
    fs::create_dir(&first)?;
    let words = ["pre-dump", "--tree", &tree];
    let outcome = floe().run(&words, &first, "pre-dump.log", &["--track-mem"], &[])?;
    outcome.ok("the first round")?;
    fixture.set_images(base.join("last"));
    fixture.dump(&floe(), &["--prev-images-dir", "../first"])?;
    fs::remove_dir_all(&first)?;
    for engine in restorers {
        let outcome = fixture.try_restore(engine, &[], &[])?;
        ensure!(!outcome.status.success(), "{} restores half", engine.name);
    }
    Ok(())
}
