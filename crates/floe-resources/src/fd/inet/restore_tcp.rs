//! Rebuilding TCP connections in repair mode.
//!
//! The socket is bound and "connected" without a packet at the saved sequence numbers, gets what the ends had
//! agreed on, its queues and windows. Ends that were sent or received are then made to happen: ours by
//! `shutdown`, the peer's by packets that it would have sent. Unsent bytes are sent when repair is over.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use floe_image::dir::TcpStream;
use floe_image::messages::{InetSkEntry, SkOptsEntry, TcpStreamEntry};
use floe_kernel::nftables::Flow;
use floe_kernel::socket::{connect, send, shutdown};
use floe_kernel::tcp_packet::{Segment, feed};
use floe_kernel::tcp_repair::{Agreement, Queue, Repair, Window, leave, tcp_info};
use floe_plan::Handle;

use super::super::socket_options::{open_buffers, open_send_buffer, set_buffers};
use super::address::{End, outgoing};
use super::plan::{LISTENERS, LOCKED, Network, bind_to, make_sharing};
use super::tcp_state::{Ends, SYN_SENT, Sequences, agreement, window};
use crate::net::SocketPlace;
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, World};

/// Bytes put into a queue at once; the kernel has more overhead for less.
const CHUNK: usize = 64 * 1024;
/// Bytes that the kernel has memory of one piece for.
const SMALL_CHUNK: usize = 1024;
/// How long a packet on the loopback device may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// The ends of a connection have happened.
pub(super) fn ended(id: u32) -> Handle {
    Handle::Object("ended directions", u64::from(id))
}

/// All that is to be rebuilt of one connection.
struct Connection<'i> {
    entry: &'i InetSkEntry,
    from: End,
    to: End,
    flow: Flow,
    ends: Ends,
    sequences: Sequences,
    agreement: Agreement,
    window: Option<Window>,
    stream: TcpStream,
}

impl Connection<'_> {
    fn is_connecting(&self) -> bool {
        self.entry.state == SYN_SENT
    }

    fn unsent(&self) -> usize {
        let unsent = self.stream.entry.unsq_len.unwrap_or(0) as usize;
        // After the peer's own end crossed ours nothing can be appended by the usual way.
        if self.ends.sent && self.ends.received {
            0
        } else {
            unsent
        }
    }

    fn what(&self) -> String {
        format!(
            "{} (port {} to {})",
            self.entry.ino, self.from.port, self.to.port
        )
    }
}

/// Adds the steps of a connection.
pub(super) fn plan_connection<'i>(
    planner: &mut Planner<'i>,
    entry: &'i InetSkEntry,
    (from, to): (End, End),
) -> Result<(), PlanError> {
    let stream = planner.images.dir.read_tcp_stream(entry.ino.into())?;
    check(entry, &stream.entry)?;
    let connection = Connection {
        flow: outgoing(&from, &to),
        ends: Ends::of(entry.state),
        sequences: Sequences::new(entry.state, &stream.entry),
        agreement: agreement(&stream.entry)?,
        window: window(entry.state, &stream.entry),
        entry,
        from,
        to,
        stream,
    };
    let connection = std::rc::Rc::new(connection);
    let copy = connection.clone();
    let name = format!("rebuild TCP connection {}", connection.what());
    let place = SocketPlace::new(planner, entry.ns_id);
    let needs = [&[LISTENERS, LOCKED][..], &place.needs()].concat();
    planner.open(entry.id, name, &needs, move |world| {
        place.visit(world, |world| rebuild(world, &copy))
    });
    let name = format!("end directions of TCP connection {}", connection.what());
    let needs = [Handle::File(entry.id)];
    planner.step(name, (&needs, &[ended(entry.id)]), move |world| {
        place.visit(world, |world| end_directions(world, &connection))
    });
    Ok(())
}

fn check(entry: &InetSkEntry, stream: &TcpStreamEntry) -> Result<(), PlanError> {
    let image = format!("tcp-stream-{:x}.img", entry.ino);
    if stream
        .unsq_len
        .is_none_or(|unsent| unsent > stream.outq_len)
    {
        return Err(PlanError::damaged(
            image,
            "unsq_len is missing or above outq_len",
        ));
    }
    Ok(())
}

fn rebuild(world: &mut World<'_>, connection: &Connection<'_>) -> Result<OwnedFd, ExecuteError> {
    let file = make_sharing(connection.entry)?;
    open_buffers(file.as_fd())?;
    let during =
        |result: io::Result<()>| result.during("Rebuilding TCP connection", || connection.what());
    let copy = file
        .try_clone()
        .during("Duplicating", || connection.what())?;
    let repair = Repair::enter(copy).during("Switching TCP repair on for", || connection.what())?;
    let sequences = connection.sequences;
    bind_to(file.as_fd(), connection.entry, &connection.from)?;
    let first = sequences
        .send_start
        .wrapping_sub(connection.is_connecting().into());
    during(repair.set_sequence(Queue::Receive, sequences.receive_start))?;
    during(repair.set_sequence(Queue::Send, first))?;
    if !connection.is_connecting() {
        let address = connection.to.to_sockaddr(connection.entry.family, 0);
        during(connect(file.as_fd(), &address))?;
        during(repair.set_agreement(&connection.agreement))?;
        fill(&repair, connection)?;
        if let Some(window) = &connection.window {
            let set = repair.set_window(window);
            set.during("Setting the window of TCP connection", || connection.what())?;
        }
    }
    during(repair.select(Queue::None))?;
    // It stays in repair mode: if the restore fails, its end must be silent.
    repair.keep();
    let unsent = connection.stream.send_queue.len() - connection.unsent();
    world.state::<Network>().rebuilt.push(Rebuilt {
        id: connection.entry.id,
        name: connection.what(),
        reuse_address: connection.entry.opts.reuseaddr.unwrap_or(false).into(),
        unsent: connection.stream.send_queue[unsent..].to_vec(),
        end_after: connection.ends.sent && connection.unsent() > 0,
        buffers: connection.entry.opts.clone(),
        connect_to: connection
            .is_connecting()
            .then(|| connection.to.to_sockaddr(connection.entry.family, 0)),
    });
    Ok(file)
}

/// Puts back received bytes, and those that were sent and not acknowledged.
fn fill(repair: &Repair, connection: &Connection<'_>) -> Result<(), ExecuteError> {
    let sent = connection.stream.send_queue.len() - connection.unsent();
    let queues = [
        (Queue::Receive, &connection.stream.receive_queue[..]),
        (Queue::Send, &connection.stream.send_queue[..sent]),
    ];
    for (queue, bytes) in queues {
        if bytes.is_empty() {
            continue;
        }
        let what = || format!("{} ({queue:?}, {} bytes)", connection.what(), bytes.len());
        repair
            .select(queue)
            .during("Filling TCP connection", what)?;
        append_all(repair, bytes).during("Filling TCP connection", what)?;
    }
    Ok(())
}

/// Appends all bytes to the selected queue, in smaller pieces where memory is scattered.
fn append_all(repair: &Repair, mut rest: &[u8]) -> io::Result<()> {
    let mut chunk = CHUNK;
    while !rest.is_empty() {
        match repair.append(&rest[..rest.len().min(chunk)]) {
            Ok(done) => rest = &rest[done..],
            Err(error) if error.kind() == io::ErrorKind::OutOfMemory && chunk > SMALL_CHUNK => {
                chunk /= 2;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Lets the ends of both directions happen again, in their order.
fn end_directions(world: &mut World<'_>, connection: &Connection<'_>) -> Result<(), ExecuteError> {
    let ends = connection.ends;
    let file = world.file(connection.entry.id)?;
    let later = connection.unsent() > 0;
    let our_end = || end_sending(file).during("Ending the sending of", || connection.what());
    if ends.sent && ends.sent_first && !later {
        our_end()?;
    }
    let sequences = connection.sequences;
    let window = connection.window.map_or(u32::MAX, |window| window.snd_wnd)
        >> connection.agreement.send_scale;
    let segment = Segment {
        sequence: sequences.receive_end,
        acknowledged: sequences.send_start,
        window: u16::try_from(window).unwrap_or(u16::MAX),
        fin: true,
    };
    if ends.received {
        feed_segment(connection, &segment)?;
    }
    if ends.sent && !ends.sent_first && !later {
        our_end()?;
    }
    if ends.acknowledged {
        let acknowledgement = Segment {
            acknowledged: sequences.send_end.wrapping_add(1),
            fin: false,
            ..segment
        };
        feed_segment(connection, &acknowledgement)?;
    }
    if later || !(ends.sent || ends.received) {
        return Ok(());
    }
    let wanted = connection.entry.state;
    await_state(file, wanted).during("Waiting for TCP connection", || connection.what())
}

/// Sends our end as if it were on the way: the peer gets it when it is not acknowledged in time.
fn end_sending(file: BorrowedFd<'_>) -> io::Result<()> {
    floe_kernel::tcp_repair::select(file, Queue::Send)?;
    shutdown(file, libc::SHUT_WR)?;
    floe_kernel::tcp_repair::select(file, Queue::None)
}

fn feed_segment(connection: &Connection<'_>, segment: &Segment) -> Result<(), ExecuteError> {
    feed(&connection.flow.reversed(), segment)
        .during("Making up a packet for TCP connection", || {
            connection.what()
        })
}

fn await_state(file: BorrowedFd<'_>, wanted: u32) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while u32::from(tcp_info(file)?.state.0) != wanted {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// A connection that stands ready, in repair mode.
pub(super) struct Rebuilt {
    pub id: u32,
    name: String,
    reuse_address: i32,
    unsent: Vec<u8>,
    /// Our end follows the unsent bytes.
    end_after: bool,
    buffers: SkOptsEntry,
    /// It was waiting for an answer from there.
    connect_to: Option<Vec<u8>>,
}

impl Rebuilt {
    /// What is left to do when the options are set.
    pub fn finish(&self, file: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<(), ExecuteError> {
        if !self.unsent.is_empty() {
            open_send_buffer(file)?;
        }
        const READ: i32 = 1;
        if entry.shutdown.is_some_and(|shut| shut & READ != 0) && !self.is_connecting() {
            match shutdown(file, libc::SHUT_RD) {
                // It is closed, and both directions with it.
                Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {}
                other => other.during("Shutting down TCP connection", || self.name.clone())?,
            }
        }
        Ok(())
    }

    fn is_connecting(&self) -> bool {
        self.connect_to.is_some()
    }

    /// Leaves repair mode and does what was left.
    pub fn go_on(self, file: BorrowedFd<'_>) -> Result<(), ExecuteError> {
        let what = || self.name.clone();
        leave(file, self.reuse_address).during("Switching TCP repair off for", what)?;
        if let Some(address) = &self.connect_to {
            return connect_again(file, address).during("Connecting again", what);
        }
        let mut rest = &self.unsent[..];
        while !rest.is_empty() {
            let done = send(file, rest, &[]).during("Sending the unsent bytes of", what)?;
            rest = &rest[done..];
        }
        if self.end_after {
            shutdown(file, libc::SHUT_WR).during("Ending the sending of", what)?;
        }
        if !self.unsent.is_empty() {
            set_buffers(file, &self.buffers)?;
        }
        Ok(())
    }
}

/// Starts connecting and does not wait for it.
fn connect_again(file: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    let flags = fcntl_getfl(file)?;
    fcntl_setfl(file, flags | OFlags::NONBLOCK)?;
    let result = connect(file, address);
    fcntl_setfl(file, flags)?;
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
        other => other,
    }
}
