//! Namespaces of our own, filled, read and filled again.
#![cfg(test)]

use std::process::Command;
use std::rc::Rc;

use floe_kernel::namespace::{Home, Namespace, NsKind};
use floe_kernel::netlink::NetlinkSocket;

use super::ip_dump::{execute_addresses, execute_routes, execute_rules};
use super::link::{Network, Outside, Surroundings, TunDevices};
use super::sysctl::Missing;
use super::{conntrack, firewall, ip_dump, link};

/// What a command prints in the calling thread's namespaces.
fn run(command: &str) -> String {
    let output = Command::new("sh")
        .args(["-c", command])
        .output()
        .expect("sh runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Everything that matters, as the tools show it.
fn shown(nft: bool) -> String {
    // Lifetimes count down, and links come up when they like.
    let mut all = run(
        "ip -d addr | sed -E 's/state [A-Z]+//; /inet6 fe80/,+1d; s/NO-CARRIER,|,LOWER_UP//g; s/ tentative//; \
         s/(timer|hello_timer|tcn_timer|topology_change_timer|gc_timer) +[0-9.]+//g; s/promiscuity [0-9]+//; \
         s/allmulti [0-9]+//; s/(forward_delay|bridge_id|designated_root).*//; s/bridge_slave .*//'",
    );
    for list in [
        "ip route show table all",
        "ip -6 route show table all",
        "ip rule",
        "ip -6 rule",
    ] {
        all += &run(&format!(
            "{list} | grep -v 'proto kernel' | sed 's/ linkdown//' | sort"
        ));
    }
    if nft {
        all += &run("nft list ruleset");
    }
    all
}

fn in_new_network(home: &Rc<Home>, work: impl FnOnce()) -> Namespace {
    let _visit = home.visit_new(&[NsKind::Net]).expect("root may");
    work();
    Namespace::own(NsKind::Net).expect("it exists")
}

/// Runs `work` in a thread of its own where that can make namespaces and the tools are there.
fn with_home(work: impl FnOnce(&Rc<Home>) + Send) {
    let root = rustix::process::geteuid().is_root();
    if !root || Command::new("ip").arg("-V").output().is_err() {
        return eprintln!("skipped: needs root and ip");
    }
    std::thread::scope(|scope| {
        scope.spawn(|| work(&Rc::new(Home::here().expect("/proc is there"))));
    });
}

fn copy(home: &Rc<Home>, from: &Namespace, to: &Namespace) {
    let around = Surroundings {
        own: 10,
        others: &[],
        external: &[],
    };
    let (devices, ip, rules) = {
        let _visit = home.visit([from]).expect("there");
        let socket = NetlinkSocket::open(libc::NETLINK_ROUTE).expect("netlink");
        let devices = link::collect(&socket, around, &mut TunDevices::default()).expect("devices");
        let ip = ip_dump::collect(&socket).expect("addresses");
        (devices, ip, firewall::collect().expect("rules"))
    };
    let socket = {
        let _visit = home.visit([to]).expect("there");
        NetlinkSocket::open(libc::NETLINK_ROUTE).expect("netlink")
    };
    let network = Network {
        id: 10,
        namespace: to,
        socket: &socket,
        devices,
        asking: std::collections::HashSet::new(),
    };
    let outside = Outside {
        home,
        external: &[],
        missing: Missing::Refuse,
    };
    link::execute(&[network], outside).expect("devices made");
    let _visit = home.visit([to]).expect("there");
    execute_addresses(&socket, &ip.addresses).expect("addresses added");
    execute_routes(&socket, &ip.routes).expect("routes added");
    execute_routes(&socket, &ip.routes6).expect("routes added");
    execute_rules(&socket, &ip.rules).expect("rules added");
    firewall::execute(&rules).expect("rules added");
}

#[test]
fn devices_addresses_routes_and_rules_come_back() {
    with_home(|home| {
        let nft = Command::new("nft").arg("-v").output().is_ok();
        let first = in_new_network(home, || {
            run("set -e; ip link set lo up
                 ip link add dum index 20 type veth peer name mud && ip link set dum mtu 1400 up
                 ip addr add 10.9.8.7/24 dev dum label dum:x && ip addr add fd09::7/64 dev dum nodad
                 ip link add bri type bridge && ip link add va type veth peer name vb
                 ip link set va master bri up && ip link set vb address 02:00:00:00:00:07 up
                 ip link set bri up
                 ip link add link dum name mv type macvlan mode private
                 ip link set mud up
                 ip route add default via 10.9.8.1 && ip route add 10.7.0.0/16 dev dum src 10.9.8.7 metric 9
                 ip route add 10.6.0.0/16 via 10.9.8.2 table 77 && ip -6 route add fd08::/64 via fd09::1
                 ip rule add from 10.6.0.1 lookup 77 && ip -6 rule add from fd08::1 lookup 77 pref 99
                 echo 1 > /proc/sys/net/ipv4/conf/dum/forwarding
                 echo 1 > /proc/sys/net/ipv4/conf/vb/rp_filter");
            // Not every kernel has these.
            for kind in ["dummy", "ifb"] {
                run(&format!(
                    "ip link add x{kind} type {kind} 2>/dev/null || true"
                ));
            }
            if nft {
                run(
                    "nft 'table inet t { chain c { type filter hook input priority 0; tcp dport 99 drop; }; }'",
                );
            }
        });
        let before = {
            let _visit = home.visit([&first]).expect("there");
            shown(nft)
        };
        let second = in_new_network(home, || ());
        copy(home, &first, &second);
        let _visit = home.visit([&second]).expect("there");
        pretty(&before, &shown(nft));
        assert_eq!(
            run(
                "cat /proc/sys/net/ipv4/conf/{dum/forwarding,vb/rp_filter} 2>/dev/null || \
             cat /proc/sys/net/ipv4/conf/dum/forwarding /proc/sys/net/ipv4/conf/vb/rp_filter"
            ),
            "1\n1\n"
        );
    });
}

/// Compares line by line.
fn pretty(before: &str, after: &str) {
    let split = |text: &str| -> Vec<String> {
        let lines = text.lines();
        lines
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    };
    assert_eq!(split(before), split(after));
}

#[test]
fn a_persistent_tap_device_comes_back() {
    if !std::fs::exists("/dev/net/tun").unwrap_or(false) {
        return eprintln!("skipped: no /dev/net/tun");
    }
    with_home(|home| {
        let first = in_new_network(home, || {
            run("ip tuntap add dev tp mode tap user 1000 group 2000 vnet_hdr && ip link set tp up");
        });
        let list = "ip -d tuntap; ip -br link show tp";
        let before = {
            let _visit = home.visit([&first]).expect("there");
            run(list)
        };
        let second = in_new_network(home, || ());
        copy(home, &first, &second);
        let _visit = home.visit([&second]).expect("there");
        assert_eq!(run(list), before);
    });
}

#[test]
fn tracked_connections_come_back() {
    with_home(|home| {
        let mut tracked = conntrack::Tracked::default();
        in_new_network(home, || {
            run("ip link set lo up");
            if Command::new("nft").arg("-v").output().is_err() {
                return;
            }
            run(
                "nft 'table ip t { chain c { type filter hook input priority 0; ct state new accept; }; }'",
            );
            let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("free");
            let client = std::net::TcpStream::connect(listener.local_addr().expect("bound"));
            client.expect("listening");
            tracked = conntrack::collect().expect("listed");
        });
        if tracked.connections.is_empty() {
            return eprintln!("skipped: nothing is tracked here");
        }
        in_new_network(home, || {
            conntrack::execute(&tracked.connections).expect("sent back");
            let again = conntrack::collect().expect("listed");
            assert!(!again.connections.is_empty());
        });
    });
}
