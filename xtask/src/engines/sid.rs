//! A tree of Debian's unstable release, for engines that the stable one does not have.
//!
//! It is made once, in the user's cache; `FLOE_SID` names one that exists already. Scenarios enter it in
//! namespaces of their own, where nothing of it shows outside and only control groups of version 2 are mounted.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

const MIRROR: &str = "http://deb.debian.org/debian";

/// The tree, with `packages` installed.
pub fn tree(packages: &[&str]) -> anyhow::Result<PathBuf> {
    let root = match std::env::var_os("FLOE_SID") {
        Some(root) => PathBuf::from(root),
        None => make()?,
    };
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|package| !has(&root, package))
        .collect();
    if !missing.is_empty() {
        install(&root, &missing)?;
    }
    Ok(root)
}

/// Installs packages, whose scripts want `/proc` and must start no daemon.
fn install(root: &Path, packages: &[&str]) -> anyhow::Result<()> {
    const SCRIPT: &str = r#"
        mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && mount -t tmpfs tmpfs "$1/run" || exit
        printf '#!/bin/sh\nexit 101\n' >"$1/usr/sbin/policy-rc.d" && chmod +x "$1/usr/sbin/policy-rc.d" || exit
        root=$1; shift
        chroot "$root" apt-get update -qq
        exec chroot "$root" apt-get install -qq -y --no-install-recommends "$@"
    "#;
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-c", SCRIPT])
        .arg("sh")
        .arg(root)
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    quietly(&mut command).context("installing packages in the tree of Debian's unstable release")
}

fn has(root: &Path, package: &str) -> bool {
    let list = root.join("var/lib/dpkg/info");
    list.join(format!("{package}.list")).exists()
        || list.join(format!("{package}:amd64.list")).exists()
}

fn make() -> anyhow::Result<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(home);
    let cache = cache
        .context("neither XDG_CACHE_HOME nor HOME is set")?
        .join("floe");
    let root = cache.join("sid");
    if root.exists() {
        return Ok(root);
    }
    std::fs::create_dir_all(&cache)?;
    let unfinished = cache.join("sid.unfinished");
    if unfinished.exists() {
        std::fs::remove_dir_all(&unfinished)?;
    }
    // What it mounts goes with its namespace.
    quietly(
        Command::new("unshare")
            .args(["--mount", "--propagation=private", "debootstrap"])
            .args(["--variant=minbase", "sid"])
            .arg(&unfinished)
            .arg(MIRROR),
    )
    .context("making a tree of Debian's unstable release")?;
    std::fs::rename(&unfinished, &root)?;
    Ok(root)
}

fn quietly(command: &mut Command) -> anyhow::Result<()> {
    let output = command
        .output()
        .with_context(|| format!("starting {:?}", command.get_program()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().unwrap_or_default();
        bail!("{:?}: {}: {last}", command.get_program(), output.status);
    }
    Ok(())
}

/// A shell in the tree, whose arguments are to be added: `directory` is at `inner` there.
pub fn enter(root: &Path, directory: &Path, inner: &Path) -> Command {
    const SCRIPT: &str = r#"
        root=$1 directory=$2 inner=$3; shift 3
        "$directory/busybox" ip link set lo up
        mount --bind "$root" "$root" && cd "$root" || exit 77
        mount -t proc proc proc; mount --rbind /dev dev; mount -t sysfs sysfs sys
        mount -t cgroup2 cgroup2 sys/fs/cgroup
        mount -t tmpfs tmpfs run; mkdir -p "./$inner"; mount --bind "$directory" "./$inner"
        mount -t tmpfs tmpfs tmp
        pivot_root . mnt && cd / && umount -l /mnt && exec /bin/sh "$@"
    "#;
    let mut command = super::alone(SCRIPT);
    command.args([root, directory, inner]);
    command
}
