//! Container engines with this binary as their `criu`: a part of the scenarios of `cargo xtask engines`, small
//! enough for every change. Engines that cannot be had here are skipped, with the reason.

use std::path::Path;
use std::process::Command;

use testkit::skips;

/// What only the engine of the stable release, or only one of several, tests.
const RUNC: &[&str] = &[
    "restore",
    "leave_running",
    "pre_dump",
    "tcp_established",
    "file_locks",
    "terminal",
    "pipes",
    "user_namespace",
    // The first task of its pid namespace, with threads.
    "redis",
    "nginx",
];
const PODMAN: &[&str] = &[
    "restore",
    "export_zstd",
    "pre_checkpoint_export",
    "tcp_established",
    "volume_named",
    "image",
    "pod",
    "published_port",
    "postgresql",
];
const CRUN: &[&str] = &["restore", "pre_dump", "pipes", "redis"];
const DOCKER: &[&str] = &[
    "restore",
    "leave_running",
    "list_and_remove",
    "network_none",
    "redis",
];
const CONTAINERD: &[&str] = &["task_checkpoint", "container_restore"];
const LIBCRIU: &[&str] = &[
    "questions",
    "dump_and_restore",
    "pre_dump",
    "refusals",
    "service",
    "python",
];

/// Runs scenarios of one engine; all must pass, or the engine must be missing.
fn run(test: &str, engine: &str, scenarios: &[&str]) {
    let skip = |why: &str| skips::skip(test, why).expect("the skip is listed");
    if !rustix::process::geteuid().is_root() {
        return skip("needs root");
    }
    let found = |program: &str| {
        let places = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
        places
            .iter()
            .any(|place| Path::new(place).join(program).exists())
    };
    if let Some(program) = ["busybox", "perl"].iter().find(|name| !found(name)) {
        return skip(&format!("{program} is not installed"));
    }
    let output = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--package", "xtask", "--", "engines"])
        .args(["--engine", engine])
        .args(["--binary", env!("CARGO_BIN_EXE_floe")])
        .args(scenarios)
        .output()
        .expect("cargo runs");
    let printed = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}{errors}");
    let missing = format!("{engine} skipped: ");
    if let Some(why) = printed.lines().find_map(|line| line.strip_prefix(&missing)) {
        return skip(why);
    }
    let ran = printed.lines().filter(|line| line.starts_with(engine));
    assert_eq!(ran.count(), scenarios.len(), "{printed}");
    print!("{printed}");
    for line in printed.lines().filter(|line| line.contains(": skipped: ")) {
        skip(line);
    }
}

#[test]
fn runc_of_the_stable_release() {
    run("runc_of_the_stable_release", "runc-here", RUNC);
}

#[test]
fn podman_of_the_stable_release() {
    run("podman_of_the_stable_release", "podman-here", PODMAN);
}

#[test]
fn crun() {
    run("crun", "crun", CRUN);
}

#[test]
fn podman_with_crun() {
    run("podman_with_crun", "podman-crun", PODMAN);
}

#[test]
fn docker() {
    run("docker", "docker", DOCKER);
}

#[test]
fn containerd() {
    run("containerd", "containerd", CONTAINERD);
}

#[test]
fn callers_of_libcriu() {
    run("callers_of_libcriu", "libcriu", LIBCRIU);
}
