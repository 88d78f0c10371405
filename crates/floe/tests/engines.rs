//! Container engines with this binary as their `criu`: a few scenarios of `cargo xtask engines`.

use std::path::Path;
use std::process::Command;

use testkit::skips;

/// One of each kind; all of them are for `cargo xtask engines`.
const SCENARIOS: [&str; 6] = [
    "restore",
    "pre_dump",
    "tcp_established",
    "terminal",
    "pipes",
    "redis",
];

#[test]
fn runc_checkpoints_and_restores_containers() {
    let name = "runc_checkpoints_and_restores_containers";
    let skip = |why| skips::skip(name, why).expect("the skip is listed");
    if !rustix::process::geteuid().is_root() {
        return skip("needs root");
    }
    let found = |program: &str| {
        let places = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
        places
            .iter()
            .any(|place| Path::new(place).join(program).exists())
    };
    if let Some(program) = ["runc", "busybox", "perl"].iter().find(|name| !found(name)) {
        return skip(&format!("{program} is not installed"));
    }
    let output = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--package", "xtask", "--", "engines"])
        .args([
            "--engine",
            "runc-here",
            "--binary",
            env!("CARGO_BIN_EXE_floe"),
        ])
        .args(SCENARIOS)
        .output()
        .expect("cargo runs");
    let printed = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}{errors}");
    assert!(!printed.contains("skipped"), "{printed}");
}
