//! Holding back the packets of TCP connections, or of a whole namespace, while sockets are away.
//!
//! Without it the kernel would answer a peer's packet with a reset, as no socket is there to take it.
//! A lock belongs to this process: it goes when the process does, however it ends. After a dump that ends
//! the tree it is made to stay, under the name by which a restore of either engine finds it.

mod guard;
mod iptables;

use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use floe_kernel::ids::HostPid;
use floe_kernel::namespace::{Home, Namespace};
use floe_kernel::netlink::NetlinkSocket;
use floe_kernel::nftables::{Flow, Lifetime, add_closed_table, add_table, delete_table};
use floe_options::NetworkLock;

pub use guard::{COMMAND, watch};
use guard::{Guard, Undo, close_elsewhere};
pub use iptables::Copies;

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
    /// Nobody would unlock if this process were killed.
    #[error("Starting a process that unlocks if this one is killed")]
    Guard(#[source] io::Error),
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
    Iptables(Copies, Guard),
    Nothing,
}

impl Lock {
    /// Locks what `scope` says, here or in another namespace; `copies` is how many rules of a kind are its own.
    pub fn new(
        (method, copies): (NetworkLock, Copies),
        scope: Scope,
        away: Option<Away>,
    ) -> Result<Self, LockError> {
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
                let undo = Undo::Rules(lock.scope.clone(), copies);
                let guard = within(lock.away.as_ref(), || {
                    Guard::start(&undo).map_err(LockError::Guard)
                })?;
                lock.held = Held::Iptables(copies, guard);
                within(lock.away.as_ref(), || iptables::lock(&lock.scope))?;
            }
        }
        Ok(lock)
    }

    /// Makes the lock outlive this process, until a restore of the dump with this run id.
    pub fn persist(mut self, run_id: &str) -> Result<Kept, LockError> {
        let held = std::mem::replace(&mut self.held, Held::Nothing);
        let away = self.away.clone();
        let (undo, guard) = match held {
            Held::Nothing => return Ok(Kept { away, held: None }),
            Held::Iptables(copies, guard) => (Undo::Rules(self.scope.clone(), copies), guard),
            own @ Held::Nftables(..) => {
                // Its own table goes when the lasting one is there.
                self.held = own;
                let undo = Undo::Table(table_name(run_id));
                let guard = within(away.as_ref(), || {
                    Guard::start(&undo).map_err(LockError::Guard)
                })?;
                (undo, guard)
            }
        };
        let kept = Kept {
            away,
            held: Some((undo, guard)),
        };
        if let Some((Undo::Table(name), _)) = &kept.held {
            let add = || add(name, Lifetime::Persistent, &self.scope);
            close_elsewhere(within(self.away.as_ref(), add)?);
        }
        Ok(kept)
    }
}

/// A lock that a restore will find. Dropping it before the tree has ended takes it away.
#[derive(Debug)]
pub struct Kept {
    away: Option<Away>,
    held: Option<(Undo, Guard)>,
}

impl Kept {
    /// The tree is about to end: should this process be killed, the lock stays if the task `root` has ended.
    pub fn until_end_of(&mut self, root: HostPid) -> Result<(), LockError> {
        let Some((_, guard)) = &mut self.held else {
            return Ok(());
        };
        guard.only_while_alive(root).map_err(LockError::Guard)
    }

    /// The tree has ended: the lock is its restore's.
    pub fn leave(mut self) {
        self.held = None;
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let Some((undo, _guard)) = &self.held else {
            return;
        };
        let undone = within(self.away.as_ref(), || match undo {
            Undo::Table(name) => delete(name),
            Undo::Rules(scope, copies) => iptables::unlock(scope, *copies),
        });
        if let Err(error) = undone {
            tracing::warn!(%error, "connections may stay locked");
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let result = match std::mem::replace(&mut self.held, Held::Nothing) {
            // Tasks in the making may have copies of the socket, so its end alone is not enough.
            Held::Nftables(socket, table) => {
                let deleted = delete_table(&socket, &table);
                close_elsewhere(socket);
                deleted.map_err(|source| LockError::Nftables {
                    action: "Deleting",
                    table,
                    source,
                })
            }
            Held::Iptables(copies, _guard) => {
                within(self.away.as_ref(), || iptables::unlock(&self.scope, copies))
            }
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

/// Deletes a table of nftables; one that is not there is gone already.
fn delete(table: &str) -> Result<(), LockError> {
    let deleted = NetlinkSocket::open(libc::NETLINK_NETFILTER).and_then(|socket| {
        let deleted = delete_table(&socket, table);
        close_elsewhere(socket);
        deleted
    });
    match deleted {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other.map_err(|source| LockError::Nftables {
            action: "Deleting",
            table: table.to_string(),
            source,
        }),
    }
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
            (NetworkLock::Nftables, Some(run_id)) => delete(&table_name(run_id)),
            // On another machine than the dump's there are no rules.
            (NetworkLock::Iptables, _) => match iptables::unlock(scope, Copies::All) {
                Err(LockError::Refused { .. }) => Ok(()),
                other => other,
            },
            _ => Ok(()),
        }
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
        let lock = match Lock::new(
            (NetworkLock::Nftables, Copies::All),
            Scope::Flows(vec![flow]),
            None,
        ) {
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
