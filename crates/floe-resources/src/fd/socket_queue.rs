//! Messages in unix sockets that nobody has read (`unix(7)`).
//!
//! Saved:    bytes and descriptors of each message, looked at with `MSG_PEEK` and left where they are.
//! Rebuilt:  sent again, through the peer or a socket made for it. Needs: the descriptors that they carry.
//! Not kept: who sent a datagram to a socket that was not connected to its sender, empty ones behind others.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use floe_image::ImageKind;
use floe_image::messages::{ScmEntry, SkPacketEntry};
use floe_kernel::ids::{HostPid, TaskFd};
use floe_kernel::pidfd::Pidfd;
use floe_kernel::proc::ProcDir;
use floe_kernel::socket::{Peeked, peek, send};
use floe_kernel::sockopt::{SocketOption, option_number, set_option_number};

use super::socket_options::{general, open_buffers};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle, collect_description};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, TreeImages, World};

const PEEK_OFFSET: SocketOption = general(libc::SO_PEEK_OFF);
/// `scm_entry.type`: descriptors.
const SCM_RIGHTS: u32 = 1;
/// The biggest message that is looked for: the kernel makes no bigger buffers.
const LONGEST: usize = 1 << 30;

/// A socket whose queue is to be saved.
pub(super) struct QueueOwner {
    pub id: FileId,
    pub pid: HostPid,
    pub fd: TaskFd,
    pub socket: OwnedFd,
    /// An empty message is no end: datagrams, and packets of a sequence that is not shut.
    pub may_be_empty: bool,
}

/// Descriptors that were received by peeking; they stay open so that the ones found later can be compared.
#[derive(Default)]
struct InFlight(Vec<OwnedFd>);

/// Moves the offset at which a foreign socket is peeked; dropping it puts the old one back.
struct PeekOffset<'a> {
    socket: BorrowedFd<'a>,
    before: i32,
}

impl<'a> PeekOffset<'a> {
    fn start(socket: BorrowedFd<'a>) -> io::Result<Self> {
        let before = option_number(socket, PEEK_OFFSET)?;
        set_option_number(socket, PEEK_OFFSET, 0)?;
        Ok(PeekOffset { socket, before })
    }

    fn set(&self, offset: usize) -> io::Result<()> {
        let offset = i32::try_from(offset).map_err(|_| io::ErrorKind::InvalidData)?;
        set_option_number(self.socket, PEEK_OFFSET, offset)
    }
}

impl Drop for PeekOffset<'_> {
    fn drop(&mut self) {
        if let Err(error) = set_option_number(self.socket, PEEK_OFFSET, self.before) {
            tracing::warn!(%error, "SO_PEEK_OFF of a socket could not be put back");
        }
    }
}

/// Saves the messages of a queue, and the files in them.
pub(super) fn save_queue(
    owner: &QueueOwner,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let failed = |source| CollectError::Fd {
        pid: owner.pid,
        fd: owner.fd,
        action: "Looking at the unread messages",
        source,
    };
    let offset = PeekOffset::start(owner.socket.as_fd()).map_err(failed)?;
    let mut buffer = vec![0u8; 256 * 1024];
    let mut seen = 0;
    loop {
        let message = match peek(owner.socket.as_fd(), &mut buffer) {
            Ok(message) => message,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(failed(error)),
        };
        if message.truncated && buffer.len() < LONGEST {
            buffer.resize(buffer.len() * 4, 0);
            offset.set(seen).map_err(failed)?;
            continue;
        }
        if message.length == 0 && message.rights.is_empty() && !owner.may_be_empty {
            return Ok(()); // The end of a stream.
        }
        seen += message.length;
        let bytes = &buffer[..message.length];
        save_message(owner, message, bytes, collector)?;
    }
}

fn save_message(
    owner: &QueueOwner,
    message: Peeked,
    bytes: &[u8],
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    if message.other_control {
        let what = "unix socket with credentials in an unread message";
        let remedy = "let the program read its messages first, or switch SO_PASSCRED off";
        return Err(CollectError::Unsupported(Obstacle::fd(
            owner.pid, owner.fd, what, remedy,
        )));
    }
    let mut entry = SkPacketEntry {
        id_for: owner.id.0,
        length: bytes.len() as u32,
        scm: Vec::new(),
    };
    if !message.rights.is_empty() {
        let rights = collect_rights(owner.pid, message.rights, collector)?;
        entry.scm.push(ScmEntry {
            r#type: SCM_RIGHTS,
            rights,
        });
    }
    let image = collector.side(ImageKind::SkQueues, 0)?;
    Ok(image.append_with_extra(&entry, bytes)?)
}

/// Collects files that are in no table but in a message: through our own copies of them.
fn collect_rights(
    carrier: HostPid,
    files: Vec<OwnedFd>,
    collector: &mut Collector<'_>,
) -> Result<Vec<u32>, CollectError> {
    let ourselves = HostPid(std::process::id().cast_signed());
    let proc = ProcDir::open(ourselves)?;
    let pidfd = Pidfd::open(ourselves).map_err(|source| CollectError::Task {
        pid: ourselves,
        action: "Opening a pidfd",
        source,
    })?;
    let mut ids = Vec::with_capacity(files.len());
    for file in files {
        let fd = TaskFd(file.as_raw_fd());
        let probe = FdProbe::open(&proc, &pidfd, fd, collector)?.in_message_to(carrier);
        let (id, _) = collect_description(&probe, collector)?;
        ids.push(id.0);
        collector.cache(InFlight::default).0.push(file);
    }
    Ok(ids)
}

/// The task that gets the message in which a file is, where it is in one.
pub(super) fn carrier(images: &TreeImages, file: u32) -> Result<Option<u32>, PlanError> {
    let kind = ImageKind::SkQueues;
    let messages = images.dir.read_with_extra::<SkPacketEntry>(kind, 0)?;
    let mut wanted = BTreeSet::from([file]);
    loop {
        let carries = |message: &SkPacketEntry| {
            let mut rights = message.scm.iter().flat_map(|part| &part.rights);
            rights.any(|id| wanted.contains(id))
        };
        let sockets = messages.iter().filter(|(message, _)| carries(message));
        let sockets: Vec<u32> = sockets.map(|(message, _)| message.id_for).collect();
        if let Some(holder) = sockets.iter().flat_map(|id| images.holders(*id)).next() {
            return Ok(Some(holder.pid));
        }
        // The socket may be in a message itself.
        let known = wanted.len();
        wanted.extend(sockets);
        if wanted.len() == known {
            return Ok(None);
        }
    }
}

/// A message in the images.
#[derive(Debug)]
pub(super) struct Message {
    bytes: Vec<u8>,
    rights: Vec<u32>,
}

/// The messages of all queues, by the file that they wait in.
#[derive(Debug, Default)]
pub(super) struct Queues(HashMap<u32, Vec<Message>>);

impl Queues {
    /// Reads all queues.
    pub fn load(planner: &Planner<'_>) -> Result<Self, PlanError> {
        let dir = &planner.images.dir;
        let mut queues = Queues::default();
        for (entry, bytes) in dir.read_with_extra::<SkPacketEntry>(ImageKind::SkQueues, 0)? {
            let mut rights = Vec::new();
            for part in entry.scm {
                if part.r#type != SCM_RIGHTS {
                    let what = format!("control message of type {} is not known", part.r#type);
                    return Err(PlanError::damaged("sk-queues.img", what));
                }
                rights.extend(part.rights);
            }
            if let Some(id) = rights
                .iter()
                .find(|id| !planner.images.files.contains_key(id))
            {
                let what = format!("file {id:#x} is in a message, but not in files.img");
                return Err(PlanError::damaged("sk-queues.img", what));
            }
            queues
                .0
                .entry(entry.id_for)
                .or_default()
                .push(Message { bytes, rights });
        }
        Ok(queues)
    }

    /// Takes the queue of a file; empty where it has none.
    pub fn take(&mut self, id: u32) -> Vec<Message> {
        self.0.remove(&id).unwrap_or_default()
    }

    /// A file that has a queue which nobody took.
    pub fn left(&self) -> Option<u32> {
        self.0.keys().copied().min()
    }
}

/// The files that messages carry.
pub(super) fn rights_of(messages: &[Message]) -> impl Iterator<Item = u32> + '_ {
    messages
        .iter()
        .flat_map(|message| message.rights.iter().copied())
}

/// Sends messages through `sender`, whose buffers are left wide open.
pub(super) fn send_queue(
    world: &World<'_>,
    sender: BorrowedFd<'_>,
    messages: &[Message],
) -> Result<(), ExecuteError> {
    if messages.is_empty() {
        return Ok(());
    }
    open_buffers(sender)?;
    for message in messages {
        let mut rights = Vec::with_capacity(message.rights.len());
        for id in &message.rights {
            rights.push(world.file(*id)?);
        }
        let mut rest = &message.bytes[..];
        loop {
            let what = || format!("of {} bytes again", message.bytes.len());
            let sent = send(sender, rest, &rights).during("Sending an unread message", what)?;
            rest = &rest[sent..];
            // A stream may take a part; the descriptors went with the first one.
            rights.clear();
            if rest.is_empty() {
                break;
            }
        }
    }
    Ok(())
}
