//! Rebuilding unix sockets: made, connected, filled, finished, in this order for each.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use floe_image::messages::UnixSkEntry;
use floe_kernel::socket::{connect, listen, shutdown, socket};
use floe_options::{InheritFd, Need};
use floe_plan::Handle;

use super::super::socket_options::set_options;
use super::super::socket_queue::{Message, Queues, rights_of, send_queue};
use super::name::{LONGEST, address, bind_socket, is_path, reach};
use super::named::connection;
use super::peers::{Peers, Role};
use super::{ESTABLISHED, LISTEN};
use crate::mount;
use crate::net::SocketPlace;
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, World, plan_owner, set_flags};

/// Sockets that exist only to send what others have not read.
#[derive(Default)]
struct Senders(HashMap<u32, OwnedFd>);

fn connected(id: u32) -> Handle {
    Handle::Object("connected unix socket", u64::from(id))
}

fn filled(id: u32) -> Handle {
    Handle::Object("filled unix socket", u64::from(id))
}

/// Adds the steps of every unix socket.
pub(super) fn plan_all(planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let entries: Vec<&UnixSkEntry> = planner
        .images
        .files
        .values()
        .filter_map(|file| file.usk.as_ref())
        .collect();
    for entry in &entries {
        check(entry)?;
    }
    let peers = Peers::new(&entries)?;
    let mut queues = Queues::load(planner)?;
    // A file may bear the name that a deleted one had, so deleted ones come first.
    let deleted = entries.iter().filter(|entry| binds(entry, true));
    let ghosts: Vec<u32> = deleted.map(|entry| entry.id).collect();
    for &(entry, role) in &peers.sockets {
        let queue = queues.take(entry.id);
        if role == Role::External {
            planner.consume("files.img", u64::from(entry.id));
            continue;
        }
        if let Some(given) = inherited(planner, entry) {
            plan_inherited(planner, entry, given, role);
            continue;
        }
        let mut needs = before_binding(&peers, (entry, role), &ghosts);
        needs.extend(peers.before_listening(entry).into_iter().map(Handle::File));
        plan_making(planner, &peers, (entry, role), (&needs, !queue.is_empty()))?;
        plan_connecting(planner, &peers, entry, role)?;
        plan_filling(planner, entry, role, queue);
        plan_finishing(planner, entry, role);
        plan_owner(planner, entry.id, &entry.fown);
    }
    match queues.left() {
        None => Ok(()),
        Some(id) => Err(PlanError::damaged(
            "sk-queues.img",
            format!("messages wait in file {id:#x}, which is no unix socket"),
        )),
    }
}

/// Whether the socket will be bound to a path, one that is deleted or one that is not.
fn binds(entry: &UnixSkEntry, deleted: bool) -> bool {
    is_path(entry) && may_bind(entry) && entry.deleted.unwrap_or(false) == deleted
}

/// The sockets with deleted names that must be there before this one, and its pair, are bound.
fn before_binding(
    peers: &Peers<'_>,
    (entry, role): (&UnixSkEntry, Role),
    ghosts: &[u32],
) -> Vec<Handle> {
    let peer = match role {
        Role::PairWith(peer) => peers.entry(peer),
        _ => None,
    };
    let own = std::iter::once(entry).chain(peer);
    if !own.clone().any(|entry| binds(entry, false)) {
        return Vec::new();
    }
    let others = ghosts
        .iter()
        .filter(|ghost| !own.clone().any(|entry| entry.id == **ghost));
    others.map(|id| Handle::File(*id)).collect()
}

fn check(entry: &UnixSkEntry) -> Result<(), PlanError> {
    if entry.name.len() > LONGEST {
        let what = format!("the name of unix socket {} is too long", entry.ino);
        return Err(PlanError::damaged("files.img", what));
    }
    Ok(())
}

/// The caller's descriptor that stands for the socket.
pub(super) fn inherited<'i>(planner: &Planner<'i>, entry: &UnixSkEntry) -> Option<&'i InheritFd> {
    let name = format!("socket:[{}]", entry.ino);
    planner
        .options
        .inherit_fds
        .iter()
        .find(|given| given.resource == name)
}

fn plan_inherited<'i>(
    planner: &mut Planner<'i>,
    entry: &'i UnixSkEntry,
    given: &'i InheritFd,
    role: Role,
) {
    let name = format!("take fd {} as unix socket {}", given.fd, entry.ino);
    planner.open(entry.id, name, &[], move |_| {
        let taken = floe_kernel::inherited::duplicate(given.fd)
            .during("Taking over fd", || given.fd.to_string())?;
        let kind = rustix::net::sockopt::socket_type(&taken);
        let kind = kind.during("Taking over as a socket fd", || given.fd.to_string())?;
        if kind.as_raw() != entry.r#type {
            let object = format!(
                "Unix socket {} from fd {}, which is of another type,",
                entry.ino, given.fd
            );
            let remedy =
                "hand over a socket of its own type (SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET)";
            return Err(ExecuteError::from_plan(PlanError::Unsupported {
                object,
                remedy,
            }));
        }
        Ok(taken)
    });
    // Nothing else is done to it, but a peer may wait for it.
    planner.step(
        "use it as it is",
        (&[Handle::File(entry.id)], &[filled(entry.id)]),
        |_| Ok(()),
    );
    if matches!(role, Role::ConnectTo(_)) {
        let handles = (&[Handle::File(entry.id)][..], &[connected(entry.id)][..]);
        planner.step("use it as it is", handles, |_| Ok(()));
    }
}

fn plan_making<'i>(
    planner: &mut Planner<'i>,
    peers: &Peers<'i>,
    (entry, role): (&'i UnixSkEntry, Role),
    (needs, has_queue): (&[Handle], bool),
) -> Result<(), PlanError> {
    let name = format!("make unix socket {}", entry.ino);
    let place = SocketPlace::new(planner, entry.ns_id);
    let needs = &[needs, &place.needs()].concat();
    match role {
        Role::PairOf(_) | Role::External => Ok(()),
        Role::PairWith(peer) => {
            let peer = peers.entry(peer).expect("the role was found by it");
            if peer.r#type != entry.r#type {
                let what = format!("unix sockets {} and {} differ in type", entry.ino, peer.ino);
                return Err(PlanError::damaged("files.img", what));
            }
            planner.consume("files.img", u64::from(entry.id));
            planner.consume("files.img", u64::from(peer.id));
            let makes = [Handle::File(entry.id), Handle::File(peer.id)];
            let accepted = peers.accepted((entry, Some(peer)));
            let name = format!("make unix sockets {} and {}", entry.ino, peer.ino);
            planner.step(name, (needs, &makes), move |world| {
                place.visit(world, |world| make_pair(world, (entry, peer), accepted))
            });
            Ok(())
        }
        Role::Orphan => {
            planner.open(entry.id, name, needs, move |world| {
                place.visit(world, |world| make_with_sender(world, entry))
            });
            Ok(())
        }
        Role::Alone | Role::ConnectTo(_) => {
            let datagrams = entry.r#type == libc::SOCK_DGRAM.cast_unsigned();
            planner.open(entry.id, name, needs, move |world| {
                place.visit(world, |world| {
                    if datagrams && has_queue {
                        make_with_sender(world, entry)
                    } else {
                        make(world, entry)
                    }
                })
            });
            Ok(())
        }
    }
}

/// A connected stream's name is its listener's, and stays with that one.
fn may_bind(entry: &UnixSkEntry) -> bool {
    entry.r#type == libc::SOCK_DGRAM.cast_unsigned() || entry.state != ESTABLISHED
}

fn bind_if_free(
    world: &mut World<'_>,
    file: BorrowedFd<'_>,
    entry: &UnixSkEntry,
) -> Result<(), ExecuteError> {
    if may_bind(entry) {
        mount::in_place_of(world, entry.mnt_id, |world| bind_socket(world, file, entry))
    } else {
        Ok(())
    }
}

fn make_pair(
    world: &mut World<'_>,
    (entry, peer): (&UnixSkEntry, &UnixSkEntry),
    accepted: Option<&UnixSkEntry>,
) -> Result<(), ExecuteError> {
    let (one, other) = connection(world, (entry, Some(peer)), accepted)?;
    bind_if_free(world, one.as_fd(), entry)?;
    bind_if_free(world, other.as_fd(), peer)?;
    world.keep_file(entry.id, one)?;
    world.keep_file(peer.id, other)
}

/// A socket whose unread messages come from one that nobody else has.
fn make_with_sender(world: &mut World<'_>, entry: &UnixSkEntry) -> Result<OwnedFd, ExecuteError> {
    let what = || entry.ino.to_string();
    let kind = entry.r#type.cast_signed();
    let (file, sender) = connection(
        world,
        (entry, None),
        Some(entry).filter(|end| !end.name.is_empty()),
    )?;
    if kind == libc::SOCK_DGRAM {
        // Else the socket would take messages from the sender only. This empties its queue too.
        let nobody = (libc::AF_UNSPEC as u16).to_ne_bytes();
        connect(file.as_fd(), &nobody).during("Disconnecting unix socket", what)?;
    }
    bind_if_free(world, file.as_fd(), entry)?;
    let sender = world.lift(sender)?;
    world.state::<Senders>().0.insert(entry.id, sender);
    Ok(file)
}

fn make(world: &mut World<'_>, entry: &UnixSkEntry) -> Result<OwnedFd, ExecuteError> {
    let what = || entry.ino.to_string();
    let file =
        socket(libc::AF_UNIX, entry.r#type.cast_signed(), 0).during("Making unix socket", what)?;
    bind_if_free(world, file.as_fd(), entry)?;
    if entry.state == LISTEN {
        listen(file.as_fd(), entry.backlog).during("Listening on unix socket", what)?;
    }
    Ok(file)
}

fn plan_connecting<'i>(
    planner: &mut Planner<'i>,
    peers: &Peers<'i>,
    entry: &'i UnixSkEntry,
    role: Role,
) -> Result<(), PlanError> {
    let Role::ConnectTo(peer) = role else {
        return Ok(());
    };
    let peer = peers.entry(peer).expect("the role was found by it");
    if peer.name.is_empty() {
        let what = format!("unix socket {} is connected to a nameless one", entry.ino);
        return Err(PlanError::damaged("files.img", what));
    }
    let outside = peers.sockets.contains(&(peer, Role::External));
    if outside && !planner.options.sockets.external_unix {
        return Err(PlanError::NeedsOption {
            object: format!(
                "Unix socket {}, connected to {} outside of the tree,",
                entry.ino,
                super::name::shown(&peer.name)
            ),
            need: Need::UnixPeer(entry.ino),
        });
    }
    // Once connected, a datagram socket takes messages from its peer only.
    let mut needs = vec![Handle::File(entry.id)];
    if entry.r#type == libc::SOCK_DGRAM.cast_unsigned() {
        needs.push(filled(entry.id));
    }
    if !outside {
        needs.push(Handle::File(peer.id));
    }
    let name = format!("connect unix socket {} to {}", entry.ino, peer.ino);
    planner.step(name, (&needs, &[connected(entry.id)]), move |world| {
        let what = || format!("{} to {}", entry.ino, super::name::shown(&peer.name));
        let (target, _file) = if outside {
            (address(&peer.name), None)
        } else {
            reach(world.file(peer.id)?, peer).during("Finding the peer of unix socket", what)?
        };
        connect(world.file(entry.id)?, &target).during("Connecting unix socket", what)
    });
    Ok(())
}

fn plan_filling(planner: &mut Planner<'_>, entry: &UnixSkEntry, role: Role, queue: Vec<Message>) {
    let id = entry.id;
    let mut needs = vec![Handle::File(id)];
    needs.extend(rights_of(&queue).map(Handle::File));
    let name = format!(
        "put {} unread messages into unix socket {}",
        queue.len(),
        entry.ino
    );
    planner.step(name, (&needs, &[filled(id)]), move |world| {
        if queue.is_empty() {
            return Ok(());
        }
        let sender = match role {
            Role::PairWith(peer) | Role::PairOf(peer) => world.file(peer)?.try_clone_to_owned(),
            _ => match world.state::<Senders>().0.remove(&id) {
                Some(sender) => Ok(sender),
                None => Err(std::io::Error::from_raw_os_error(libc::ENOTCONN)),
            },
        };
        let sender = sender.during("Finding who sends to file", || format!("{id:#x}"))?;
        send_queue(world, sender.as_fd(), &queue)
    });
}

/// Options and shut directions would be in the way before.
fn plan_finishing<'i>(planner: &mut Planner<'i>, entry: &'i UnixSkEntry, role: Role) {
    let mut needs = vec![filled(entry.id)];
    match role {
        Role::PairWith(peer) | Role::PairOf(peer) => needs.push(filled(peer)),
        Role::ConnectTo(_) => needs.push(connected(entry.id)),
        _ => {}
    }
    let done = Handle::Object("finished unix socket", u64::from(entry.id));
    let name = format!("finish unix socket {}", entry.ino);
    planner.step(name, (&needs, &[done]), move |world| finish(world, entry));
}

fn finish(world: &mut World<'_>, entry: &UnixSkEntry) -> Result<(), ExecuteError> {
    // The end of the sender is what an orphan sees of its peer.
    world.state::<Senders>().0.remove(&entry.id);
    let file = world.file(entry.id)?;
    set_flags(file, entry.flags)?;
    set_options(file, &entry.opts)?;
    let how = match entry.shutdown.unwrap_or(0) {
        1 => libc::SHUT_RD,
        2 => libc::SHUT_WR,
        3 => libc::SHUT_RDWR,
        _ => return Ok(()),
    };
    match shutdown(file, how) {
        // Its other end has gone, and with it what could be shut.
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => Ok(()),
        other => other.during("Shutting down unix socket", || entry.ino.to_string()),
    }
}
