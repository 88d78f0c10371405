//! Every program of testkit through a dump and a restore by this binary.

use testkit::{Engine, Fixture, program, skips};

fn floe() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

/// Whether the machine lets us try at all.
#[test]
fn programs_go_on_as_they_were() {
    if !skips::is_root("programs_go_on_as_they_were") {
        return;
    }
    let mut wrong = Vec::new();
    let only = std::env::var("FLOE_PROGRAM").ok();
    for program in program::programs() {
        if only
            .as_ref()
            .is_some_and(|only| !program.name.contains(only.as_str()))
        {
            continue;
        }
        let result = Fixture::cycle(program.name, &floe(), &floe());
        if let Err(error) = skips::or_skip(program.name, result) {
            wrong.push(format!("{}: {error:#}", program.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn programs_in_own_mount_namespaces_go_on() {
    if !skips::is_root("programs_in_own_mount_namespaces_go_on") {
        return;
    }
    let mut wrong = Vec::new();
    for program in program::in_own_mounts() {
        let result = Fixture::cycle(program.name, &floe(), &floe());
        if let Err(error) = skips::or_skip(program.name, result) {
            wrong.push(format!("{}: {error:#}", program.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn programs_run_on_after_a_dump_that_leaves_them() {
    if !skips::is_root("programs_run_on_after_a_dump_that_leaves_them") {
        return;
    }
    let names = [
        "threads",
        "tree",
        "blocked",
        "signals-pending",
        "pipes",
        "posix-queues",
    ];
    for name in names {
        let mut fixture = Fixture::start(name).expect("the program starts");
        for _ in 0..2 {
            let dumped = fixture.dump(&floe(), &["--leave-running"]);
            dumped.expect("the dump succeeds");
            fixture.check().expect("the program runs on");
        }
    }
}

#[test]
fn waits_go_on_after_rounds_and_a_restore() {
    if !skips::is_root("waits_go_on_after_rounds_and_a_restore") {
        return;
    }
    for name in ["blocked", "sleeping"] {
        let mut fixture = Fixture::start(name).expect("the program starts");
        // A round that interrupts a wait changes what the next one finds.
        fixture.dump(&floe(), &["--iterate=2"]).expect(name);
        fixture.restore(&floe(), &[]).expect(name);
        fixture.check().expect(name);
        fixture.kill().expect("ours");
    }
}

/// The dump of a program names what is in its way, and the program runs on.
fn is_refused(test: &str, program: &str, named: &str) {
    if !skips::is_root(test) {
        return;
    }
    let refused = || {
        let mut fixture = Fixture::start(program)?;
        let refused = fixture.try_dump(&floe(), &[], &[])?;
        anyhow::ensure!(!refused.status.success(), "the dump succeeds");
        let cause = refused.cause();
        anyhow::ensure!(cause.contains(named), "{cause}");
        fixture.check()
    };
    skips::or_skip(program, refused()).unwrap_or_else(|error| panic!("{error:#}"));
}

#[test]
fn a_bpf_map_of_another_type_is_refused_by_name() {
    let test = "a_bpf_map_of_another_type_is_refused_by_name";
    is_refused(test, "bpf-map-lru", "\"floe_hash\" of type lru_hash");
}

#[test]
fn a_mount_with_mapped_ids_is_refused_by_name() {
    let test = "a_mount_with_mapped_ids_is_refused_by_name";
    is_refused(test, "mount-of-mapped-ids", "with mapped ids");
}

#[test]
fn a_notification_by_a_thread_is_refused_by_name() {
    let test = "a_notification_by_a_thread_is_refused_by_name";
    let named = "the notification of queue /thread by a thread";
    is_refused(test, "posix-queue-by-thread", named);
}

#[test]
fn images_are_read_by_the_peer_and_the_peers_by_us() {
    let name = "images_are_read_by_the_peer_and_the_peers_by_us";
    if !skips::is_root(name) {
        return;
    }
    let Some(peer) = Engine::peer() else {
        skips::skip(name, "no peer: FLOE_PEER_CRIU is not set").expect("the skip is listed");
        return;
    };
    let mut wrong = Vec::new();
    for program in program::programs() {
        // What the peer cannot do with itself here is no measure for us.
        if Fixture::cycle(program.name, &peer, &peer).is_err() {
            continue;
        }
        for (dumper, restorer) in [(&floe(), &peer), (&peer, &floe())] {
            if let Err(error) = Fixture::cycle(program.name, dumper, restorer) {
                let way = format!("{}->{}", dumper.name, restorer.name);
                wrong.push(format!("{way} {}: {error:#}", program.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
