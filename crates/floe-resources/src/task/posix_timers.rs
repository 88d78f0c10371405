//! POSIX timers (`timer_create(2)`).
//!
//! Saved:    number, clock, notification (`/proc/<pid>/timers`), time left, interval and overrun.
//! Rebuilt:  created with the same number, then set. Needs: threads and signal actions.
//! Not kept: the time that passes between dump and restore does not count.

use floe_image::messages::PosixTimerEntry;
use floe_inject::{Arg, BufferId, CallId, Outcome, Program};
use floe_kernel::proc::{PosixTimer, ProcDir, parse_timers};

use super::word;
use crate::collect::CollectError;

/// Remote calls that read the settings of all timers of a task.
pub struct PosixTimers(Vec<Asked>);

struct Asked {
    timer: PosixTimer,
    setting: BufferId,
    overrun: CallId,
}

impl PosixTimers {
    /// Adds the calls.
    pub fn ask(proc: &ProcDir, program: &mut Program) -> Result<Self, CollectError> {
        let timers = parse_timers(&proc.read("timers")?).map_err(|error| proc.bad(error))?;
        let ask_one = |timer: PosixTimer| {
            let setting = program.zeroed(32);
            program.call(
                "timer_gettime",
                libc::SYS_timer_gettime,
                &[Arg::from(timer.id), Arg::from(setting)],
            );
            let overrun = program.call(
                "timer_getoverrun",
                libc::SYS_timer_getoverrun,
                &[Arg::from(timer.id)],
            );
            Asked {
                timer,
                setting,
                overrun,
            }
        };
        Ok(PosixTimers(timers.into_iter().map(ask_one).collect()))
    }

    /// The timers in the order of `/proc/<pid>/timers`.
    pub fn read(&self, outcome: &Outcome) -> Vec<PosixTimerEntry> {
        self.0.iter().map(|asked| asked.read(outcome)).collect()
    }
}

impl Asked {
    fn read(&self, outcome: &Outcome) -> PosixTimerEntry {
        const SIGEV_THREAD_ID: u32 = 4;
        let (timer, bytes) = (&self.timer, outcome.data(self.setting));
        let thread = if timer.thread { SIGEV_THREAD_ID } else { 0 };
        PosixTimerEntry {
            it_id: timer.id,
            clock_id: timer.clock.cast_unsigned(),
            si_signo: timer.signal,
            it_sigev_notify: timer.notify | thread,
            sival_ptr: timer.value,
            overrun: super::small(outcome, self.overrun),
            isec: word(bytes, 0),
            insec: word(bytes, 8),
            vsec: word(bytes, 16),
            vnsec: word(bytes, 24),
            notify_thread_id: timer.thread.then_some(timer.target.cast_signed()),
        }
    }
}
