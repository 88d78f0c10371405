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

/// What users set in a network and programs list: a script that sets it up, one that lists it.
const CONTENTS: [(&str, &str, &str); 8] = [
    (
        "bridge",
        "ip link add br0 type bridge ageing_time 1234 priority 99 mcast_snooping 0 group_fwd_mask 8
        ip link add v0 type veth peer name v1
        ip link set v0 master br0; ip link set v0 up; ip link set v1 up; ip link set br0 up
        ip link set v0 type bridge_slave cost 7 hairpin on learning off
        bridge fdb add 02:00:00:00:00:01 dev v0 master static",
        "ip -d link | grep -o \"ageing_time [0-9]*\\|priority [0-9]*\\|mcast_snooping [0-9]\\|group_fwd_mask [0-9x]*\\|cost [0-9]* hairpin.*learning o[nf]*\"; bridge fdb | grep static",
    ),
    (
        "device",
        "ip link add v0 numtxqueues 4 numrxqueues 4 type veth peer name v1
        ip link set v0 txqueuelen 77 alias hello promisc on allmulticast on group 5 up
        ip link property add dev v0 altname a-much-longer-name-than-others
        ip link set v1 arp off mtu 1400 address 02:11:22:33:44:55 addrgenmode none
        ip link add m0 link v0 type macvlan mode private; ip link set m0 up; ip link add i0 type ifb",
        "ip -d -o link | sed \"s/state [A-Z]*//; s/NO-CARRIER,//; s/,LOWER_UP//; s/,M-DOWN//\"",
    ),
    (
        "tun",
        "ip tuntap add t0 mode tun user 1000; ip addr add 10.4.0.1/24 dev t0; ip link set t0 up
        ip tuntap add t1 mode tap multi_queue; ip link add br0 type bridge
        ip link set t1 master br0; ip link set br0 up; ip link set t1 up",
        "ip -d tuntap; ip -o addr; ip -br link",
    ),
    (
        "addresses",
        "ip link set lo up; ip addr del 127.0.0.1/8 dev lo
        ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up
        ip addr add 10.0.0.1/24 dev v0; ip addr add 10.0.0.2/24 dev v0
        ip addr add 10.0.0.3/24 dev v0 label v0:1; ip addr add 10.9.0.1 peer 10.9.0.2 dev v0
        ip addr add 10.8.0.1/24 dev v0 scope link; ip addr add fd00::1/64 dev v0 nodad
        ip addr add 10.7.0.1/24 dev v0 valid_lft 3000 preferred_lft 2000
        ip addr add fd00::2/64 dev v0 preferred_lft 0; ip addr add fd02::1 peer fd02::2 dev v0 nodad
        ip addr add fd01::3/64 dev v0 valid_lft 3000 preferred_lft 1000 nodad",
        "ip addr | sed \"s/lft [0-9]*sec/lft N/g; s/ tentative//; s/state [A-Z]*//\" | grep \"inet\\|lft\"",
    ),
    (
        "routes",
        "ip link set lo up; ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up
        ip addr add 10.0.0.1/24 dev v0; ip addr add 10.0.1.1/24 dev v1; ip addr add fd00::1/64 dev v0 nodad
        ip route add default via 10.0.0.2 metric 100; ip route add default via 10.0.1.2 metric 200 src 10.0.1.1
        ip route add 10.5.0.0/16 nexthop via 10.0.0.2 weight 1 nexthop via 10.0.1.2 weight 5
        ip route add blackhole 10.6.0.0/16; ip route add throw 10.9.0.0/16 table 9
        ip route add 10.10.0.0/16 dev v0 mtu lock 1300 initcwnd 20 table 100000 proto 99 scope link
        ip route add 10.11.0.0/16 via 10.12.0.1 dev v0 onlink; ip route add local 10.13.0.1 dev lo
        ip -6 route add default via fd00::2 metric 50; ip -6 route add unreachable fd07::/64 table 5
        ip -6 route add fd0a::/64 dev v0 expires 3000
        ip nexthop add id 1 via 10.0.0.2 dev v0; ip nexthop add id 2 via 10.0.0.3 dev v0
        ip nexthop add id 10 group 1/2,3; ip route add 10.25.0.0/16 nhid 1; ip route add 10.26.0.0/16 nhid 10",
        "ip -4 route show table all | sort; ip -6 route show table all | grep -v fe80 | sed \"s/expires [0-9]*/expires N/\" | sort; ip nexthop",
    ),
    (
        "rules",
        "ip rule add fwmark 0x5/0xff lookup 77 priority 100; ip rule add iif lo lookup 78
        ip rule add uidrange 1000-2000 lookup 80; ip rule add ipproto tcp dport 80 lookup 81
        ip rule add goto 32766 priority 5; ip -6 rule del priority 32766; ip -6 rule add priority 10 lookup main
        ip -6 rule add from fd00::/64 lookup 91 priority 55; ip rule del priority 32767",
        "ip rule; ip -6 rule",
    ),
    (
        "neighbours",
        "ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up; ip addr add 10.0.0.1/24 dev v0
        ip neigh add 10.0.0.2 lladdr 02:00:00:00:00:01 dev v0 nud permanent
        ip neigh add fd00::2 lladdr 02:00:00:00:00:02 dev v0 nud permanent; ip neigh add proxy 10.0.0.77 dev v0",
        "ip neigh show nud permanent; ip neigh show proxy",
    ),
    (
        "settings",
        "ip link add v0 type veth peer name v1; cd /proc/sys/net; echo 1 > ipv4/ip_forward
        echo 77 > unix/max_dgram_qlen; echo 2 > ipv4/conf/v0/rp_filter; echo 1 > ipv4/conf/default/proxy_arp
        echo 200 > core/somaxconn; echo 0 > ipv4/ip_unprivileged_port_start; echo 500 1000 > ipv4/ip_local_port_range
        echo 500 > ipv4/neigh/v0/retrans_time_ms; echo 4096 8192 16384 > ipv4/tcp_rmem; echo 1 > ipv6/bindv6only
        echo fd00::1 > ipv6/conf/v0/stable_secret; echo 1 > ipv6/conf/v1/disable_ipv6",
        "sysctl -a -r ^net 2>/dev/null | grep -v \"nf_conntrack_count\\|multipath_hash_seed\"",
    ),
];

#[test]
fn what_users_set_in_a_network_comes_back() -> anyhow::Result<()> {
    if !is_possible("what_users_set_in_a_network_comes_back") {
        return Ok(());
    }
    for (what, script, list) in CONTENTS {
        let tree = Tree::start(script).context(what)?;
        let before = tree.inside(tree.pid, list)?;
        tree.dump(&[]).context(what)?;
        tree.restore(&[]).context(what)?;
        pretty_assert(what, &before, &tree.inside(tree.pid, list)?);
    }
    Ok(())
}

/// Devices whose drivers are modules on most systems; `v0` is one end of a pair.
const KINDS: [(&str, &str); 7] = [
    (
        "vlan",
        "ip link add link v0 name n0 type vlan id 5 protocol 802.1ad reorder_hdr off ingress-qos-map 1:2 egress-qos-map 3:4
        ip link set n0 up; ip addr add 10.5.0.1/24 dev n0",
    ),
    (
        "ipvlan",
        "ip link add link v0 name n0 type ipvlan mode l3 private; ip link set n0 up; ip addr add 10.5.0.1/24 dev n0",
    ),
    (
        "macvlan",
        "ip link add link v0 name n0 type macvlan mode bridge; ip link add link v0 name n1 type macvlan mode vepa
        ip link set n0 up; ip addr add 10.5.0.1/24 dev n0",
    ),
    (
        "sit",
        "ip link add n0 type sit local 10.0.0.1 remote 10.0.0.2 ttl 64 dev v0
        ip link add n1 type sit local 10.0.0.1 remote any; ip tunnel 6rd dev n1 6rd-prefix 2001:db8::/32
        ip link set n0 up; ip addr add 2001:db8::1/64 dev n0 nodad",
    ),
    (
        "dummy",
        "ip link add n0 type dummy; ip link set n0 up mtu 1300; ip addr add 10.5.0.1/24 dev n0",
    ),
    ("nlmon", "ip link add n0 type nlmon; ip link set n0 up"),
    (
        "vrf",
        "ip link add n0 type vrf table 10; ip link set v0 master n0; ip link set n0 up; ip addr add 10.5.0.1/24 dev v0",
    ),
];

#[test]
fn devices_of_every_kind_come_back() -> anyhow::Result<()> {
    let name = "devices_of_every_kind_come_back";
    if !is_possible(name) {
        return Ok(());
    }
    let pair = "ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up
        ip addr add 10.0.0.1/24 dev v0";
    for (kind, script) in KINDS {
        let probe = format!(
            "unshare --net ip link add n0 type {kind} 2>&1 | grep -q \"Unknown device\\|not supported\""
        );
        if shell(&probe).is_ok() {
            skips::skip(kind, "no driver of this kind of device").expect("the skip is listed");
            continue;
        }
        let tree = Tree::start(&format!("{pair}\n{script}")).context(kind)?;
        let list =
            "ip -d -o link | sed \"s/state [A-Z]*//; s/NO-CARRIER,//; s/,LOWER_UP//; s/,M-DOWN//\"
            ip -o addr | grep -v fe80; ip route show table all | grep -v fe80 | sort";
        let before = tree.inside(tree.pid, list)?;
        ensure!(before.contains("n0"), "{kind}: {before}");
        tree.dump(&[]).context(kind)?;
        tree.restore(&[]).context(kind)?;
        pretty_assert(kind, &before, &tree.inside(tree.pid, list)?);
    }
    Ok(())
}

#[test]
fn a_setting_that_is_missing_fails_the_restore_unless_told_otherwise() -> anyhow::Result<()> {
    if !is_possible("a_setting_that_is_missing_fails_the_restore_unless_told_otherwise") {
        return Ok(());
    }
    let tree = Tree::start("echo 77 >/proc/sys/net/unix/max_dgram_qlen")?;
    tree.dump(&[])?;
    let restore = |option: &str| {
        let floe = env!("CARGO_BIN_EXE_floe");
        let images = tree.images();
        shell(&format!(
            "unshare --mount sh -ec 'mount -t tmpfs -o ro none /proc/sys/net
                {floe} restore -d -D {} {option} 2>&1 || echo failed'",
            images.display()
        ))
    };
    let said = restore("")?;
    ensure!(
        said.contains("Setting /proc/sys/net/") && said.contains("failed"),
        "{said}"
    );
    let said = restore("--weak-sysctls")?;
    ensure!(!said.contains("failed"), "{said}");
    Ok(())
}

/// Compares line by line.
fn pretty_assert(what: &str, before: &str, after: &str) {
    let before: Vec<&str> = before.lines().collect();
    let after: Vec<&str> = after.lines().collect();
    let lost: Vec<_> = before.iter().filter(|line| !after.contains(line)).collect();
    let new: Vec<_> = after.iter().filter(|line| !before.contains(line)).collect();
    assert!(
        lost.is_empty() && new.is_empty(),
        "{what}: lost {lost:#?}, new {new:#?}"
    );
    assert_eq!(after.len(), before.len(), "{what}");
}
