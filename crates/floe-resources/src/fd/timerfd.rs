//! Timers as files (`timerfd_create(2)`).
//!
//! Saved:    clock, setting, expirations not read yet and flags (`/proc/<pid>/fdinfo/<fd>`), owner.
//! Rebuilt:  created, set to the time left, then the expirations (`TFD_IOC_SET_TICKS`). Needs: nothing.
//! Not kept: blocked readers; they restart with their own task.

use floe_image::messages::{FdTypes, FileEntry, TimerfdEntry};

use super::{FdKind, file_entry};
use crate::collect::{CollectError, Collector, FdProbe, FileId};

/// See the module.
pub struct TimerFd;

impl FdKind for TimerFd {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.is_anon("[timerfd]")
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        _: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let (vsec, vnsec) = time(fd, "it_value")?;
        let (isec, insec) = time(fd, "it_interval")?;
        let short =
            |value: u64| u32::try_from(value).map_err(|_| fd.garbled("a number of a timerfd"));
        let entry = TimerfdEntry {
            id: id.0,
            flags: fd.flags(),
            fown: fd.owner()?,
            clockid: short(fd.info_number("clockid", 10)?)?,
            ticks: fd.info_number("ticks", 10)?,
            settime_flags: short(fd.info_number("settime flags", 8)?)?,
            vsec,
            vnsec,
            isec,
            insec,
        };
        Ok(FileEntry {
            tfd: Some(entry),
            ..file_entry(FdTypes::Timerfd, id)
        })
    }
}

/// Reads `(seconds, nanoseconds)`.
fn time(fd: &FdProbe<'_>, key: &'static str) -> Result<(u64, u64), CollectError> {
    let text = fd
        .info()
        .value(key)
        .map(String::from_utf8_lossy)
        .unwrap_or_default();
    let parts = text
        .trim_start_matches('(')
        .trim_end_matches(')')
        .split_once(',');
    let numbers = parts.and_then(|(s, ns)| Some((s.trim().parse().ok()?, ns.trim().parse().ok()?)));
    numbers.ok_or_else(|| fd.garbled(key))
}
