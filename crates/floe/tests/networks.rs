//! Trees with network namespaces of their own. Needs root, iproute2 and util-linux; says `skipped` without.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use testkit::{process, skips};

/// How long a tree may take to stand.
const LIMIT: Duration = Duration::from_secs(20);

/// Ends the script of every tree.
const SLEEP: &str = "
touch $READY
exec </dev/null >/dev/null 2>&1
exec sleep 1000
";

fn is_possible(name: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    let possible = root && Command::new("ip").arg("-V").output().is_ok();
    if !possible {
        skips::skip(name, "needs root").expect("the skip is listed");
    }
    possible
}

fn shell(script: &str) -> anyhow::Result<String> {
    let output = Command::new("sh").args(["-ec", script]).output()?;
    expect_success(&output)?;
    Ok(String::from_utf8(output.stdout)?)
}

fn expect_success(output: &Output) -> anyhow::Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    Ok(())
}

/// A tree in a new network namespace; killed when dropped.
struct Tree {
    directory: tempfile::TempDir,
    pid: i32,
}

impl Tree {
    /// Runs `script` and sleeps.
    fn start(script: &str) -> anyhow::Result<Tree> {
        process::adopt_orphans()?;
        let directory = tempfile::tempdir()?;
        let ready = directory.path().join("ready");
        fs::create_dir(directory.path().join("images"))?;
        let mut child = Command::new("setsid")
            .args(["unshare", "--net", "sh", "-ec", &format!("{script}{SLEEP}")])
            .env("READY", &ready)
            .env("DIR", directory.path())
            .current_dir("/")
            .stdin(Stdio::null())
            .spawn()?;
        let deadline = Instant::now() + LIMIT;
        let pid = i32::try_from(child.id())?;
        let name = || fs::read_to_string(format!("/proc/{pid}/comm"));
        while !ready.exists() || name()?.trim() != "sleep" {
            if let Some(status) = child.try_wait()? {
                bail!("the script ended with {status}");
            }
            ensure!(Instant::now() < deadline, "the tree does not stand");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Tree { directory, pid })
    }

    fn images(&self) -> PathBuf {
        self.directory.path().join("images")
    }

    fn floe(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
        command.args(arguments).arg("-D").arg(self.images());
        Ok(command.output()?)
    }

    /// Without arguments the tree ends.
    fn dump(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let pid = self.pid.to_string();
        let mut all = self.children()?;
        all.push(self.pid);
        expect_success(&self.floe(&[&["dump", "-t", &pid], arguments].concat())?)?;
        if arguments.is_empty() {
            process::wait_for_ends(&all, LIMIT)?;
        }
        Ok(())
    }

    fn restore(&self, arguments: &[&str]) -> anyhow::Result<()> {
        expect_success(&self.floe(&[&["restore", "-d"], arguments].concat())?)
    }

    /// What a script prints in the namespace of a task.
    fn inside(&self, pid: i32, script: &str) -> anyhow::Result<String> {
        shell(&format!("nsenter -t {pid} -n sh -ec '{script}'"))
    }

    fn children(&self) -> anyhow::Result<Vec<i32>> {
        let path = format!("/proc/{0}/task/{0}/children", self.pid);
        let text = fs::read_to_string(path)?;
        let pids = text.split_whitespace().map(str::parse);
        Ok(pids.collect::<Result<_, _>>()?)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let children = self.children().unwrap_or_default();
        for pid in children.into_iter().chain([self.pid]) {
            // It may have ended by itself.
            let _ = Command::new("sh")
                .args(["-c", &format!("kill -9 {pid}")])
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// What makes a network, without what comes and goes by itself.
const LIST: &str = "ip addr | grep -v \"valid_lft\\|inet6 fe80\" | sed \"s/state [A-Z]*//; s/NO-CARRIER,//; s/,LOWER_UP//\"; ip route | sed \"s/ linkdown//\"; ip rule";

#[test]
fn networks_of_a_tree_come_back_with_the_pair_between_them() -> anyhow::Result<()> {
    let name = "networks_of_a_tree_come_back_with_the_pair_between_them";
    if !is_possible(name) {
        return Ok(());
    }
    let tree = Tree::start(
        "ip link set lo up
        unshare --net sh -c 'touch $DIR/child; exec sleep 1001' </dev/null >/dev/null 2>&1 &
        while ! test -e $DIR/child; do sleep 0.01; done
        ip link add here type veth peer name there netns $!
        ip addr add 10.200.1.1/24 dev here; ip link set here up
        ip route add 10.201.0.0/16 via 10.200.1.2; ip rule add from 10.200.1.9 lookup 77
        nsenter -t $! -n ip addr add 10.200.1.2/24 dev there
        nsenter -t $! -n ip link set there up
        echo 1 > /proc/sys/net/ipv4/conf/here/forwarding",
    )?;
    let child = *tree.children()?.first().context("a child")?;
    let before = (tree.inside(tree.pid, LIST)?, tree.inside(child, LIST)?);
    tree.dump(&[])?;
    tree.restore(&[])?;
    let after = (tree.inside(tree.pid, LIST)?, tree.inside(child, LIST)?);
    assert_eq!(after, before);
    let forwarding = "cat /proc/sys/net/ipv4/conf/here/forwarding";
    assert_eq!(tree.inside(tree.pid, forwarding)?, "1\n");
    Ok(())
}

#[test]
fn a_network_is_unlocked_after_every_outcome() -> anyhow::Result<()> {
    let name = "a_network_is_unlocked_after_every_outcome";
    if !is_possible(name) {
        return Ok(());
    }
    if Command::new("nft").arg("-v").output().is_err() {
        return skips::skip(name, "needs root");
    }
    let tree = Tree::start("ip link set lo up")?;
    let rules = || tree.inside(tree.pid, "nft list tables");
    tree.dump(&["--leave-running"])?;
    assert_eq!(rules()?, "");
    let failed = tree.floe(&[
        "dump",
        "-t",
        &tree.pid.to_string(),
        "--action-script",
        "exit 1",
    ])?;
    assert!(!failed.status.success());
    assert_eq!(rules()?, "");
    // Somebody else keeps the namespace, so that the lock of the dump stays until the restore.
    let keeper = fs::File::open(format!("/proc/{}/ns/net", tree.pid))?;
    let kept = format!("/proc/{}/fd/{}", std::process::id(), keeper.as_raw_fd());
    let in_kept = || shell(&format!("nsenter --net={kept} nft list tables"));
    tree.dump(&[])?;
    let locked = in_kept()?;
    assert!(locked.starts_with("table inet CRIU-"), "{locked}");
    tree.restore(&["--join-ns", &format!("net:{kept}")])?;
    assert_eq!(in_kept()?, "");
    let joined = fs::metadata(format!("/proc/{}/ns/net", tree.pid))?;
    assert_eq!(joined.ino(), keeper.metadata()?.ino());
    Ok(())
}

#[test]
fn a_veth_leads_to_a_bridge_outside_of_the_tree() -> anyhow::Result<()> {
    let name = "a_veth_leads_to_a_bridge_outside_of_the_tree";
    if !is_possible(name) {
        return Ok(());
    }
    let mut outside = Command::new("unshare")
        .args(["--net", "sleep", "1000"])
        .spawn()?;
    let done = veth_and_bridge(outside.id());
    outside.kill()?;
    outside.wait()?;
    done
}

fn veth_and_bridge(outside: u32) -> anyhow::Result<()> {
    let name = || fs::read_to_string(format!("/proc/{outside}/comm"));
    while name()?.trim() != "sleep" {
        std::thread::sleep(Duration::from_millis(5));
    }
    let tree = Tree::start(&format!(
        "ip link add eth0 type veth peer name far netns {outside}
        ip addr add 10.200.2.1/24 dev eth0; ip link set eth0 up"
    ))?;
    let before = tree.inside(tree.pid, "ip -o addr show eth0 | grep -v fe80")?;
    tree.dump(&[])?;
    let refused = tree.floe(&["restore", "-d"])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        !refused.status.success() && said.contains("--external veth[eth0]"),
        "{said}"
    );
    let floe = env!("CARGO_BIN_EXE_floe");
    let images = tree.images();
    shell(&format!(
        "nsenter -t {outside} -n ip link add br7 type bridge
        nsenter -t {outside} -n {floe} restore -d -D {} --external 'veth[eth0]:far7@br7'",
        images.display()
    ))?;
    assert_eq!(
        tree.inside(tree.pid, "ip -o addr show eth0 | grep -v fe80")?,
        before
    );
    let far = shell(&format!("nsenter -t {outside} -n ip -o link show far7"))?;
    ensure!(far.contains("master br7") && far.contains("UP"), "{far}");
    Ok(())
}
