//! Packet rules (nftables, and the older iptables of kernels that still have them).
//!
//! Saved:    what `nft list ruleset` and `iptables-legacy-save` print: the images hold that text.
//! Rebuilt:  the text is given back to `nft -f` and `iptables-legacy-restore`.
//! Not kept: contents of sets that fill by themselves; rules that nft cannot print are refused.
//!
//! The text is the format, and only these programs speak it, so a namespace with rules needs them and one
//! without rules does not: whether there are any is asked by netlink and `/proc`.

use std::io::{ErrorKind, Write};
use std::process::{Command, Stdio};

use floe_kernel::netlink::NetlinkSocket;
use floe_kernel::nftables::table_names;

use super::error::{Attempt, NetError};

/// The images of one namespace; an empty one is not written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    pub nftables: Vec<u8>,
    pub iptables: Vec<u8>,
    pub ip6tables: Vec<u8>,
}

/// Programs to try, best first. Where iptables is no front of nftables it has no `-legacy` in its name.
const SAVE: [&str; 2] = ["iptables-legacy-save", "iptables-save"];
const SAVE6: [&str; 2] = ["ip6tables-legacy-save", "ip6tables-save"];
const RESTORE: [&str; 2] = ["iptables-legacy-restore", "iptables-restore"];
const RESTORE6: [&str; 2] = ["ip6tables-legacy-restore", "ip6tables-restore"];

/// Reads the rules of the calling thread's namespace.
pub fn collect() -> Result<Rules, NetError> {
    let tables = match NetlinkSocket::open(libc::NETLINK_NETFILTER) {
        Ok(socket) => {
            table_names(&socket).during("Listing", || "tables of nftables".to_string())?
        }
        Err(_) => Vec::new(),
    };
    let mut rules = Rules::default();
    if !tables.is_empty() {
        rules.nftables = run("nft", &["list", "ruleset"], None, "save")?;
        if let Some(rule) = unprintable(&rules.nftables) {
            return Err(NetError::Unsupported {
                object: format!("A packet rule that nft cannot write down: `{rule}`"),
                remedy: "remove it, or write it with nft instead of iptables".into(),
            });
        }
    }
    if has_old_tables("ip_tables_names") {
        rules.iptables = run_first(&SAVE, &[], None, "save")?;
    }
    if has_old_tables("ip6_tables_names") {
        rules.ip6tables = run_first(&SAVE6, &[], None, "save")?;
    }
    Ok(rules)
}

/// The kernel lists tables once something has looked at them.
fn has_old_tables(list: &str) -> bool {
    let names = std::fs::read_to_string(format!("/proc/thread-self/net/{list}"));
    names.is_ok_and(|names| !names.trim().is_empty())
}

/// Matches and targets that only iptables knows are printed in a form that cannot be read back.
fn unprintable(ruleset: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(ruleset);
    let line = text.lines().find(|line| {
        let mut words = line.split_whitespace();
        let begin = words.any(|word| word == "xt");
        begin && matches!(words.next(), Some("match" | "target"))
    })?;
    Some(line.trim().to_string())
}

/// Gives the calling thread's namespace the rules of images.
pub fn execute(rules: &Rules) -> Result<(), NetError> {
    if !rules.iptables.is_empty() {
        run_first(&RESTORE, &["-w"], Some(&rules.iptables), "restore")?;
    }
    if !rules.ip6tables.is_empty() {
        run_first(&RESTORE6, &["-w"], Some(&rules.ip6tables), "restore")?;
    }
    if !rules.nftables.is_empty() {
        run("nft", &["-f", "-"], Some(&rules.nftables), "restore")?;
    }
    Ok(())
}

/// Runs the first of `programs` that there is.
fn run_first(
    programs: &[&str],
    arguments: &[&str],
    input: Option<&[u8]>,
    task: &'static str,
) -> Result<Vec<u8>, NetError> {
    let (last, first) = programs.split_last().expect("a list that is not empty");
    for program in first {
        match run(program, arguments, input, task) {
            Err(NetError::Program { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            other => return other,
        }
    }
    run(last, arguments, input, task)
}

/// Runs a program in the namespace of the calling thread; its output.
fn run(
    program: &str,
    arguments: &[&str],
    input: Option<&[u8]>,
    task: &'static str,
) -> Result<Vec<u8>, NetError> {
    let missing = |source| NetError::Program {
        program: program.to_string(),
        task,
        source,
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(if input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    if let (Some(mut pipe), Some(input)) = (child.stdin.take(), input) {
        match pipe.write_all(input) {
            // It says why on its other output.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            other => other.during("Writing to", || program.to_string())?,
        }
    }
    let output = child
        .wait_with_output()
        .during("Waiting for", || program.to_string())?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(NetError::Refused {
        program: [&[program], arguments].concat().join(" "),
        output: said.trim().to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_only_iptables_knows_are_found() {
        let text =
            b"table ip a {\n\tchain b {\n\t\tmeta l4proto tcp xt match \"owner\" counter\n\t}\n}";
        assert_eq!(
            unprintable(text).as_deref(),
            Some("meta l4proto tcp xt match \"owner\" counter")
        );
        assert_eq!(unprintable(b"# xt is a word in a comment"), None);
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = run_first(&["no-such-1", "no-such-2"], &[], None, "save").expect_err("missing");
        assert!(error.to_string().contains("no-such-2"), "{error}");
    }
}
