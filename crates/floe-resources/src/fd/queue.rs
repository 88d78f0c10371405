//! Descriptors of POSIX message queues (`mq_open(3)`).
//!
//! Saved:    as a file with the queue's name, flags, owner; that it is a queue, with the queue
//!           ([`crate::ipc::posix`]).
//! Rebuilt:  opened by name; a queue without one is made, opened for all who have it, and unlinked again.
//!           Needs: the namespace. The notification is asked for again by the task that had asked.
//! Not kept: nothing.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;

use floe_image::ImageKind;
use floe_image::messages::{FdTypes, FileEntry, PosixNotifyEntry, PosixQueueEntry, RegFileEntry};
use floe_inject::{Arg, Program};
use floe_kernel::mqueue;
use floe_kernel::namespace::NsKind;
use floe_plan::Handle;
use rustix::fs::{FileType, OFlags};

use super::{FdKind, file_entry, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId};
use crate::ipc::posix::{self, OpenQueue};
use crate::namespace::ids;
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, TreeImages, World, plan_owner};

/// `statfs(2)`.
const MQUEUE_MAGIC: i64 = 0x1980_0202;
/// What the kernel adds to the name of a file without one.
const DELETED: &str = " (deleted)";

/// See the module.
pub struct PosixQueue;

impl FdKind for PosixQueue {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        // Queues that were opened through a mount have its path before their name.
        let is_name = |target: &[u8]| target.starts_with(b"/") && !target[1..].contains(&b'/');
        fd.file_type() == FileType::RegularFile
            && is_name(fd.target())
            && !fd.is_path()
            && rustix::fs::fstatfs(fd.file()).is_ok_and(|stat| stat.f_type == MQUEUE_MAGIC)
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let garbled = |_| fd.garbled("the name of a queue");
        let name = std::str::from_utf8(fd.target()).map_err(garbled)?;
        let unlinked = fd.stat().st_nlink == 0;
        let name = match unlinked {
            true => name.strip_suffix(DELETED).unwrap_or(name),
            false => name,
        };
        let file = fd.file().try_clone_to_owned();
        let queue = OpenQueue {
            pid: fd.pid(),
            name: name.trim_start_matches('/').to_string(),
            unlinked,
            file: file.map_err(|source| fd.failed("Duplicating", source))?,
            id: id.0,
        };
        posix::add(queue, collector);
        let entry = RegFileEntry {
            id: id.0,
            flags: fd.flags(),
            fown: fd.owner()?,
            name: name.to_string(),
            ..RegFileEntry::default()
        };
        Ok(FileEntry {
            reg: Some(entry),
            ..file_entry(FdTypes::Reg, id)
        })
    }
}

/// The queues of the images, by the entries of their descriptors.
pub struct Queues(HashMap<u32, PosixQueueEntry>);

impl Queues {
    /// Reads them, and adds the steps that ask for notifications again.
    pub fn plan(planner: &mut Planner<'_>) -> Result<Self, PlanError> {
        let all: Vec<PosixQueueEntry> = planner.images.dir.read_all(ImageKind::PosixQueues, 0)?;
        let mut by_file = HashMap::new();
        for queue in all {
            check_namespace(&queue, planner.images)?;
            if let Some(notify) = &queue.notify {
                plan_notification(&queue, notify, planner)?;
            }
            for file in &queue.files {
                by_file.insert(*file, queue.clone());
            }
        }
        Ok(Queues(by_file))
    }

    /// Adds the step that opens a descriptor, if it is of a queue.
    pub fn plan_descriptor<'i>(
        &self,
        file: &'i FileEntry,
        planner: &mut Planner<'i>,
    ) -> Result<bool, PlanError> {
        let Some(queue) = self.0.get(&file.id).cloned() else {
            return Ok(false);
        };
        let entry = payload(file, &file.reg)?;
        let first = queue.files.iter().min().copied().unwrap_or(file.id);
        let waits = queue.unlinked == Some(true) && first != file.id;
        let needs: Vec<Handle> = waits.then_some(Handle::File(first)).into_iter().collect();
        let name = format!("open the POSIX queue /{}", queue.name);
        let images = planner.images;
        planner.open(entry.id, name, &needs, move |world| {
            match (queue.unlinked == Some(true), waits) {
                (false, _) => at_place(world, &queue, |_| open(&queue.name, entry.flags)),
                (true, false) => open_unlinked(world, (&queue, images), entry.id),
                (true, true) => {
                    let opened = world.state::<Opened>().0.remove(&entry.id);
                    let opened = opened.ok_or(rustix::io::Errno::BADF);
                    opened.during("Finding the POSIX queue", || queue.name.clone())
                }
            }
        });
        plan_owner(planner, entry.id, &entry.fown);
        Ok(true)
    }
}

/// A queue beside those of the root is in an IPC namespace of some task.
fn check_namespace(queue: &PosixQueueEntry, images: &TreeImages) -> Result<(), PlanError> {
    let mut tasks = images.tasks.iter().filter_map(|task| task.ids.as_ref());
    match queue.namespace {
        Some(_) if !tasks.any(|own| ids::get(own, NsKind::Ipc) == queue.namespace) => {
            let what = format!("no task is in the namespace of queue /{}", queue.name);
            Err(PlanError::damaged("posix-queues.img", what))
        }
        _ => Ok(()),
    }
}

/// Descriptors of queues without a name, until their own step takes them.
#[derive(Default)]
struct Opened(BTreeMap<u32, OwnedFd>);

/// Does something in the IPC namespace that a queue is of.
fn at_place<T>(
    world: &mut World<'_>,
    queue: &PosixQueueEntry,
    work: impl FnOnce(&mut World<'_>) -> Result<T, ExecuteError>,
) -> Result<T, ExecuteError> {
    if let Some(id) = queue.namespace {
        let done = world.in_namespace(id, |world| work(world));
        world.go_inside()?;
        return done;
    }
    if queue.outside != Some(true) {
        return work(world);
    }
    world.go_home();
    let done = work(world);
    world.go_inside()?;
    done
}

fn open(name: &str, flags: u32) -> Result<OwnedFd, ExecuteError> {
    let kept = OFlags::ACCMODE | OFlags::NONBLOCK;
    let flags = (OFlags::from_bits_retain(flags) & kept) | OFlags::CLOEXEC;
    mqueue::open(name, flags.bits()).during("Opening the POSIX queue", || name.to_string())
}

/// Makes a queue and opens it for all its descriptors before its name goes; returns that of `id`.
fn open_unlinked(
    world: &mut World<'_>,
    (queue, images): (&PosixQueueEntry, &TreeImages),
    id: u32,
) -> Result<OwnedFd, ExecuteError> {
    at_place(world, queue, |world| {
        // Its old name may be that of another queue by now.
        let taken = mqueue::open(&queue.name, 0).is_ok();
        let name = match taken {
            true => format!("{}.floe.{id:x}", queue.name),
            false => queue.name.clone(),
        };
        let made = posix::make(queue, &name, &images.owners)?;
        let mut own = None;
        let mut opened = Ok(());
        for file in &queue.files {
            let flags = images.files.get(file).and_then(|file| file.reg.as_ref());
            match open(&name, flags.map_or(0, |entry| entry.flags)) {
                Ok(descriptor) if *file == id => own = Some(descriptor),
                Ok(descriptor) => {
                    let lifted = world.lift(descriptor)?;
                    world.state::<Opened>().0.insert(*file, lifted);
                }
                Err(error) => opened = Err(error),
            }
        }
        drop(made);
        mqueue::unlink(&name).during("Unlinking the POSIX queue", || name.clone())?;
        opened?;
        let own = own.ok_or(rustix::io::Errno::BADF);
        own.during("Opening the POSIX queue", || name)
    })
}

/// The task that had asked to be notified asks again.
fn plan_notification(
    queue: &PosixQueueEntry,
    notify: &PosixNotifyEntry,
    planner: &mut Planner<'_>,
) -> Result<(), PlanError> {
    let images = planner.images;
    let pid = notify.pid;
    let damaged = || {
        let what = format!(
            "task {pid}, to be notified, has no descriptor of /{}",
            queue.name
        );
        PlanError::damaged("posix-queues.img", what)
    };
    let task = images.task(pid).ok_or_else(damaged)?;
    let mut sharers = images.tasks.iter();
    let number = sharers.find_map(|other| {
        let same = other.files_id() == task.files_id();
        let found = other.fds.iter().find(|fd| queue.files.contains(&fd.id));
        found.filter(|_| same).map(|fd| fd.fd)
    });
    let number = number.ok_or_else(damaged)?;
    let event = posix::event_of(notify);
    let name = format!("ask for the notification of /{}", queue.name);
    let makes = [Handle::Object("notification", u64::from(queue.files[0]))];
    planner.task_step(
        pid,
        name,
        (&[Handle::Descriptors(pid)], &makes),
        move |world| {
            let mut program = Program::new();
            let event = program.buffer(&event);
            let args = [Arg::from(number), Arg::from(event)];
            program.call("mq_notify", libc::SYS_mq_notify, &args);
            world.run(pid, &program).map(drop)
        },
    );
    Ok(())
}
