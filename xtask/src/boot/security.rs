//! Policy for security modules, made here from Debian's packages and loaded by the guest.

use std::fs;
use std::process::Command;

use anyhow::{Context, ensure};

use super::apt::{Apt, run};
use super::initramfs::Initramfs;

/// Profiles under which programs are tested.
const PROFILES: &str = include_str!("profiles.apparmor");
/// A policy of SELinux.
const POLICY: &str = include_str!("policy.cil");
/// As all kernels that we boot read it.
const POLICY_VERSION: &str = "33";
/// A suite whose tools and policies go with every kernel that we boot.
const SUITE: &str = "bookworm";

/// Compiles the profiles: one file for each, and for one in a namespace.
pub fn apparmor(image: &mut Initramfs<'_>) -> anyhow::Result<()> {
    let tree = Apt::of(SUITE)?.tree("apparmor")?;
    let rules = tree.join("etc/apparmor.d");
    for (number, profile) in PROFILES.split("\n\n").enumerate() {
        let source = image.directory().join(format!("profile-{number}"));
        fs::write(&source, format!("abi <abi/3.0>,\n{profile}\n"))?;
        let mut parser = Command::new(tree.join("sbin/apparmor_parser"));
        parser.args([
            "--stdout",
            "--skip-kernel-load",
            "--skip-cache",
            "--skip-read-cache",
            "--quiet",
        ]);
        parser.arg("--base").arg(&rules);
        // The kernel of this machine may have none.
        parser.arg("--kernel-features").arg(rules.join("abi/3.0"));
        let output = parser
            .arg(&source)
            .output()
            .context("starting apparmor_parser")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.stdout.is_empty(), "apparmor_parser: {said}");
        image.bytes(&format!("/policy/apparmor/{number}"), output.stdout);
    }
    Ok(())
}

/// Compiles the policy of SELinux.
pub fn selinux(image: &mut Initramfs<'_>) -> anyhow::Result<()> {
    let tree = Apt::of(SUITE)?.tree("secilc")?;
    let [source, binary] = ["policy.cil", "policy"].map(|name| image.directory().join(name));
    fs::write(&source, POLICY)?;
    let mut compiler = Command::new(tree.join("usr/bin/secilc"));
    compiler.args([
        "--mls",
        "true",
        "--policyvers",
        POLICY_VERSION,
        "--filecontext",
        "/dev/null",
    ]);
    run(compiler.arg("--output").arg(&binary).arg(&source))?;
    image.bytes("/policy/selinux", fs::read(binary)?);
    // Without it the library of a peer takes SELinux for turned off.
    image.text("/etc/selinux/config", 0o644, "SELINUX=enforcing\n")
}
