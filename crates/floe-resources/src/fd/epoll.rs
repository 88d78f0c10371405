//! Event polls (`epoll_create(2)`).
//!
//! Saved:    flags, owner, and each watched descriptor with events and data (`/proc/<pid>/fdinfo/<fd>`).
//! Rebuilt:  created, then each watch added. Needs: all descriptors of the task.
//! Not kept: the order of events that are ready.

use std::collections::HashMap;

use floe_image::messages::{EventpollFileEntry, EventpollTfdEntry, FdTypes, FileEntry};
use floe_kernel::ids::TaskFd;
use floe_kernel::kcmp::is_epoll_target;
use floe_kernel::proc::ProcDir;

use super::{FdKind, FdRestore, file_entry, payload, socket_queue};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::restore::{
    Attempt, ExecuteError, Holder, PlanError, Planner, World, plan_owner, set_flags,
};
use floe_inject::{Arg, Program};
use floe_plan::Handle;
use rustix::event::epoll::CreateFlags;
use std::os::fd::{AsFd, AsRawFd};

/// See the module.
pub struct Epoll;

impl FdKind for Epoll {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.is_anon("[eventpoll]")
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        _: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let mut watches = Vec::new();
        // The kernel numbers watches on the same descriptor number in the order of fdinfo.
        let mut seen: HashMap<u32, u32> = HashMap::new();
        for line in fd.info().values("tfd") {
            let mut watch = parse_watch(line).ok_or_else(|| fd.garbled("tfd"))?;
            let number = watch.tfd;
            let index = seen.entry(number).or_default();
            watch.tfd = find_target(fd, number, *index)?;
            watch.floe_number = (watch.tfd != number).then_some(number);
            *index += 1;
            watches.push(watch);
        }
        let entry = EventpollFileEntry {
            id: id.0,
            flags: fd.flags(),
            fown: fd.owner()?,
            tfd: watches,
        };
        Ok(FileEntry {
            epfd: Some(entry),
            ..file_entry(FdTypes::Eventpoll, id)
        })
    }
}

/// Reads `5 events: 19 data: 5 pos:0 ino:61af sdev:7` (the key `tfd:` is cut off).
fn parse_watch(line: &[u8]) -> Option<EventpollTfdEntry> {
    let text = std::str::from_utf8(line).ok()?;
    let spaced = text.replace(':', ": ");
    let mut words = spaced.split_whitespace();
    let tfd = words.next()?.parse().ok()?;
    let mut values = HashMap::new();
    while let (Some(key), Some(value)) = (words.next(), words.next()) {
        values.insert(key.trim_end_matches(':'), value);
    }
    let hex = |key| u64::from_str_radix(values.get(key)?, 16).ok();
    Some(EventpollTfdEntry {
        // Only the older image with one entry a watch uses the number of the poll here.
        id: 0,
        tfd,
        events: u32::try_from(hex("events")?).ok()?,
        data: hex("data")?,
        dev: hex("sdev").and_then(|dev| u32::try_from(dev).ok()),
        inode: hex("ino"),
        pos: values.get("pos").and_then(|pos| pos.parse().ok()),
        floe_number: None,
    })
}

/// The number in the task's table of what is watched: the number given to `epoll_ctl` may since have
/// been closed, or mean another file.
fn find_target(fd: &FdProbe<'_>, tfd: u32, index: u32) -> Result<u32, CollectError> {
    let number = TaskFd(tfd.cast_signed());
    let table = fd.table();
    let is_target =
        |candidate: TaskFd| is_epoll_target((table, candidate), fd.pid(), fd.fd(), number, index);
    match is_target(number) {
        Ok(true) => return Ok(tfd),
        Ok(false) => {}
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => {}
        Err(error) => return Err(fd.failed("Looking for a target", error)),
    }
    for candidate in ProcDir::open(table)?.list("fd")? {
        if is_target(TaskFd(candidate)).is_ok_and(|found| found) {
            return Ok(candidate.cast_unsigned());
        }
    }
    let what = format!("epoll watching closed fd {tfd}");
    let remedy = "remove the watch before closing the descriptor";
    Err(CollectError::Unsupported(Obstacle::fd(
        fd.pid(),
        fd.fd(),
        what,
        remedy,
    )))
}

impl FdRestore for Epoll {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Eventpoll
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.epfd)?;
        planner.open(entry.id, "make an epoll", &[], move |_| {
            let epoll = rustix::event::epoll::create(CreateFlags::CLOEXEC)
                .during("Making", || "an epoll".into())?;
            set_flags(epoll.as_fd(), entry.flags)?;
            Ok(epoll)
        });
        plan_owner(planner, entry.id, &entry.fown);
        if entry.tfd.is_empty() {
            return Ok(());
        }
        // A target is known by its number in the table of the task that added it.
        let holder = planner.images.holders(entry.id).first().copied();
        let pid = match holder {
            Some(holder) => Some(holder.pid),
            None => socket_queue::carrier(planner.images, entry.id)?,
        };
        let Some(pid) = pid else {
            let what = format!("epoll {:#x} is nobody's", entry.id);
            return Err(PlanError::damaged("files.img", what));
        };
        let done = Handle::Object("epoll", u64::from(entry.id));
        let needs = [Handle::Descriptors(pid), Handle::File(entry.id)];
        let name = format!("watch {} descriptors", entry.tfd.len());
        planner.task_step(pid, name, (&needs, &[done]), move |world| match holder {
            Some(holder) => watch(world, holder, entry),
            None => watch_from_outside(world, pid, entry),
        });
        Ok(())
    }
}

/// An epoll in a message gets its watches by a copy that its receiver has for a moment.
fn watch_from_outside(
    world: &mut World<'_>,
    pid: u32,
    entry: &EventpollFileEntry,
) -> Result<(), ExecuteError> {
    let number = world.file(entry.id)?.as_raw_fd();
    let fd = world.hand_over(pid, number)?.cast_unsigned();
    watch(world, Holder { pid, fd }, entry)?;
    let mut program = Program::new();
    program.call("close of the epoll", libc::SYS_close, &[Arg::from(fd)]);
    world.run(pid, &program).map(drop)
}

fn watch(
    world: &mut World<'_>,
    holder: Holder,
    entry: &EventpollFileEntry,
) -> Result<(), ExecuteError> {
    let mut program = Program::new();
    let task = world.images.task(holder.pid);
    let is_free = |number: u32| task.is_some_and(|task| task.fds.iter().all(|fd| fd.fd != number));
    for target in &entry.tfd {
        // The kernel knows a watch by file and number, which may have been closed since.
        let closed = target.floe_number.filter(|number| is_free(*number));
        let number = closed.unwrap_or(target.tfd);
        if let Some(closed) = closed {
            let args = [target.tfd, closed, 0].map(Arg::from);
            program.call(
                format!("dup of fd {} as {closed}", target.tfd),
                libc::SYS_dup3,
                &args,
            );
        }
        let event = program.buffer(&event_bytes(target));
        let args = [
            Arg::from(holder.fd),
            Arg::from(libc::EPOLL_CTL_ADD),
            Arg::from(number),
            Arg::from(event),
        ];
        program.call(
            format!("epoll_ctl of fd {} for fd {number}", holder.fd),
            libc::SYS_epoll_ctl,
            &args,
        );
        if let Some(closed) = closed {
            program.call(
                format!("close of fd {closed}"),
                libc::SYS_close,
                &[Arg::from(closed)],
            );
        }
    }
    world.run(holder.pid, &program).map(drop)
}

/// `struct epoll_event`, which is packed on x86-64.
fn event_bytes(target: &EventpollTfdEntry) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&target.events.to_le_bytes());
    bytes[4..].copy_from_slice(&target.data.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_are_read_with_and_without_blanks() {
        let watch =
            parse_watch(b"       5 events:       19 data:        deadbeef  pos:0 ino:61af sdev:7")
                .expect("read");
        assert_eq!(
            (watch.tfd, watch.events, watch.data),
            (5, 0x19, 0xdead_beef)
        );
        assert_eq!(
            (watch.inode, watch.dev, watch.pos),
            (Some(0x61af), Some(7), Some(0))
        );
        assert!(parse_watch(b"x events: 19").is_none());
    }
}
