//! What is outside of a tree and supplied again at restore: files, mounts by device, network devices.
//! Needs root, iproute2 and util-linux; says `skipped` without.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use testkit::{process, skips};

/// How long a tree may take to stand.
const LIMIT: Duration = Duration::from_secs(20);

/// Ends the script of every tree.
const SLEEP: &str = "
touch $READY
exec </dev/null >/dev/null 2>&1
exec 10<&-
exec sleep 1000
";

fn run(name: &str, test: fn() -> anyhow::Result<()>) {
    let root = rustix::process::geteuid().is_root();
    if !root || Command::new("ip").arg("-V").output().is_err() {
        skips::skip(name, "needs root").expect("the skip is listed");
        return;
    }
    test().unwrap_or_else(|error| panic!("{error:#}"));
}

fn shell(script: &str) -> anyhow::Result<String> {
    let output = Command::new("sh").args(["-ec", script]).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{script}: {said}");
    Ok(String::from_utf8(output.stdout)?.trim().to_string())
}

/// A process in namespaces of its own; killed when dropped.
struct Tree {
    directory: tempfile::TempDir,
    pid: i32,
}

impl Tree {
    /// Unshares `kinds`, runs `script` with `$DIR` and sleeps.
    fn start(kinds: &[&str], script: &str) -> anyhow::Result<Tree> {
        process::adopt_orphans()?;
        let directory = tempfile::tempdir()?;
        let ready = directory.path().join("ready");
        fs::create_dir(directory.path().join("images"))?;
        let child = Command::new("setsid")
            .arg("unshare")
            .args(kinds)
            .args(["bash", "-ec", &format!("{script}{SLEEP}")])
            .env("READY", &ready)
            .env("DIR", directory.path())
            .current_dir("/")
            .stdin(Stdio::null())
            .spawn()?;
        let pid = i32::try_from(child.id())?;
        let deadline = Instant::now() + LIMIT;
        let name = || fs::read_to_string(format!("/proc/{pid}/comm"));
        while !ready.exists() || name()?.trim() != "sleep" {
            ensure!(Instant::now() < deadline, "the tree does not stand");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Tree { directory, pid })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Floe by way of a shell that opens `given` as descriptor 9 for it.
    fn floe(&self, given: Option<&Path>, words: &[&str]) -> anyhow::Result<Output> {
        let script = "f=$1; shift; [ -z \"$f\" ] || exec 9<\"$f\"; exec \"$0\" \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-c", script, env!("CARGO_BIN_EXE_floe")]);
        command.arg(given.unwrap_or(Path::new(""))).args(words);
        Ok(command.arg("-D").arg(self.path("images")).output()?)
    }

    fn dump(&self, options: &[&str]) -> anyhow::Result<()> {
        let pid = self.pid.to_string();
        let output = self.floe(None, &[&["dump", "-t", &pid], options].concat())?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "dump: {said}");
        process::wait_for_ends(&[self.pid], LIMIT)
    }

    fn restore(&self, given: Option<&Path>, options: &[&str]) -> anyhow::Result<()> {
        let output = self.floe(given, &[&["restore", "-d"], options].concat())?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "restore: {said}");
        Ok(())
    }

    /// A restore that names what is not supplied, and leaves nothing.
    fn refused(&self, options: &[&str], expected: &str) -> anyhow::Result<()> {
        let output = self.floe(None, &[&["restore", "-d"], options].concat())?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(3), "{}: {said}", output.status);
        ensure!(said.contains(expected), "{said}");
        ensure!(!process::exists(self.pid), "the task is there");
        Ok(())
    }

    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid))
    }

    fn in_network(&self, script: &str) -> anyhow::Result<String> {
        shell(&format!("nsenter -t {} -n {script}", self.pid))
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = process::kill_ours(&[self.pid], LIMIT);
    }
}

#[test]
fn an_external_file_is_taken_from_the_caller() {
    run("an_external_file_is_taken_from_the_caller", || {
        let tree = Tree::start(&[], "echo one > $DIR/one; exec 5<$DIR/one")?;
        let info = fs::read_to_string(tree.proc("fdinfo/5"))?;
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        let mount: u64 = mount.context("a mount")?.trim().parse()?;
        let inode = fs::metadata(tree.path("one"))?.ino();
        let key = format!("file[{mount:x}:{inode:x}]");
        tree.dump(&["--external", &key])?;
        tree.refused(&[], "--inherit-fd")?;
        let other = tree.path("two");
        fs::write(&other, "two")?;
        let given = format!("fd[9]:{key}");
        tree.restore(Some(&other), &["--inherit-fd", &given])?;
        ensure!(fs::read_link(tree.proc("fd/5"))? == other);
        Ok(())
    });
}

#[test]
fn a_network_namespace_is_taken_from_the_caller() {
    run("a_network_namespace_is_taken_from_the_caller", || {
        let tree = Tree::start(&["-n"], ":")?;
        let inode = fs::metadata(tree.proc("ns/net"))?.ino();
        tree.dump(&["--external", &format!("net[{inode}]:pod")])?;
        tree.refused(&[], "pod")?;
        let own = Path::new("/proc/self/ns/net");
        tree.restore(Some(own), &["--inherit-fd", "fd[9]:pod"])?;
        ensure!(fs::metadata(tree.proc("ns/net"))?.ino() == fs::metadata(own)?.ino());
        Ok(())
    });
}

#[test]
fn a_time_namespace_is_joined() {
    run("a_time_namespace_is_joined", || {
        let other = Tree::start(&["-T", "--monotonic", "100000"], ":")?;
        for kinds in [&["-T"][..], &[]] {
            let tree = Tree::start(kinds, ":")?;
            tree.dump(&[])?;
            let given = format!("time:{}", other.pid);
            tree.restore(None, &["--join-ns", &given])?;
            let clocks = |tree: &Tree| fs::read_link(tree.proc("ns/time"));
            ensure!(clocks(&tree)? == clocks(&other)?, "{kinds:?}");
        }
        Ok(())
    });
}

#[test]
fn a_mount_is_made_from_the_device_that_is_named() {
    run("a_mount_is_made_from_the_device_that_is_named", || {
        let script = "mkdir $DIR/m; mount -t bpf nodev $DIR/m";
        let tree = Tree::start(&["-m"], script)?;
        let number = || -> anyhow::Result<String> {
            let mounts = fs::read_to_string(tree.proc("mountinfo"))?;
            let point = format!(" {} ", tree.path("m").display());
            let line = mounts.lines().find(|line| line.contains(&point));
            Ok(line.context("the mount")?.to_string())
        };
        let line = number()?;
        let device = line
            .split(' ')
            .nth(2)
            .context("a number")?
            .replace(':', "/");
        let around = ["--external", "mnt[]:ms"];
        let external = format!("dev[{device}]:disk");
        tree.dump(&[&around[..], &["--external", &external]].concat())?;
        tree.restore(
            None,
            &[&around[..], &["--external", "dev[disk]:/dev/other"]].concat(),
        )?;
        ensure!(number()?.contains("bpf /dev/other"), "{}", number()?);
        Ok(())
    });
}

#[test]
fn a_network_device_moves_in() {
    run("a_network_device_moves_in", || {
        let make = "ip link add d0 type ifb";
        let probe = shell("ip link add floe-probe type ifb && ip link del floe-probe");
        if probe.is_err() {
            return skips::skip("a_network_device_moves_in", "no device to move");
        }
        let script = format!("{make}; ip link set d0 up; ip addr add 10.9.7.1/24 dev d0");
        let tree = Tree::start(&["-n"], &script)?;
        tree.dump(&["--external", "netdev[d0]:d0"])?;
        let name = format!("fl{}", tree.pid);
        let given = format!("netdev[d0]:{name}");
        tree.refused(&["--external", &given], "make it before the restore")?;
        shell(&format!("ip link add {name} type ifb"))?;
        let restored = tree.restore(None, &["--external", &given]);
        let left = shell(&format!("ip link del {name} 2>&1 || true"))?;
        restored?;
        ensure!(left.contains("Cannot find"), "it did not move: {left}");
        let shown = tree.in_network("ip -br address show d0")?;
        ensure!(shown.contains("10.9.7.1/24"), "{shown}");
        Ok(())
    });
}

#[test]
fn a_pair_of_devices_is_made_anew() {
    run("a_pair_of_devices_is_made_anew", || {
        let script = "ip link add vin type veth peer name vout
            ip link set vout netns $PPID; ip link set vin up; ip addr add 10.9.8.1/24 dev vin";
        let name = format!("fv{}", std::process::id());
        let script = script.replace("vout", &name);
        let tree = Tree::start(&["-n"], &script)?;
        tree.dump(&[])?;
        tree.refused(&[], "--external veth[vin]:NAME")?;
        let pair = format!("vin={name}");
        tree.restore(None, &["--veth-pair", &pair])?;
        let shown = tree.in_network("ip -br address show vin")?;
        let removed = shell(&format!("ip link del {name}"));
        ensure!(shown.contains("10.9.8.1/24"), "{shown}");
        removed.map(drop)
    });
}

#[test]
fn files_in_memory_are_left_alone_by_a_refused_dump() {
    run("files_in_memory_are_left_alone_by_a_refused_dump", || {
        let script = "mkdir $DIR/m; mount -t tmpfs nodev $DIR/m; echo in > $DIR/m/file
            mkdir $DIR/m/odd; mount -t bpf nodev $DIR/m/odd";
        let tree = Tree::start(&["-m"], script)?;
        let refused = tree.dump(&["--external", "mnt[]:ms"]);
        let said = format!("{:#}", refused.err().context("bpf cannot be saved")?);
        ensure!(said.contains("m/odd"), "{said}");
        for image in fs::read_dir(tree.path("images"))? {
            let name = image?.file_name();
            ensure!(!name.to_string_lossy().starts_with("tmpfs-dev"), "{name:?}");
        }
        Ok(())
    });
}
