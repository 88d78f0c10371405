//! Rebuilding internet sockets.
//!
//! All ports are bound with sharing allowed, listeners first, and only then get their own rules about sharing.
//! TCP connections are rebuilt in repair mode, in which they send nothing, and stay in it until the tree is
//! about to run ([`release_connections`]).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::more_options;
use super::ping;
use floe_image::messages::{FdTypes, InetSkEntry};
use floe_kernel::nftables::Flow;
use floe_kernel::socket::{bind, connect, listen, shutdown, socket};
use floe_kernel::sockopt::{SocketOption, set_option_number};
use floe_options::{Need, NetworkLock};
use floe_plan::Handle;

use super::super::socket_options::{general, set_options};
use super::address::{End, outgoing, source, target};
use super::fault::AddressFault;
use super::ip_options::{V6ONLY, set_ip_options, set_tcp_options};
use super::restore_tcp::{Rebuilt, plan_connection};
use super::{LISTEN, is_connection};
use crate::net::{SocketPlace, unlock_networks};
use crate::netlock::{Copies, Left, Lock, Scope};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, World, plan_owner, set_flags};

/// Every socket has its port.
const PORTS: Handle = Handle::Object("bound ports", 0);
/// Every listening socket listens.
pub(super) const LISTENERS: Handle = Handle::Object("listening ports", 0);
/// No packet of a connection to come gets through.
pub(super) const LOCKED: Handle = Handle::Object("locked network", 0);

/// Adds the steps of one socket; the first one brings along what is done once for all.
pub(super) fn plan<'i>(entry: &'i InetSkEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
    let mut all = planner.images.of_type(FdTypes::Inetsk);
    if all.next().is_some_and(|first| first.id == entry.id) {
        plan_common(planner)?;
    }
    let (from, to) = (source(entry)?, target(entry)?);
    let name = format!("make internet socket {}", entry.ino);
    if is_connection(entry) && !closes_connections(planner) {
        if !planner.options.sockets.tcp_established {
            return Err(PlanError::NeedsOption {
                object: format!("The TCP connection of socket {}", entry.ino),
                need: Need::TcpConnections,
            });
        }
        plan_connection(planner, entry, (from, to))?;
    } else if is_connection(entry) {
        let place = SocketPlace::new(planner, entry.ns_id);
        let needs = [&[LISTENERS][..], &place.needs()].concat();
        planner.open(entry.id, name, &needs, move |world| {
            place.visit(world, |_| make_closed(entry))
        });
    } else {
        let place = SocketPlace::new(planner, entry.ns_id);
        planner.open(entry.id, name, &place.needs(), move |world| {
            place.visit(world, |_| make(entry, &from, &to))
        });
    }
    let done = Handle::Object("finished internet socket", u64::from(entry.id));
    let mut needs = vec![Handle::File(entry.id), PORTS];
    if is_connection(entry) && !closes_connections(planner) {
        needs.push(super::restore_tcp::ended(entry.id));
    }
    let name = format!("finish internet socket {}", entry.ino);
    planner.step(name, (&needs, &[done]), move |world| finish(world, entry));
    plan_owner(planner, entry.id, &entry.fown);
    Ok(())
}

/// Whether connections come back closed.
fn closes_connections(planner: &Planner<'_>) -> bool {
    planner.options.sockets.tcp_close || planner.images.inventory.tcp_close == Some(true)
}

fn plan_common(planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let entries = planner
        .images
        .files
        .values()
        .filter_map(|file| file.isk.as_ref());
    let entries: Vec<&InetSkEntry> = entries.collect();
    let files: Vec<Handle> = entries.iter().map(|entry| Handle::File(entry.id)).collect();
    planner.step("all ports are bound", (&files, &[PORTS]), |_| Ok(()));
    let listeners = entries.iter().filter(|entry| !is_connection(entry));
    let listeners: Vec<Handle> = listeners.map(|entry| Handle::File(entry.id)).collect();
    planner.step("all listeners listen", (&listeners, &[LISTENERS]), |_| {
        Ok(())
    });
    let connections = entries.into_iter().filter(|entry| is_connection(entry));
    let (mut flows, mut inside) = (Vec::new(), 0);
    // Connections that the dump closed it did not lock.
    for entry in connections.filter(|_| planner.images.inventory.tcp_close != Some(true)) {
        if SocketPlace::new(planner, entry.ns_id).number().is_some() {
            inside += 1; // Its whole namespace is locked before it has devices.
            continue;
        }
        flows.push(outgoing(&source(entry)?, &target(entry)?));
    }
    if flows.is_empty() && inside == 0 {
        return Ok(());
    }
    if closes_connections(planner) {
        planner.step_at_home(
            "connections that stay closed",
            (&[], &[LOCKED]),
            move |world| {
                world.state::<Network>().flows = flows;
                Ok(())
            },
        );
        return Ok(());
    }
    let method = planner.options.sockets.network_lock;
    let name = format!("lock {} TCP connections", flows.len());
    planner.step_at_home(name, (&[], &[LOCKED]), move |world| {
        // Connections within the tree too: a timer may send before the other end is there.
        let method = (method, Copies::One);
        let lock = Lock::new(method, Scope::Flows(flows.clone()), None)?;
        let network = world.state::<Network>();
        network.lock = Some(lock);
        network.flows = flows;
        Ok(())
    });
    Ok(())
}

/// What holds the network still during a restore, and what is to go on after.
#[derive(Default)]
pub(super) struct Network {
    lock: Option<Lock>,
    /// What the dump may have left locked.
    flows: Vec<Flow>,
    pub rebuilt: Vec<Rebuilt>,
}

/// Makes a socket that may share its port with any other for now.
pub(super) fn make_sharing(entry: &InetSkEntry) -> Result<OwnedFd, ExecuteError> {
    let what = || format!("{} (protocol {})", entry.ino, entry.proto);
    let [family, kind, protocol] = [entry.family, entry.r#type, entry.proto].map(u32::cast_signed);
    let made = match socket(family, kind, protocol) {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            ping::socket(family, kind, protocol)
        }
        made => made,
    };
    let file = made.during("Making internet socket", what)?;
    let set = |option, value| {
        set_option_number(file.as_fd(), option, value).during("Preparing internet socket", what)
    };
    if entry.v6only == Some(true) {
        set(V6ONLY, 1)?;
    }
    set(general(libc::SO_REUSEADDR), 1)?;
    set(general(libc::SO_REUSEPORT), 1)?;
    Ok(file)
}

fn make(entry: &InetSkEntry, from: &End, to: &End) -> Result<OwnedFd, ExecuteError> {
    let file = make_sharing(entry)?;
    let what = || entry.ino.to_string();
    let raw = entry.r#type == libc::SOCK_RAW.cast_unsigned();
    // The port of a raw socket is its protocol.
    if !from.is_unspecified() || (from.port != 0 && !raw) {
        bind_to(file.as_fd(), entry, from)?;
    }
    if entry.state == LISTEN {
        let listening = listen(file.as_fd(), entry.backlog);
        at_address(listening, (entry, from), "Listening on internet socket")?;
    }
    if to.port != 0 || (raw && !to.is_unspecified()) {
        let address = to.to_sockaddr(entry.family, 0);
        connect(file.as_fd(), &address).during("Connecting internet socket", what)?;
    }
    Ok(file)
}

/// A socket whose connection was given up.
fn make_closed(entry: &InetSkEntry) -> Result<OwnedFd, ExecuteError> {
    let file = make_sharing(entry)?;
    // Fails with ENOTCONN and yet notes that both directions are shut.
    match shutdown(file.as_fd(), libc::SHUT_RDWR) {
        Err(error) if error.raw_os_error() != Some(libc::ENOTCONN) => {
            Err(error).during("Shutting down internet socket", || entry.ino.to_string())
        }
        _ => Ok(file),
    }
}

/// Binds to an address. IPv6 addresses may still be tentative, which only freebind allows.
pub(super) fn bind_to(
    file: BorrowedFd<'_>,
    entry: &InetSkEntry,
    from: &End,
) -> Result<(), ExecuteError> {
    const FREEBIND: SocketOption = SocketOption(libc::IPPROTO_IP, libc::IP_FREEBIND);
    let what = || entry.ino.to_string();
    let saved = entry
        .ip_opts
        .as_ref()
        .is_some_and(|options| options.freebind == Some(true));
    let v6 = entry.family == libc::AF_INET6.cast_unsigned();
    let freely = saved || (v6 && entry.r#type != libc::SOCK_RAW.cast_unsigned());
    if freely {
        set_option_number(file, FREEBIND, 1).during("Preparing internet socket", what)?;
    }
    let scope = match &entry.ifname {
        Some(device) => rustix::net::netdevice::name_to_index(file, device)
            .during("Finding network device", || device.clone())?,
        None => 0,
    };
    let bound = bind(file, &from.to_sockaddr(entry.family, scope));
    at_address(bound, (entry, from), "Binding internet socket")?;
    if freely && !saved {
        set_option_number(file, FREEBIND, 0).during("Preparing internet socket", what)?;
    }
    Ok(())
}

/// Says what of the address is in the way where `bind` or `listen` failed.
fn at_address(
    result: io::Result<()>,
    (entry, from): (&InetSkEntry, &End),
    action: &'static str,
) -> Result<(), ExecuteError> {
    let fault = result
        .as_ref()
        .err()
        .and_then(|error| AddressFault::of(error, entry, from));
    match fault {
        Some(fault) => Err(ExecuteError::Address(fault)),
        None => result.during(action, || format!("{} to port {}", entry.ino, from.port)),
    }
}

/// Gives a socket its options and its own rules about sharing its port.
fn finish(world: &mut World<'_>, entry: &InetSkEntry) -> Result<(), ExecuteError> {
    let file = world.file(entry.id)?;
    let what = || entry.ino.to_string();
    set_flags(file, entry.flags)?;
    set_ip_options(file, entry)?;
    set_options(file, &entry.opts)?;
    if let Some(options) = entry.tcp_opts.as_ref().filter(|_| is_tcp(entry)) {
        set_tcp_options(file, options)?;
    }
    let kind = [entry.family, entry.r#type, entry.proto].map(u32::cast_signed);
    more_options::set(file, kind.into(), entry.ino, &entry.opts.floe_more);
    for (name, shared) in [
        (libc::SO_REUSEADDR, entry.opts.reuseaddr),
        (libc::SO_REUSEPORT, entry.opts.so_reuseport),
    ] {
        let shared = i32::from(shared.unwrap_or(false));
        set_option_number(file, general(name), shared)
            .during("Setting the sharing of internet socket", what)?;
    }
    let file = file
        .try_clone_to_owned()
        .during("Duplicating internet socket", what)?;
    let rebuilt = world
        .state::<Network>()
        .rebuilt
        .iter()
        .find(|one| one.id == entry.id);
    if let Some(rebuilt) = rebuilt {
        return rebuilt.finish(file.as_fd(), entry);
    }
    let how = match entry.shutdown.unwrap_or(0) {
        1 => libc::SHUT_RD,
        2 => libc::SHUT_WR,
        3 => libc::SHUT_RDWR,
        _ => return Ok(()),
    };
    match shutdown(file.as_fd(), how) {
        Err(error) if error.raw_os_error() != Some(libc::ENOTCONN) => {
            Err(error).during("Shutting down internet socket", what)
        }
        _ => Ok(()),
    }
}

fn is_tcp(entry: &InetSkEntry) -> bool {
    entry.proto == libc::IPPROTO_TCP.cast_unsigned()
        && entry.r#type == libc::SOCK_STREAM.cast_unsigned()
}

/// Unlocks the network and lets the connections of the tree go on. The last thing before its tasks run.
pub fn release_connections(world: &mut World<'_>) -> Result<(), ExecuteError> {
    let network = std::mem::take(world.state::<Network>());
    let inventory = &world.images.inventory;
    let dumped = match inventory.network_lock_method {
        Some(1) => NetworkLock::Nftables,
        Some(2) => NetworkLock::Skip,
        _ => NetworkLock::Iptables,
    };
    let left = Left {
        method: dumped,
        run_id: inventory.dump_criu_run_id.as_deref(),
    };
    drop(network.lock);
    if !network.flows.is_empty() {
        left.unlock(&Scope::Flows(network.flows), None)?;
    }
    unlock_networks(world, left)?;
    for one in network.rebuilt {
        let file = world.file(one.id)?;
        one.go_on(file)?;
    }
    Ok(())
}
