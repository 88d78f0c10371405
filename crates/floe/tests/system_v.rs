//! System V shared memory whose number somebody else has taken. Needs root; says `skipped` without.

use std::path::PathBuf;
use std::process::Command;

use testkit::{Engine, Fixture, skips};

const NEXT: &str = "/proc/sys/kernel/shm_next_id";

/// A segment with a number that is free; removed when dropped.
struct Segment(String);

impl Segment {
    fn make(number: &str) -> Self {
        std::fs::write(NEXT, number).expect("root may choose numbers");
        let output = Command::new("ipcmk").args(["-M", "4096"]).output();
        let output = output.expect("util-linux is installed");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let got = said.rsplit(' ').next().unwrap_or_default().trim();
        let segment = Segment(got.to_string());
        assert_eq!(segment.0, number);
        segment
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let removed = Command::new("ipcrm").args(["-m", &self.0]).status();
        assert!(removed.is_ok_and(|status| status.success()));
    }
}

/// The number of the segment that a task has attached.
fn attached(pid: i32) -> String {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("it runs");
    let line = maps.lines().find(|line| line.contains("/SYSV"));
    let number = line.and_then(|line| line.split_whitespace().nth(4));
    number
        .expect("the inode is the segment's number")
        .to_string()
}

#[test]
fn a_number_that_is_taken_is_refused_and_nothing_stays() {
    let name = "a_number_that_is_taken_is_refused_and_nothing_stays";
    if !rustix::process::geteuid().is_root() || !PathBuf::from(NEXT).exists() {
        skips::skip(name, "needs root").expect("the skip is listed");
        return;
    }
    let floe = Engine::new("floe", env!("CARGO_BIN_EXE_floe"));
    let mut fixture = Fixture::start("memory-system-v").expect("it starts");
    let number = attached(fixture.pid);
    fixture.dump(&floe, &[]).expect("the dump succeeds");
    let taken = Segment::make(&number);
    let outcome = fixture.try_restore(&floe, &[], &[]).expect("floe runs");
    let refused = outcome.ok("restore").expect_err("the number is taken");
    let said = format!("{refused:#}");
    assert!(
        said.contains("ipcrm -m") && said.contains(&number),
        "{said}"
    );
    drop(taken);
    let listed = || std::fs::read_to_string("/proc/sysvipc/shm").expect("always there");
    let before = listed();
    // Killed or failed after the segment was made: it goes again.
    let failed = fixture.try_restore(&floe, &[], &[("FLOE_FAULT", "step:12")]);
    let failed = failed.expect("floe runs").ok("restore");
    assert!(failed.is_err(), "the fault point was not reached");
    let has = |text: &str| {
        text.lines()
            .any(|line| line.split_whitespace().nth(1) == Some(&number))
    };
    assert!(!has(&before));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while has(&listed()) {
        assert!(std::time::Instant::now() < deadline, "the segment stays");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    fixture
        .restore(&floe, &[])
        .expect("the number is free again");
    fixture.check().expect("it goes on");
}
