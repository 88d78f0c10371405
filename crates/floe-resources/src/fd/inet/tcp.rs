//! Saving TCP connections.
//!
//! Saved:    both queues with sequence numbers, what the ends agreed on, windows, ends that were sent.
//! Rebuilt:  see [`super::plan`]. Needs: the network locked.
//! Not kept: round-trip times, congestion state, urgent data, sockets in SYN_RECV.
//!
//! This is the one part of collecting that changes something: the connections are locked and their sockets
//! put into repair mode, so it comes after preflight. [`HeldConnections`] owns both and undoes both.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use floe_image::ImageKind;
use floe_image::messages::{InetSkEntry, TcpStreamEntry};
use floe_inject::{Journal, RepairNote};
use floe_kernel::ids::{HostPid, TaskFd};
use floe_kernel::namespace::NsKind;
use floe_kernel::nftables::Flow;
use floe_kernel::socket::{unacknowledged_bytes, unread_bytes, unsent_bytes};
use floe_kernel::tcp_repair::{Agreed, Queue, Repair, tcp_info};

use super::address::{End, outgoing};
use super::tcp_state::Lengths;
use crate::collect::{CollectError, Collector, FdProbe, FileId};
use crate::net::external_name;
use crate::netlock::{Away, Copies, Kept, Lock, LockError, Scope};

/// How often connections within the tree are looked at again until both ends agree.
const ATTEMPTS: usize = 20;
/// How long packets within the tree get to arrive before they are looked at again.
const PAUSE: Duration = Duration::from_millis(2);

/// A connection found in preflight.
#[derive(Debug)]
struct Connection {
    id: FileId,
    inode: u32,
    pid: HostPid,
    fd: TaskFd,
    socket: OwnedFd,
    flow: Flow,
    /// The number of its network namespace in the images.
    network: Option<u32>,
}

impl Connection {
    fn failed(&self, action: &'static str) -> impl Fn(std::io::Error) -> CollectError {
        let (pid, fd) = (self.pid, self.fd);
        move |source| CollectError::Fd {
            pid,
            fd,
            action,
            source,
        }
    }
}

/// The connections found so far.
#[derive(Default)]
struct Connections(Vec<Connection>);

/// Connections that stand still: locked, their sockets in repair mode. Dropping it lets them go on.
#[derive(Debug)]
pub struct HeldConnections {
    // Dropped, and so let go, before their notes end.
    sockets: Vec<Repair>,
    notes: Vec<RepairNote>,
    locks: Vec<Lock>,
}

impl HeldConnections {
    /// Lets the connections go on. Their peers are not to notice anything.
    pub fn release(self) -> Result<(), std::io::Error> {
        let HeldConnections {
            sockets,
            locks,
            notes,
            ..
        } = self;
        drop(locks);
        let mut result = Ok(());
        for socket in sockets {
            result = result.and(socket.leave());
        }
        drop(notes);
        result
    }

    /// The tree with this root is about to end: the lock stays for the restore of the dump with this run id, and
    /// the sockets end without a word once the tree and the result have.
    pub fn persist(self, run_id: &str, root: HostPid) -> Result<SilencedConnections, LockError> {
        let HeldConnections {
            sockets,
            notes,
            locks,
        } = self;
        let kept = locks.into_iter().map(|lock| {
            let mut kept = lock.persist(run_id)?;
            kept.until_end_of(root)?;
            Ok(kept)
        });
        let locks = kept.collect::<Result<_, LockError>>()?;
        Ok(SilencedConnections {
            sockets,
            _notes: notes,
            locks,
        })
    }
}

/// Sockets in repair mode whose end is silent. Dropping it before the tree has ended lets them go on.
#[derive(Debug)]
pub struct SilencedConnections {
    sockets: Vec<Repair>,
    _notes: Vec<RepairNote>,
    locks: Vec<Kept>,
}

impl SilencedConnections {
    /// The tree has ended: ends the sockets too.
    pub fn end(mut self) {
        self.sockets.drain(..).for_each(Repair::keep);
        self.locks.drain(..).for_each(Kept::leave);
    }
}

/// Remembers a connection for [`hold_connections`].
pub(super) fn note_connection(
    entry: &InetSkEntry,
    fd: &FdProbe<'_>,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let end = |words: &[u32], port| End {
        words: words.to_vec(),
        port,
    };
    let source = end(&entry.src_addr, entry.src_port);
    let target = end(&entry.dst_addr, entry.dst_port);
    let copy = fd.file().try_clone_to_owned();
    let connection = Connection {
        id: FileId(entry.id),
        inode: entry.ino,
        pid: fd.pid(),
        fd: fd.fd(),
        socket: copy.map_err(|error| fd.failed("Duplicating", error))?,
        flow: outgoing(&source, &target),
        network: entry.ns_id,
    };
    collector.cache(Connections::default).0.push(connection);
    Ok(())
}

/// Flows whose other end is not among them.
pub(super) fn with_outside_peers(flows: &[Flow]) -> Vec<Flow> {
    let all: HashSet<&Flow> = flows.iter().collect();
    let outside = flows.iter().filter(|flow| !all.contains(&flow.reversed()));
    outside.cloned().collect()
}

/// Stops all connections that were found and saves them. To be called when nothing else is in the way.
/// With a `journal`, they go on even when this process is killed meanwhile.
pub fn hold_connections(
    collector: &mut Collector<'_>,
    journal: Option<&Arc<Journal>>,
) -> Result<HeldConnections, CollectError> {
    let connections = std::mem::take(&mut collector.cache(Connections::default).0);
    let mut held = HeldConnections {
        locks: lock(&connections, collector)?,
        sockets: Vec::with_capacity(connections.len()),
        notes: Vec::with_capacity(connections.len()),
    };
    for connection in &connections {
        let copy = connection
            .socket
            .try_clone()
            .map_err(connection.failed("Duplicating"))?;
        if let Some(journal) = journal {
            let reuse = rustix::net::sockopt::socket_reuseaddr(&copy);
            let reuse = reuse.map_err(|error| connection.failed("Asking")(error.into()))?;
            let (pid, fd) = (connection.pid, connection.fd.0);
            held.notes.push(journal.note_repair(pid, fd, reuse));
        }
        let repair = Repair::enter(copy).map_err(connection.failed("Switching TCP repair on"))?;
        held.sockets.push(repair);
    }
    let streams = read_streams(&connections, &held.sockets)?;
    for (connection, stream) in connections.iter().zip(streams) {
        let file = collector.file_mut(connection.id);
        if let Some(entry) = file.and_then(|file| file.isk.as_mut()) {
            entry.state = stream.state;
        }
        let image = collector.side(ImageKind::TcpStream, connection.inode.into())?;
        image.append(&stream.entry)?;
        image.append_raw(&stream.receive)?;
        image.append_raw(&stream.send)?;
    }
    Ok(held)
}

/// Locks what the connections are in: a namespace of the tree's own as a whole, whatever is in it, and of the
/// others the connections.
fn lock(connections: &[Connection], collector: &Collector<'_>) -> Result<Vec<Lock>, CollectError> {
    // Nobody else locks a connection that is alive.
    let method = (collector.options.sockets.network_lock, Copies::All);
    let namespaces = collector.namespaces();
    let flows_in = |tree: &dyn Fn(Option<u32>) -> bool| {
        let inside = connections.iter().filter(|one| tree(one.network));
        let flows: Vec<Flow> = inside.map(|one| one.flow.clone()).collect();
        Scope::Flows(with_outside_peers(&flows))
    };
    let all = namespaces.all().iter();
    let networks: Vec<_> = all.filter(|one| one.kind() == NsKind::Net).collect();
    let of_tree = |number: Option<u32>| networks.iter().any(|one| Some(one.id) == number);
    let here = flows_in(&|number| !of_tree(number));
    let mut locks = vec![Lock::new(method, here, None)?];
    for network in &networks {
        let external = external_name(network, collector.options).is_some();
        let scope = if external {
            flows_in(&|number| number == Some(network.id))
        } else {
            Scope::Everything
        };
        let clone = network.namespace.try_clone();
        let clone = clone.map_err(|source| CollectError::System {
            action: "Duplicating a namespace".to_string(),
            source,
        })?;
        let away = Away::new(Rc::clone(namespaces.home()), Rc::new(clone));
        locks.push(Lock::new(method, scope, Some(away))?);
    }
    Ok(locks)
}

/// A connection as it goes into its image.
#[derive(Debug)]
struct Stream {
    state: u32,
    receive: Vec<u8>,
    send: Vec<u8>,
    entry: TcpStreamEntry,
}

/// Reads all connections. Packets between two ends in the tree are not locked, so a timer may still have moved
/// bytes after the first end was read; then all are read again.
fn read_streams(
    connections: &[Connection],
    sockets: &[Repair],
) -> Result<Vec<Stream>, CollectError> {
    let read = || -> Result<Vec<Stream>, CollectError> {
        let pairs = connections.iter().zip(sockets);
        pairs
            .map(|(connection, socket)| read_stream(connection, socket))
            .collect()
    };
    // Windows move and clocks tick; sequence numbers tell whether anything was transferred.
    let moved = |stream: &Stream| {
        let entry = &stream.entry;
        (stream.state, entry.inq_seq, entry.outq_seq, entry.outq_len)
    };
    let mut before: Option<Vec<Stream>> = None;
    for attempt in 1..ATTEMPTS {
        before = match read() {
            Ok(now) => {
                let same = |before: Vec<Stream>| before.iter().map(moved).eq(now.iter().map(moved));
                if before.is_some_and(same) {
                    return Ok(now);
                }
                Some(now)
            }
            // A queue grew or shrank between counting and copying its bytes.
            Err(error) if is_moving(&error) => None,
            Err(error) => return Err(error),
        };
        if attempt > 1 {
            std::thread::sleep(PAUSE);
        }
    }
    read()
}

fn is_moving(error: &CollectError) -> bool {
    matches!(error, CollectError::Fd { source, .. } if source.kind() == ErrorKind::InvalidData)
}

fn read_stream(connection: &Connection, socket: &Repair) -> Result<Stream, CollectError> {
    let fd = socket.as_fd();
    let failed = connection.failed("Reading the TCP state");
    let state = u32::from(tcp_info(fd).map_err(&failed)?.state.0);
    let counted = Lengths {
        receive: unread_bytes(fd).map_err(&failed)?,
        send: unacknowledged_bytes(fd).map_err(&failed)?,
        unsent: unsent_bytes(fd).map_err(&failed)?,
    };
    let lengths = Lengths::from_kernel(state, counted);
    let agreement = socket.agreement().map_err(&failed)?;
    let scaled = agreement.agreed.has(Agreed::WINDOW_SCALE);
    let window = match socket.window() {
        Ok(window) => Some(window),
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => None,
        Err(error) => return Err(failed(error)),
    };
    let inq_seq = socket.sequence(Queue::Receive).map_err(&failed)?;
    let receive = socket
        .queue(Queue::Receive, lengths.receive)
        .map_err(&failed)?;
    let outq_seq = socket.sequence(Queue::Send).map_err(&failed)?;
    let send = socket.queue(Queue::Send, lengths.send).map_err(&failed)?;
    socket.select(Queue::None).map_err(&failed)?;
    let entry = TcpStreamEntry {
        inq_len: lengths.receive,
        inq_seq,
        outq_len: lengths.send,
        outq_seq,
        opt_mask: agreement.agreed.0.into(),
        snd_wscale: agreement.send_scale.into(),
        mss_clamp: agreement.mss,
        rcv_wscale: scaled.then(|| agreement.receive_scale.into()),
        timestamp: agreement
            .agreed
            .has(Agreed::TIMESTAMPS)
            .then_some(agreement.timestamp),
        unsq_len: Some(lengths.unsent),
        snd_wl1: window.map(|window| window.snd_wl1),
        snd_wnd: window.map(|window| window.snd_wnd),
        max_window: window.map(|window| window.max_window),
        rcv_wnd: window.map(|window| window.rcv_wnd),
        rcv_wup: window.map(|window| window.rcv_wup),
        ..TcpStreamEntry::default()
    };
    Ok(Stream {
        state,
        receive,
        send,
        entry,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_connections_that_leave_the_tree_are_locked() {
        let flow = |source: u8, target: u8| Flow {
            source: vec![127, 0, 0, source],
            source_port: source.into(),
            target: vec![127, 0, 0, target],
            target_port: target.into(),
        };
        let flows = [flow(1, 2), flow(2, 1), flow(1, 3)];
        assert_eq!(with_outside_peers(&flows), [flow(1, 3)]);
    }
}
