//! Holding back the packets of TCP connections, or of a whole namespace, while sockets are away.
//!
//! Without it the kernel would answer a peer's packet with a reset, as no socket is there to take it.
//! A lock belongs to this process: it goes when the process does, however it ends. After a dump that ends
//! the tree it is made to stay, under the name by which a restore of either engine finds it.

use std::io::{self, Write};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use floe_kernel::namespace::{Home, Namespace};
use floe_kernel::netlink::NetlinkSocket;
use floe_kernel::nftables::{Flow, Lifetime, PASS_MARK, add_closed_table, add_table, delete_table};
use floe_options::NetworkLock;

/// The longest name that CRIU gives its table.
const TABLE_NAME: usize = 26;

/// Locking or unlocking failed.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// nf_tables refused.
    #[error("{action} the table `{table}` of nftables; --network-lock has other ways")]
    Nftables {
        action: &'static str,
        table: String,
        #[source]
        source: io::Error,
    },
    /// The namespace could not be entered.
    #[error("Entering a network namespace to lock it")]
    Enter(#[source] io::Error),
    /// The program could not be run.
    #[error("Running {program}; --network-lock nftables needs no program")]
    Program {
        program: &'static str,
        #[source]
        source: io::Error,
    },
    /// The program refused.
    #[error("`{program} {arguments}` failed: {output}")]
    Refused {
        program: &'static str,
        arguments: String,
        output: String,
    },
}

/// The table of a dump with this run id; CRIU's name for it.
pub fn table_name(run_id: &str) -> String {
    let mut name = format!("CRIU-{run_id}");
    name.truncate(TABLE_NAME);
    name
}

/// A network namespace that is locked from another one.
#[derive(Clone, Debug)]
pub struct Away {
    home: Rc<Home>,
    namespace: Rc<Namespace>,
}

impl Away {
    /// `namespace`, reached from `home` by the thread that made that.
    pub fn new(home: Rc<Home>, namespace: Rc<Namespace>) -> Self {
        Away { home, namespace }
    }
}

/// Which packets are held back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Both directions of these connections, given by their outgoing packets.
    Flows(Vec<Flow>),
    /// All of a namespace that the tree has for its own.
    Everything,
}

/// Packets that are held back; dropping it lets them pass.
#[derive(Debug)]
pub struct Lock {
    scope: Scope,
    /// `None`: where the thread is.
    away: Option<Away>,
    held: Held,
}

#[derive(Debug)]
enum Held {
    /// The table goes with the socket, if nothing else deletes it.
    Nftables(NetlinkSocket, String),
    /// Rules must be deleted one by one.
    Iptables,
    Nothing,
}

impl Lock {
    /// Locks what `scope` says, here or in another namespace.
    pub fn new(method: NetworkLock, scope: Scope, away: Option<Away>) -> Result<Self, LockError> {
        let mut lock = Lock {
            held: Held::Nothing,
            scope,
            away,
        };
        if lock.scope == Scope::Flows(Vec::new()) {
            return Ok(lock);
        }
        match method {
            NetworkLock::Skip => {}
            NetworkLock::Nftables => {
                static COUNT: AtomicU64 = AtomicU64::new(0);
                // Two locks of one process must not clash.
                let count = COUNT.fetch_add(1, Ordering::Relaxed);
                let name = format!("floe-{}-{count}", std::process::id());
                let add = || add(&name, Lifetime::Owner, &lock.scope);
                let socket = within(lock.away.as_ref(), add)?;
                lock.held = Held::Nftables(socket, name);
            }
            NetworkLock::Iptables => {
                lock.held = Held::Iptables;
                within(lock.away.as_ref(), || lock_by_iptables(&lock.scope))?;
            }
        }
        Ok(lock)
    }

    /// Makes the lock outlive this process, until a restore of the dump with this run id.
    pub fn persist(mut self, run_id: &str) -> Result<(), LockError> {
        if let Held::Nftables(..) = self.held {
            let name = table_name(run_id);
            let add = || add(&name, Lifetime::Persistent, &self.scope);
            within(self.away.as_ref(), add)?;
        } else {
            self.held = Held::Nothing;
        }
        Ok(())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let result = match &self.held {
            // Tasks in the making may have copies of the socket, so its end alone is not enough.
            Held::Nftables(socket, table) => {
                delete_table(socket, table).map_err(|source| LockError::Nftables {
                    action: "Deleting",
                    table: table.clone(),
                    source,
                })
            }
            Held::Iptables => within(self.away.as_ref(), || unlock_by_iptables(&self.scope)),
            Held::Nothing => Ok(()),
        };
        if let Err(error) = result {
            tracing::warn!(%error, "connections may stay locked");
        }
    }
}

/// Does `work` in the namespace that is meant.
fn within<T>(
    away: Option<&Away>,
    work: impl FnOnce() -> Result<T, LockError>,
) -> Result<T, LockError> {
    let _visit = match away {
        Some(away) => {
            let visit = away.home.visit([&*away.namespace]);
            Some(visit.map_err(LockError::Enter)?)
        }
        None => None,
    };
    work()
}

fn add(name: &str, lifetime: Lifetime, scope: &Scope) -> Result<NetlinkSocket, LockError> {
    let failed = |source| LockError::Nftables {
        action: "Adding",
        table: name.to_string(),
        source,
    };
    let socket = NetlinkSocket::open(libc::NETLINK_NETFILTER).map_err(failed)?;
    match scope {
        Scope::Flows(flows) => {
            let both_ways = flows
                .iter()
                .flat_map(|flow| [flow.clone(), flow.reversed()]);
            let both_ways: Vec<Flow> = both_ways.collect();
            add_table(&socket, name, lifetime, &both_ways).map_err(failed)?;
        }
        Scope::Everything => add_closed_table(&socket, name, lifetime).map_err(failed)?,
    }
    Ok(socket)
}

/// What a dump may have left locked.
#[derive(Clone, Copy, Debug)]
pub struct Left<'a> {
    /// How it locked.
    pub method: NetworkLock,
    /// By which id its table is named.
    pub run_id: Option<&'a str>,
}

impl Left<'_> {
    /// Undoes it, by whatever means; nothing to undo is no error.
    pub fn unlock(self, scope: &Scope, away: Option<&Away>) -> Result<(), LockError> {
        within(away, || self.unlock_here(scope))
    }

    fn unlock_here(self, scope: &Scope) -> Result<(), LockError> {
        match (self.method, self.run_id) {
            (NetworkLock::Nftables, Some(run_id)) => {
                let table = table_name(run_id);
                let deleted = NetlinkSocket::open(libc::NETLINK_NETFILTER)
                    .and_then(|socket| delete_table(&socket, &table));
                match deleted {
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
                    other => other.map_err(|source| LockError::Nftables {
                        action: "Deleting",
                        table,
                        source,
                    }),
                }
            }
            // On another machine than the dump's there are no rules.
            (NetworkLock::Iptables, _) => match unlock_by_iptables(scope) {
                Err(LockError::Refused { .. }) => Ok(()),
                other => other,
            },
            _ => Ok(()),
        }
    }
}

fn lock_by_iptables(scope: &Scope) -> Result<(), LockError> {
    match scope {
        Scope::Flows(flows) => flows.iter().try_for_each(|flow| iptables("-I", flow)),
        Scope::Everything => {
            let mark = format!("{PASS_MARK:#x}");
            iptables_restore(&format!(
                "*filter\n:CRIU - [0:0]\n-I INPUT -j CRIU\n-I OUTPUT -j CRIU\n\
                 -A CRIU -m mark --mark {mark} -j ACCEPT\n-A CRIU -j DROP\nCOMMIT\n"
            ))
        }
    }
}

/// Goes on after a rule that is not there; the first refusal is the result.
fn unlock_by_iptables(scope: &Scope) -> Result<(), LockError> {
    match scope {
        Scope::Flows(flows) => {
            let results: Vec<_> = flows.iter().map(|flow| iptables("-D", flow)).collect();
            results.into_iter().collect()
        }
        Scope::Everything => {
            // Naming the chain empties it. It can go when nothing leads to it any more.
            iptables_restore(
                "*filter\n:CRIU - [0:0]\n-D INPUT -j CRIU\n-D OUTPUT -j CRIU\nCOMMIT\n",
            )?;
            iptables_restore("*filter\n:CRIU - [0:0]\n-X CRIU\nCOMMIT\n")
        }
    }
}

/// Changes rules of IPv4 and of IPv6 in one go each.
fn iptables_restore(changes: &str) -> Result<(), LockError> {
    let v6 = std::fs::exists("/proc/sys/net/ipv6").unwrap_or(false);
    let programs = ["iptables-restore", "ip6tables-restore"];
    let programs = if v6 { &programs[..] } else { &programs[..1] };
    for program in programs {
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
    }
    Ok(())
}

/// Adds or deletes the rules for both directions of a connection, as CRIU does.
fn iptables(command: &str, outgoing: &Flow) -> Result<(), LockError> {
    for (chain, flow) in [("INPUT", outgoing.reversed()), ("OUTPUT", outgoing.clone())] {
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
    }
    Ok(())
}

fn shown(address: &[u8]) -> String {
    let v4: Option<[u8; 4]> = address.try_into().ok();
    let v6: Option<[u8; 16]> = address.try_into().ok();
    match (v4, v6) {
        (Some(v4), _) => std::net::Ipv4Addr::from(v4).to_string(),
        (_, Some(v6)) => std::net::Ipv6Addr::from(v6).to_string(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_the_name_that_criu_gives_it() {
        let name = table_name("675e9752-ea0e-4a22-b80c-18d1791eb04e");
        assert_eq!(name, "CRIU-675e9752-ea0e-4a22-b8");
    }

    #[test]
    fn a_lock_that_is_dropped_leaves_no_table() {
        let flow = Flow {
            source: vec![192, 0, 2, 1],
            source_port: 1,
            target: vec![192, 0, 2, 2],
            target_port: 2,
        };
        let lock = match Lock::new(NetworkLock::Nftables, Scope::Flows(vec![flow]), None) {
            Ok(lock) => lock,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let Held::Nftables(_, table) = &lock.held else {
            panic!("there was something to lock");
        };
        let table = table.clone();
        drop(lock);
        let socket = NetlinkSocket::open(libc::NETLINK_NETFILTER).expect("opened before");
        let error = delete_table(&socket, &table).expect_err("gone");
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }
}
