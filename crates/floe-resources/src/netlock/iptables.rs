//! Rules of iptables, by its programs.

use std::io::Write;
use std::process::{Command, Stdio};

use floe_kernel::netlink::NetlinkSocket;
use floe_kernel::nftables::{Flow, IpFamily, MarkedTable, PASS_MARK};

use super::{LockError, Scope, close_elsewhere};

/// Where both programs have rules, and the comment by which it is known that it was not there before.
const TABLE: &str = "filter";
const COMMENT: &str = "floe";

/// Adds the rules.
pub fn lock(scope: &Scope) -> Result<(), LockError> {
    make_tables(scope);
    match scope {
        Scope::Flows(flows) => {
            let mut rules = flows.iter().flat_map(rules_of);
            rules.try_for_each(|(chain, flow)| change("-I", chain, &flow))
        }
        Scope::Everything => {
            let mark = format!("{PASS_MARK:#x}");
            iptables_restore(&format!(
                "*filter\n:CRIU - [0:0]\n-I INPUT -j CRIU\n-I OUTPUT -j CRIU\n\
                 -A CRIU -m mark --mark {mark} -j ACCEPT\n-A CRIU -j DROP\nCOMMIT\n"
            ))
        }
    }
}

/// How many of a rule are taken away: a restore has its own beside that of the dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copies {
    One,
    All,
}

/// Takes the rules away. Goes on after one that is not there; the first refusal is the result.
pub fn unlock(scope: &Scope, copies: Copies) -> Result<(), LockError> {
    // Deleting a rule that is not there makes the table as well.
    make_tables(scope);
    let unlocked = delete(scope, copies);
    remove_tables(scope);
    unlocked
}

fn delete(scope: &Scope, copies: Copies) -> Result<(), LockError> {
    match scope {
        Scope::Flows(flows) => {
            let rules = flows.iter().flat_map(rules_of);
            let results = rules.map(|(chain, flow)| {
                let first = change("-D", chain, &flow);
                while copies == Copies::All && change("-D", chain, &flow).is_ok() {}
                first
            });
            let results: Vec<_> = results.collect();
            results.into_iter().collect()
        }
        Scope::Everything => {
            // Naming the chain empties it. It can go when nothing leads to it any more.
            let jumps = "*filter\n:CRIU - [0:0]\n-D INPUT -j CRIU\n-D OUTPUT -j CRIU\nCOMMIT\n";
            let first = iptables_restore(jumps);
            while copies == Copies::All && iptables_restore(jumps).is_ok() {}
            let chain = iptables_restore("*filter\n:CRIU - [0:0]\n-X CRIU\nCOMMIT\n");
            first.and(chain)
        }
    }
}

/// The tables of nftables that the programs make for their rules, where they are a front of that, and leave.
fn tables(scope: &Scope) -> impl Iterator<Item = MarkedTable> {
    let has = |length| match scope {
        Scope::Everything => length == V4 || has_v6(),
        Scope::Flows(flows) => flows.iter().any(|flow| flow.source.len() == length),
    };
    let both = [(V4, IpFamily::V4), (V6, IpFamily::V6)];
    let needed = both.map(|(length, family)| has(length).then_some(family));
    needed.into_iter().flatten().map(|family| MarkedTable {
        family,
        name: TABLE,
        comment: COMMENT,
    })
}

/// Bytes of an address.
const V4: usize = 4;
const V6: usize = 16;

fn has_v6() -> bool {
    std::fs::exists("/proc/sys/net/ipv6").unwrap_or(false)
}

/// Makes the tables that are not there, so that they can be told from those that are.
fn make_tables(scope: &Scope) {
    let version = Command::new("iptables").arg("--version").output();
    if !version.is_ok_and(|said| String::from_utf8_lossy(&said.stdout).contains("nf_tables")) {
        return;
    }
    let made = NetlinkSocket::open(libc::NETLINK_NETFILTER)
        .and_then(|socket| tables(scope).try_for_each(|table| table.make(&socket).map(drop)));
    if let Err(error) = made {
        tracing::debug!(%error, "tables of iptables that are made now will stay");
    }
}

/// Removes the tables that were made here and have nothing of anybody's in them.
fn remove_tables(scope: &Scope) {
    let socket = match NetlinkSocket::open(libc::NETLINK_NETFILTER) {
        Ok(socket) => socket,
        Err(error) => return tracing::debug!(%error, "no nftables"),
    };
    for table in tables(scope) {
        if let Err(error) = table.remove_unused(&socket) {
            tracing::debug!(%error, "an empty table of iptables stays");
        }
    }
    close_elsewhere(socket);
}

/// The rules for both directions of a connection, as CRIU has them.
fn rules_of(outgoing: &Flow) -> [(&'static str, Flow); 2] {
    [("INPUT", outgoing.reversed()), ("OUTPUT", outgoing.clone())]
}

/// Changes rules of IPv4 and of IPv6 in one go each.
fn iptables_restore(changes: &str) -> Result<(), LockError> {
    let programs = ["iptables-restore", "ip6tables-restore"];
    let programs = if has_v6() {
        &programs[..]
    } else {
        &programs[..1]
    };
    let results: Vec<_> = programs
        .iter()
        .map(|program| feed(program, changes))
        .collect();
    results.into_iter().collect()
}

fn feed(program: &'static str, changes: &str) -> Result<(), LockError> {
    let failed = |source| LockError::Program { program, source };
    let mut child = Command::new(program)
        .args(["-w", "--noflush"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut input = child.stdin.take().expect("a pipe was asked for");
    // What it does not read it refuses below.
    let _ = input.write_all(changes.as_bytes());
    drop(input);
    let output = child.wait_with_output().map_err(failed)?;
    if !output.status.success() {
        return Err(LockError::Refused {
            program,
            arguments: "-w --noflush".to_string(),
            output: String::from_utf8_lossy(&output.stderr).trim().to_string(),
        });
    }
    Ok(())
}

/// Adds or deletes a rule.
fn change(command: &str, chain: &str, flow: &Flow) -> Result<(), LockError> {
    let program = if flow.source.len() == 4 {
        "iptables"
    } else {
        "ip6tables"
    };
    let arguments = [
        "-w".to_string(),
        "-t".into(),
        "filter".into(),
        command.into(),
        chain.into(),
        "--protocol".into(),
        "tcp".into(),
        "-m".into(),
        "mark".into(),
        "!".into(),
        "--mark".into(),
        format!("{PASS_MARK:#X}").replace("0X", "0x"),
        "--source".into(),
        shown(&flow.source),
        "--sport".into(),
        flow.source_port.to_string(),
        "--destination".into(),
        shown(&flow.target),
        "--dport".into(),
        flow.target_port.to_string(),
        "-j".into(),
        "DROP".into(),
    ];
    let output = Command::new(program)
        .args(&arguments)
        .output()
        .map_err(|source| LockError::Program { program, source })?;
    if !output.status.success() {
        return Err(LockError::Refused {
            program,
            arguments: arguments.join(" "),
            output: String::from_utf8_lossy(&output.stderr).trim().to_string(),
        });
    }
    Ok(())
}

/// An address as the programs take it.
pub fn shown(address: &[u8]) -> String {
    let v4: Option<[u8; 4]> = address.try_into().ok();
    let v6: Option<[u8; 16]> = address.try_into().ok();
    match (v4, v6) {
        (Some(v4), _) => std::net::Ipv4Addr::from(v4).to_string(),
        (_, Some(v6)) => std::net::Ipv6Addr::from(v6).to_string(),
        _ => String::new(),
    }
}
