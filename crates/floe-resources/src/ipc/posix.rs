//! POSIX message queues (`mq_overview(7)`).
//!
//! Saved:    in an image of our own: name, permissions, owner and size of each queue of the tree's namespaces,
//!           and of those of any that are open without a name; their messages; who is notified by which
//!           signal. Of named queues of the host's namespace only the name: they stay there.
//! Rebuilt:  made with their sizes, then the messages are sent again. Needs: the namespace and its limits.
//! Not kept: times.

mod telling;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use floe_image::ImageKind;
use floe_image::messages::{PosixMessageEntry, PosixNotifyEntry, PosixQueueEntry};
use floe_kernel::ids::HostPid;
use floe_kernel::mount::new_mount;
use floe_kernel::mqueue::{self, Attributes};
use floe_kernel::namespace::{NsKind, own_fd_path};
use floe_plan::Handle;
use rustix::fs::{Dir, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use telling::AllTelling;
pub use telling::{Telling, event_of, take_telling, write_telling};

use super::{failed_on, limited};
use crate::collect::{CollectError, Collector, Obstacle};
use crate::namespace::{OwnerMap, TreeNamespace, made, own_of_root};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner};

/// Notification by a thread, which libraries make of a socket (`SIGEV_THREAD`).
const BY_THREAD: u32 = 2;

/// An open queue of a task.
#[derive(Debug)]
pub struct OpenQueue {
    pub pid: HostPid,
    /// Its name without the slash.
    pub name: String,
    pub unlinked: bool,
    /// Our own descriptor of it.
    pub file: OwnedFd,
    /// The entry of its description.
    pub id: u32,
}

/// The open queues found so far.
#[derive(Default)]
struct Open(Vec<OpenQueue>);

/// Whether the work at the end is known.
#[derive(Default)]
struct Begun(bool);

/// A queue that is to be saved, and our own descriptor where its messages are.
type Found = (PosixQueueEntry, Option<OwnedFd>);

trait Contained {
    /// Whether its messages are saved: they would be gone otherwise.
    fn has_content(&self) -> bool;
}

impl Contained for PosixQueueEntry {
    fn has_content(&self) -> bool {
        self.unlinked == Some(true) || self.outside != Some(true)
    }
}

/// Notes a descriptor.
pub fn add(queue: OpenQueue, collector: &mut Collector<'_>) {
    collector.cache(Open::default).0.push(queue);
    begin(collector);
}

/// Has all queues saved when all descriptors are known.
pub fn begin(collector: &mut Collector<'_>) {
    if std::mem::replace(&mut collector.cache(Begun::default).0, true) {
        return;
    }
    collector.defer(|collector| {
        let found = find_all(collector)?;
        collector.after_preflight(move |collector| {
            for (mut entry, file) in found {
                if let Some(file) = file.as_ref().filter(|_| entry.has_content()) {
                    let read = copy_messages(file, &mut entry);
                    read.map_err(failed_on("Copying the messages of queue", &entry.name))?;
                }
                match Telling::of(entry, file, collector)? {
                    Ok(telling) => collector.cache(AllTelling::default).0.push(telling),
                    Err(entry) => collector.append_side(ImageKind::PosixQueues, &entry)?,
                }
            }
            Ok(())
        });
        Ok(())
    });
}

/// The file system of queues, as an IPC namespace has it.
struct Shown {
    root: OwnedFd,
    device: u64,
}

impl Shown {
    /// That of the namespace where we are; `None` in a kernel without queues.
    fn here() -> Option<Shown> {
        let root = new_mount("mqueue", &[]).ok()?;
        let device = rustix::fs::fstat(&root).ok()?.st_dev;
        Some(Shown { root, device })
    }

    fn names(&self) -> Result<Vec<String>, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&self.root, ".", flags, Mode::empty())?;
        let mut names = Vec::new();
        for entry in Dir::new(opened)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if !matches!(name.as_str(), "." | "..") {
                names.push(name);
            }
        }
        Ok(names)
    }
}

/// Whose a queue is.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// The host's.
    Outside,
    /// Of the root task's namespace.
    Root,
    /// Of another one of the tree.
    Beside(u32),
}

/// What there is in each IPC namespace of the tree.
fn shown_inside(
    collector: &Collector<'_>,
) -> Result<Vec<(Rc<TreeNamespace>, Shown)>, CollectError> {
    let namespaces = collector.namespaces();
    let mut all = Vec::new();
    for namespace in namespaces
        .all()
        .iter()
        .filter(|one| one.kind() == NsKind::Ipc)
    {
        let _visit = namespaces.visit(&[namespace])?;
        all.extend(Shown::here().map(|shown| (Rc::clone(namespace), shown)));
    }
    Ok(all)
}

fn place_of(namespace: &TreeNamespace) -> Place {
    match namespace.of_root {
        true => Place::Root,
        false => Place::Beside(namespace.id),
    }
}

fn find_all(collector: &mut Collector<'_>) -> Result<Vec<Found>, CollectError> {
    let inside = shown_inside(collector)?;
    let mut open = std::mem::take(&mut collector.cache(Open::default).0);
    let mut found = Vec::new();
    for (namespace, shown) in &inside {
        let names = shown.names();
        for name in names.map_err(failed_on("Listing the queues of", "dev/mqueue"))? {
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&shown.root, name.as_str(), flags, Mode::empty());
            let file = file.map_err(failed_on("Opening queue", &name))?;
            let (whose, place) = ((name, namespace.member), place_of(namespace));
            found.extend(describe(whose, file, (place, &mut open), collector)?);
        }
    }
    if open.is_empty() {
        return Ok(found);
    }
    let outside = Shown::here().map(|shown| shown.device);
    while let Some(one) = open.first() {
        let device = rustix::fs::fstat(&one.file).map(|stat| stat.st_dev).ok();
        let own = (inside.iter()).find(|(_, shown)| Some(shown.device) == device);
        let place = own.map_or(Place::Outside, |(namespace, _)| place_of(namespace));
        if own.is_none() && device != outside {
            let object = format!("the queue /{} of another IPC namespace", one.name);
            let remedy = "close it, or dump the program that is in that namespace".to_string();
            let pid = one.pid;
            return Err(CollectError::Unsupported(Obstacle {
                pid,
                object,
                remedy,
            }));
        }
        let (name, pid) = (one.name.clone(), one.pid);
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(own_fd_path(&one.file), flags, Mode::empty());
        let file = file.map_err(failed_on("Opening queue", &name))?;
        found.extend(describe((name, pid), file, (place, &mut open), collector)?);
    }
    Ok(found)
}

/// The entry of a queue, with all descriptors of it, which are taken out of `open`.
fn describe(
    (name, pid): (String, HostPid),
    file: OwnedFd,
    (place, open): (Place, &mut Vec<OpenQueue>),
    collector: &mut Collector<'_>,
) -> Result<Option<Found>, CollectError> {
    let stat = rustix::fs::fstat(&file).map_err(failed_on("Looking at queue", &name))?;
    let sizes = mqueue::attributes(file.as_fd()).map_err(failed_on("Asking queue", &name))?;
    let is_it = |one: &OpenQueue| {
        let other = rustix::fs::fstat(&one.file);
        other.is_ok_and(|other| (other.st_dev, other.st_ino) == (stat.st_dev, stat.st_ino))
    };
    let (of_it, others): (Vec<_>, Vec<_>) = open.drain(..).partition(is_it);
    *open = others;
    let unlinked = of_it.iter().any(|one| one.unlinked);
    let owners = collector.owners();
    let mut entry = PosixQueueEntry {
        mode: stat.st_mode & 0o7777,
        uid: owners.uid_inside(stat.st_uid),
        gid: owners.gid_inside(stat.st_gid),
        max_messages: sizes.max_messages,
        max_size: sizes.max_size,
        unlinked: unlinked.then_some(true),
        outside: matches!(place, Place::Outside).then_some(true),
        namespace: match place {
            Place::Beside(id) => Some(id),
            Place::Outside | Place::Root => None,
        },
        files: of_it.iter().map(|one| one.id).collect(),
        name,
        ..PosixQueueEntry::default()
    };
    let has_content = entry.has_content();
    entry.notify = notification(&entry.name, &file, collector)?;
    let refuse = |object: String, remedy: &str| {
        let remedy = remedy.to_string();
        Err(CollectError::Unsupported(Obstacle {
            pid,
            object,
            remedy,
        }))
    };
    let name = &entry.name;
    match &entry.notify {
        Some(notify) if notify.kind == BY_THREAD => refuse(
            format!("the notification of queue /{name} by a thread"),
            "let the program ask for a signal, or take the notification back",
        ),
        Some(_) if has_content && sizes.messages > 0 => refuse(
            format!("queue /{name}, which has messages and a notification"),
            "dump again when the program has read its messages: taking them out would set it off",
        ),
        _ => Ok(Some((entry, Some(file)))),
    }
}

/// Who is notified of the next message, as the queue tells when it is read as a file.
fn notification(
    name: &str,
    file: &OwnedFd,
    collector: &Collector<'_>,
) -> Result<Option<PosixNotifyEntry>, CollectError> {
    let mut text = [0; 256];
    let again = file.try_clone().map(File::from);
    let length = again.and_then(|file| file.read_at(&mut text, 0));
    let length = length.map_err(failed_on("Reading queue", name))?;
    let text = String::from_utf8_lossy(&text[..length]).into_owned();
    let number = |key: &str| -> Option<u32> {
        let rest = &text[text.find(key)? + key.len()..];
        rest.split_whitespace().next()?.parse().ok()
    };
    let pid = number("NOTIFY_PID:").unwrap_or(0);
    let process = HostPid(pid.cast_signed());
    if pid == 0 || !collector.is_in_tree(process) {
        return Ok(None);
    }
    Ok(Some(PosixNotifyEntry {
        pid: collector.pids().number(process),
        kind: number(" NOTIFY:").unwrap_or(0),
        signal: number(" SIGNO:").unwrap_or(0),
        value: None,
    }))
}

/// Takes all messages out and puts them back, in their order.
fn copy_messages(file: &OwnedFd, entry: &mut PosixQueueEntry) -> io::Result<()> {
    let mut buffer = vec![0; entry.max_size as usize];
    let taken = loop {
        match mqueue::receive(file.as_fd(), &mut buffer) {
            Ok((priority, text)) => entry.messages.push(PosixMessageEntry { priority, text }),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    let sent = send_all(file, &entry.messages);
    taken.and(sent)
}

fn send_all(file: &OwnedFd, messages: &[PosixMessageEntry]) -> io::Result<()> {
    let mut messages = messages.iter();
    messages.try_for_each(|message| mqueue::send(file.as_fd(), message.priority, &message.text))
}

/// Adds the step that makes the named queues of a namespace of the tree; returns what it makes.
pub fn plan(id: u32, planner: &mut Planner<'_>) -> Result<Handle, PlanError> {
    let mut queues: Vec<PosixQueueEntry> =
        planner.images.dir.read_all(ImageKind::PosixQueues, 0)?;
    let of_root = own_of_root(planner.images, NsKind::Ipc);
    queues.retain(|queue| queue.outside != Some(true) && queue.unlinked != Some(true));
    queues.retain(|queue| queue.namespace.or(of_root) == Some(id));
    let handle = Handle::Object("POSIX queues of namespace", u64::from(id));
    let name = format!("make {} POSIX queues", queues.len());
    planner.step_at_home(name, (&[made(id), limited(id)], &[handle]), move |world| {
        world.in_namespace(id, |world| {
            let owners = &world.images.owners;
            let mut queues = queues.iter();
            queues.try_for_each(|queue| make(queue, &queue.name, owners).map(drop))
        })
    });
    Ok(handle)
}

/// Makes a queue under a name, with its messages, in the namespace where we are.
pub fn make(
    entry: &PosixQueueEntry,
    name: &str,
    owners: &OwnerMap,
) -> Result<OwnedFd, ExecuteError> {
    let what = || format!("POSIX queue /{name}");
    let sizes = Attributes {
        max_messages: entry.max_messages,
        max_size: entry.max_size,
        messages: 0,
    };
    let queue = mqueue::create(name, 0o600, &sizes).during("Making", what)?;
    let owner = (
        Uid::from_raw(owners.uid_outside(entry.uid)),
        Gid::from_raw(owners.gid_outside(entry.gid)),
    );
    rustix::fs::fchown(&queue, Some(owner.0), Some(owner.1)).during("Giving away", what)?;
    let mode = Mode::from_raw_mode(entry.mode & 0o7777);
    rustix::fs::fchmod(&queue, mode).during("Setting the permissions of", what)?;
    send_all(&queue, &entry.messages).during("Sending the messages of", what)?;
    Ok(queue)
}
