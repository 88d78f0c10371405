//! Timers as files (`timerfd_create(2)`).
//!
//! Saved:    clock, setting, expirations not read yet and flags (`/proc/<pid>/fdinfo/<fd>`), owner.
//! Rebuilt:  created, set to the time left, then the expirations (`TFD_IOC_SET_TICKS`). Needs: nothing.
//! Not kept: blocked readers; they restart with their own task.

use floe_image::messages::{FdTypes, FileEntry, TimerfdEntry};

use super::{FdKind, file_entry};
use super::{FdRestore, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, plan_owner, set_flags};
use floe_plan::Handle;
use rustix::fd::BorrowedFd;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use std::os::fd::AsFd;

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

impl FdRestore for TimerFd {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Timerfd
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.tfd)?;
        planner.open(entry.id, "make a timerfd", &[], move |_| {
            let clock = match i32::try_from(entry.clockid) {
                Ok(libc::CLOCK_REALTIME) => TimerfdClockId::Realtime,
                Ok(libc::CLOCK_BOOTTIME) => TimerfdClockId::Boottime,
                Ok(libc::CLOCK_REALTIME_ALARM) => TimerfdClockId::RealtimeAlarm,
                Ok(libc::CLOCK_BOOTTIME_ALARM) => TimerfdClockId::BoottimeAlarm,
                _ => TimerfdClockId::Monotonic,
            };
            let what = || format!("for clock {}", entry.clockid);
            let timer = rustix::time::timerfd_create(clock, TimerfdFlags::CLOEXEC)
                .during("Making a timerfd", what)?;
            set_flags(timer.as_fd(), entry.flags)?;
            Ok(timer)
        });
        // Timers tick from here on, so this comes as late as possible.
        let handle = Handle::Object("timerfd", u64::from(entry.id));
        planner.step(
            format!("start timerfd {:#x}", entry.id),
            (&[Handle::Tree, Handle::File(entry.id)], &[handle]),
            move |world| arm(world.file(entry.id)?, entry),
        );
        plan_owner(planner, entry.id, &entry.fown);
        Ok(())
    }
}

/// The images keep the time that was left, whatever way the program had set it.
fn arm(timer: BorrowedFd<'_>, entry: &TimerfdEntry) -> Result<(), ExecuteError> {
    let what = || format!("{:#x}", entry.id);
    let at = |seconds: u64, nanoseconds: u64| Timespec {
        tv_sec: seconds as i64,
        tv_nsec: nanoseconds as i64,
    };
    let value = Itimerspec {
        it_interval: at(entry.isec, entry.insec),
        it_value: at(entry.vsec, entry.vnsec),
    };
    if (entry.vsec, entry.vnsec, entry.isec, entry.insec) != (0, 0, 0, 0) {
        rustix::time::timerfd_settime(timer, TimerfdTimerFlags::empty(), &value)
            .during("Starting timerfd", what)?;
    }
    if entry.ticks > 0 {
        floe_kernel::anonymous::timerfd_set_ticks(timer, entry.ticks)
            .during("Setting the ticks of timerfd", what)?;
    }
    Ok(())
}
