//! Holding back the packets of TCP connections while their sockets are away.
//!
//! Without it the kernel would answer a peer's packet with a reset, as no socket is there to take it.
//! A lock belongs to this process: it goes when the process does, however it ends. After a dump that ends
//! the tree it is made to stay, under the name by which a restore of either engine finds it.

use std::io;
use std::process::Command;

use floe_kernel::netlink::NetlinkSocket;
use floe_kernel::nftables::{Flow, Lifetime, PASS_MARK, add_table, delete_table};
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

/// Connections that are locked; dropping it unlocks them.
#[derive(Debug)]
pub struct Lock {
    flows: Vec<Flow>,
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
    /// Locks both directions of connections, given by their outgoing packets.
    pub fn new(method: NetworkLock, outgoing: Vec<Flow>) -> Result<Self, LockError> {
        let mut lock = Lock {
            flows: outgoing,
            held: Held::Nothing,
        };
        if lock.flows.is_empty() {
            return Ok(lock);
        }
        match method {
            NetworkLock::Skip => {}
            NetworkLock::Nftables => {
                // Two locks of one process must not clash: the address of the flows tells them apart.
                let name = format!("floe-{}-{:p}", std::process::id(), lock.flows.as_ptr());
                let socket = add(&name, Lifetime::Owner, &lock.both_ways())?;
                lock.held = Held::Nftables(socket, name);
            }
            NetworkLock::Iptables => {
                lock.held = Held::Iptables;
                for flow in &lock.flows {
                    iptables("-I", flow)?;
                }
            }
        }
        Ok(lock)
    }

    /// Makes the lock outlive this process, until a restore of the dump with this run id.
    pub fn persist(mut self, run_id: &str) -> Result<(), LockError> {
        if let Held::Nftables(..) = self.held {
            add(&table_name(run_id), Lifetime::Persistent, &self.both_ways())?;
        } else {
            self.held = Held::Nothing;
        }
        Ok(())
    }

    fn both_ways(&self) -> Vec<Flow> {
        let flows = self.flows.iter();
        flows
            .flat_map(|flow| [flow.clone(), flow.reversed()])
            .collect()
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
            Held::Iptables => self.flows.iter().try_for_each(|flow| iptables("-D", flow)),
            Held::Nothing => Ok(()),
        };
        if let Err(error) = result {
            tracing::warn!(%error, "connections may stay locked");
        }
    }
}

fn add(name: &str, lifetime: Lifetime, flows: &[Flow]) -> Result<NetlinkSocket, LockError> {
    let failed = |source| LockError::Nftables {
        action: "Adding",
        table: name.to_string(),
        source,
    };
    let socket = NetlinkSocket::open(libc::NETLINK_NETFILTER).map_err(failed)?;
    add_table(&socket, name, lifetime, flows).map_err(failed)?;
    Ok(socket)
}

/// Undoes what a dump with this run id left locked, by whatever means; nothing to undo is no error.
pub fn unlock_dumped(
    method: NetworkLock,
    run_id: Option<&str>,
    outgoing: &[Flow],
) -> Result<(), LockError> {
    match (method, run_id) {
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
        (NetworkLock::Iptables, _) => {
            for flow in outgoing {
                // On another machine than the dump's there are no rules.
                match iptables("-D", flow) {
                    Err(LockError::Refused { .. }) | Ok(()) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
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
        let lock = match Lock::new(NetworkLock::Nftables, vec![flow]) {
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
