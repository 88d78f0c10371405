//! Reading unix sockets: what `sock_diag` tells, and what only the socket itself can.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use floe_image::messages::{FdTypes, FileEntry, FilePermsEntry, SkOptsEntry, UnixSkEntry};
use floe_kernel::ids::{HostPid, TaskFd};
use floe_kernel::sock_diag::{SocketState, UnixSocket as Listed, unix_sockets};
use floe_kernel::socket::bound_file;
use floe_options::External;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::super::file_entry;
use super::super::socket_options::collect_options;
use super::super::socket_queue::{QueueOwner, save_queue};
use super::{EXTERNAL, LISTEN};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle, no_owner};
use crate::mount::Place;
use crate::net::{in_every_network, network_number};

/// `RCV_SHUTDOWN` of the kernel.
const RECEIVE_SHUT: u8 = 1;

/// Every unix socket of the machine, and what was saved of them.
struct Table {
    sockets: HashMap<u32, Listed>,
    /// Waiting clients, and the listener that each waits for.
    waiting: HashMap<u32, u32>,
    /// Sockets of the tree, by inode.
    saved: HashMap<u32, FileId>,
    /// Sockets outside of the tree that are in the images for their name, by inode.
    external: HashMap<u32, FileId>,
}

impl Table {
    fn read(collector: &Collector<'_>) -> Result<Self, CollectError> {
        let listed = in_every_network(collector, "unix sockets", unix_sockets)?;
        let pairs = listed.iter().flat_map(|listener| {
            listener
                .waiting
                .iter()
                .map(|client| (*client, listener.inode))
        });
        Ok(Table {
            waiting: pairs.collect(),
            sockets: listed
                .into_iter()
                .map(|socket| (socket.inode, socket))
                .collect(),
            saved: HashMap::new(),
            external: HashMap::new(),
        })
    }
}

fn table<'c>(collector: &'c mut Collector<'_>) -> Result<&'c mut Table, CollectError> {
    collector.try_cache(|collector| Table::read(collector))
}

/// Where a socket was found, for messages.
#[derive(Clone, Copy)]
struct At {
    pid: HostPid,
    fd: TaskFd,
    id: FileId,
    inode: u32,
}

impl At {
    fn refuse(self, what: impl std::fmt::Display, remedy: &str) -> CollectError {
        let what = format!("unix socket {}: {what}", self.inode);
        CollectError::Unsupported(Obstacle::fd(self.pid, self.fd, what, remedy))
    }
}

pub(super) fn collect(
    id: FileId,
    fd: &FdProbe<'_>,
    collector: &mut Collector<'_>,
) -> Result<FileEntry, CollectError> {
    // Inode numbers of sockets are 32 bits wide in sock_diag.
    let inode = fd.stat().st_ino as u32;
    let at = At {
        pid: fd.pid(),
        fd: fd.fd(),
        id,
        inode,
    };
    let network = network_number(fd, collector)?;
    let table = table(collector)?;
    let Some(socket) = table.sockets.get(&inode).cloned() else {
        return Err(at.refuse(
            "in no network namespace of the tree",
            "close it before the checkpoint",
        ));
    };
    table.saved.insert(inode, id);
    let mut entry = UnixSkEntry {
        id: id.0,
        ino: inode,
        r#type: socket.kind.into(),
        state: socket.state.0.into(),
        flags: fd.flags(),
        uflags: 0,
        backlog: socket.send_queue,
        peer: socket.peer,
        fown: fd.owner()?,
        opts: options(fd)?,
        name: socket.name.clone(),
        shutdown: (socket.shutdown != 0).then(|| socket.shutdown.into()),
        ns_id: network,
        ..UnixSkEntry::default()
    };
    if socket.name.first().is_some_and(|first| *first != 0) {
        let file = collect_file(fd, &mut entry)?;
        // Sockets of one name may be bound in several mount namespaces.
        let place = Place::of(file.as_fd(), collector).ok();
        entry.mnt_id = place.and_then(|place| place.mount).map(u32::cast_signed);
    }
    let copy = if has_unread(fd, &socket)? {
        let copy = fd.file().try_clone_to_owned();
        Some(copy.map_err(|error| fd.failed("Duplicating", error))?)
    } else {
        None
    };
    // Queues may hold further sockets, and peers may be found later.
    collector.defer(move |collector| finish(at, socket, copy, collector));
    Ok(FileEntry {
        usk: Some(entry),
        ..file_entry(FdTypes::Unixsk, id)
    })
}

fn options(fd: &FdProbe<'_>) -> Result<SkOptsEntry, CollectError> {
    collect_options(fd.file(), libc::AF_UNIX)
        .map_err(|error| fd.failed("Reading socket options", error))
}

/// Whether messages wait. `sock_diag` tells the length of the first datagram, which may be empty.
fn has_unread(fd: &FdProbe<'_>, socket: &Listed) -> Result<bool, CollectError> {
    if i32::from(socket.kind) != libc::SOCK_DGRAM || socket.receive_queue != 0 {
        return Ok(socket.receive_queue != 0);
    }
    let mut polled = [PollFd::from_borrowed_fd(fd.file(), PollFlags::IN)];
    rustix::event::poll(&mut polled, Some(&Timespec::default()))
        .map_err(|error| fd.failed("Polling", error))?;
    Ok(polled[0].revents().contains(PollFlags::IN))
}

/// The file that the socket is bound to, its permissions and directory.
fn collect_file(fd: &FdProbe<'_>, entry: &mut UnixSkEntry) -> Result<OwnedFd, CollectError> {
    const DELETED: &[u8] = b" (deleted)";
    let failed = |error: rustix::io::Errno| fd.failed("Looking at the bound file", error);
    let file = bound_file(fd.file()).map_err(|error| fd.failed("Opening the bound file", error))?;
    let stat = rustix::fs::fstat(&file).map_err(failed)?;
    let mut path = crate::collect::own_link(file.as_fd()).map_err(failed)?;
    if path.ends_with(DELETED) && stat.st_nlink == 0 {
        path.truncate(path.len() - DELETED.len());
        entry.deleted = Some(true);
    }
    entry.file_perms = Some(FilePermsEntry {
        mode: stat.st_mode,
        uid: fd.pids().owners().uid_inside(stat.st_uid),
        gid: fd.pids().owners().gid_inside(stat.st_gid),
    });
    let name = super::name::without_zero(&entry.name);
    if name[0] != b'/' {
        // The name was relative to what was then the working directory.
        let tail = name.strip_prefix(b"./").unwrap_or(name);
        let dir = path
            .strip_suffix(tail)
            .and_then(|dir| dir.strip_suffix(b"/"));
        let Some(dir) = dir else {
            let text = format!(
                "{} for {}",
                String::from_utf8_lossy(&path),
                String::from_utf8_lossy(name)
            );
            return Err(CollectError::Garbled {
                pid: fd.pid(),
                what: "the path of a bound socket",
                text,
            });
        };
        let dir = if dir.is_empty() { b"/" } else { dir };
        entry.name_dir = Some(String::from_utf8_lossy(dir).into_owned());
    }
    Ok(file)
}

/// What needs all sockets of the tree to be known: peers, and messages.
fn finish(
    at: At,
    socket: Listed,
    copy: Option<OwnedFd>,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    if socket.state == SocketState::LISTEN {
        return check_waiting(at, &socket, collector);
    }
    if socket.peer != 0 {
        check_peer(at, &socket, collector)?;
    } else if socket.state == SocketState::ESTABLISHED && i32::from(socket.kind) != libc::SOCK_DGRAM
    {
        find_listener(at, &socket, collector)?;
    }
    let Some(copy) = copy else {
        return Ok(());
    };
    let owner = QueueOwner {
        id: at.id,
        pid: at.pid,
        fd: at.fd,
        socket: copy,
        may_be_empty: match i32::from(socket.kind) {
            libc::SOCK_DGRAM => true,
            // At the end of a sequence an empty message comes again and again.
            libc::SOCK_SEQPACKET => socket.peer != 0 && socket.shutdown & RECEIVE_SHUT == 0,
            _ => false,
        },
    };
    save_queue(&owner, collector)
}

fn check_waiting(
    at: At,
    socket: &Listed,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let table = table(collector)?;
    for client in &socket.waiting {
        if *client == 0 {
            return Err(at.refuse(
                "a client that waits to be accepted has gone away already",
                "let the program accept its connections first",
            ));
        }
        if !table.saved.contains_key(client) {
            return Err(at.refuse(
                format!("a client outside of the tree (inode {client}) waits to be accepted"),
                "let the program accept its connections first",
            ));
        }
    }
    Ok(())
}

/// A client that waits to be accepted has no peer yet, but a listener.
fn find_listener(
    at: At,
    socket: &Listed,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    const BOTH: u8 = 3;
    let Some(listener) = table(collector)?.waiting.get(&at.inode).copied() else {
        return if socket.shutdown == BOTH {
            Ok(()) // Its peer is gone; what it left unread is saved.
        } else {
            Err(at.refuse(
                "its connection has no other end",
                "close it before the checkpoint",
            ))
        };
    };
    let Some(listener_id) = table(collector)?.saved.get(&listener).copied() else {
        return Err(at.refuse(
            format!("it waits to be accepted outside of the tree (inode {listener})"),
            "checkpoint the server too, or wait until it accepts",
        ));
    };
    collector.write_after(at.id, listener_id);
    if socket.send_queue != 0 {
        return Err(at.refuse(
            "it has sent data and waits to be accepted",
            "let the server accept its connections first",
        ));
    }
    let entry = collector.file_mut(at.id).and_then(|file| file.usk.as_mut());
    if let Some(entry) = entry {
        entry.peer = listener;
    }
    Ok(())
}

fn check_peer(at: At, socket: &Listed, collector: &mut Collector<'_>) -> Result<(), CollectError> {
    let options = collector.options;
    let table = table(collector)?;
    let peer = table.sockets.get(&socket.peer).cloned();
    let reachable =
        |peer: &Listed| peer.peer == at.inode || !peer.name.is_empty() || peer.inode == at.inode;
    let Some(peer) = peer else {
        return Err(at.refuse(
            format!("its peer (inode {}) is not listed", socket.peer),
            "checkpoint again",
        ));
    };
    if let Some(peer_id) = table.saved.get(&socket.peer).copied() {
        return if reachable(&peer) {
            // CRIU finds only peers that it has read before.
            if peer.peer != at.inode {
                collector.write_after(at.id, peer_id);
            }
            Ok(())
        } else {
            Err(at.refuse(
                format!(
                    "its peer (inode {}) cannot be reached by a name",
                    peer.inode
                ),
                "close it before the checkpoint",
            ))
        };
    }
    let inode = u64::from(at.inode);
    let declared = options.external.contains(&External::UnixSocket { inode });
    if !declared && !options.sockets.external_unix {
        return Err(at.refuse(
            format!(
                "its peer (inode {}, {}) is outside of the tree",
                peer.inode,
                super::name::shown(&peer.name)
            ),
            &format!(
                "checkpoint the peer too, or use --external 'unix[{inode}]'{}, and hand over a connected socket at the \
                 restore: --inherit-fd 'fd[N]:socket:[{inode}]'",
                match i32::from(peer.kind) == libc::SOCK_DGRAM && !peer.name.is_empty() {
                    true => " or --ext-unix-sk",
                    false => "",
                }
            ),
        ));
    }
    if !declared && i32::from(peer.kind) != libc::SOCK_DGRAM {
        return Err(at.refuse(
            "--ext-unix-sk is for datagram sockets, and this is a connection",
            &format!("use --external 'unix[{inode}]', and --inherit-fd 'fd[N]:socket:[{inode}]' at the restore"),
        ));
    }
    if !declared && peer.name.is_empty() {
        return Err(at.refuse(
            "its peer outside of the tree has no name",
            &format!("use --external 'unix[{inode}]', and --inherit-fd 'fd[N]:socket:[{inode}]' at the restore"),
        ));
    }
    let outside = match table.external.get(&peer.inode).copied() {
        Some(id) => id,
        None => {
            let id = collector.ids().fresh();
            self::table(collector)?.external.insert(peer.inode, id);
            collector.add_file(external_entry(id, &peer));
            id
        }
    };
    collector.write_after(at.id, outside);
    Ok(())
}

/// A socket outside of the tree: only its name counts.
fn external_entry(id: FileId, peer: &Listed) -> FileEntry {
    let entry = UnixSkEntry {
        id: id.0,
        ino: peer.inode,
        r#type: libc::SOCK_DGRAM.cast_unsigned(),
        state: LISTEN,
        uflags: EXTERNAL,
        name: peer.name.clone(),
        fown: no_owner(),
        ..UnixSkEntry::default()
    };
    FileEntry {
        usk: Some(entry),
        ..file_entry(FdTypes::Unixsk, id)
    }
}
