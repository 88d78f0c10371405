//! Event polls (`epoll_create(2)`).
//!
//! Saved:    flags, owner, and each watched descriptor with events and data (`/proc/<pid>/fdinfo/<fd>`).
//! Rebuilt:  created, then each watch added. Needs: all descriptors of the task.
//! Not kept: the order of events that are ready.

use std::collections::HashMap;

use floe_image::messages::{EventpollFileEntry, EventpollTfdEntry, FdTypes, FileEntry};
use floe_kernel::ids::TaskFd;
use floe_kernel::kcmp::is_epoll_target;

use super::{FdKind, file_entry};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};

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
            let index = seen.entry(watch.tfd).or_default();
            watch.tfd = find_target(fd, watch.tfd, *index)?;
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
    })
}

/// The number in the task's table of what is watched: the number given to `epoll_ctl` may since have
/// been closed, or mean another file.
fn find_target(fd: &FdProbe<'_>, tfd: u32, index: u32) -> Result<u32, CollectError> {
    let number = TaskFd(tfd.cast_signed());
    let is_target = |candidate: TaskFd| {
        is_epoll_target((fd.pid(), candidate), fd.pid(), fd.fd(), number, index)
    };
    match is_target(number) {
        Ok(true) => return Ok(tfd),
        Ok(false) => {}
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => {}
        Err(error) => return Err(fd.failed("Looking for a target", error)),
    }
    for candidate in fd.proc().list("fd")? {
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
