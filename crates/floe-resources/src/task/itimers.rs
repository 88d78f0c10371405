//! Interval timers (`setitimer(2)`).
//!
//! Saved:    time left and interval of the three timers.
//! Rebuilt:  set at the end. Needs: signal actions.
//! Not kept: the time that passes between dump and restore does not count.

use floe_image::messages::{ItimerEntry, TaskTimersEntry};
use floe_inject::{Arg, BufferId, Outcome, Program};

use super::rebuild::TaskContext;
use super::word;
use crate::restore::PlanError;

/// Remote calls that read the three timers.
pub struct IntervalTimers([BufferId; 3]);

impl IntervalTimers {
    /// Adds the calls.
    pub fn ask(program: &mut Program) -> Self {
        IntervalTimers([0u64, 1, 2].map(|which| {
            let buffer = program.zeroed(32);
            program.call(
                "getitimer",
                libc::SYS_getitimer,
                &[Arg::from(which), Arg::from(buffer)],
            );
            buffer
        }))
    }

    /// Real, virtual and profiling timer.
    pub fn read(&self, outcome: &Outcome) -> [ItimerEntry; 3] {
        self.0.map(|buffer| {
            let bytes = outcome.data(buffer);
            ItimerEntry {
                isec: word(bytes, 0),
                iusec: word(bytes, 8),
                vsec: word(bytes, 16),
                vusec: word(bytes, 24),
            }
        })
    }
}

/// Arms the three timers of a process.
pub fn plan(
    timers: &TaskTimersEntry,
    context: &TaskContext<'_>,
    program: &mut Program,
) -> Result<(), PlanError> {
    let intervals = [
        ("ITIMER_REAL", &timers.real),
        ("ITIMER_VIRTUAL", &timers.virt),
        ("ITIMER_PROF", &timers.prof),
    ];
    for (which, (name, timer)) in intervals.into_iter().enumerate() {
        plan_interval((which, name), timer, context, program)?;
    }
    Ok(())
}

fn plan_interval(
    (which, name): (usize, &str),
    timer: &ItimerEntry,
    context: &TaskContext<'_>,
    program: &mut Program,
) -> Result<(), PlanError> {
    let (interval, left) = ((timer.isec, timer.iusec), (timer.vsec, timer.vusec));
    let setting = setting(interval, left, 1_000_000).map_err(|what| context.damaged(what))?;
    if let Some(setting) = setting {
        let value = program.buffer(&setting.map(u64::to_le_bytes).concat());
        let args = [Arg::from(which), Arg::from(value)];
        program.call(format!("setitimer({name})"), libc::SYS_setitimer, &args);
    }
    Ok(())
}

/// Interval and time left as the kernel takes them, given the units of a second.
///
/// A timer that was just about to expire has no time left, which would disarm it: it starts over.
pub(super) fn setting(
    interval: (u64, u64),
    left: (u64, u64),
    units: u64,
) -> Result<Option<[u64; 4]>, &'static str> {
    let valid = |(seconds, part): (u64, u64)| i64::try_from(seconds).is_ok() && part < units;
    if !valid(interval) || !valid(left) {
        return Err("a timer has an impossible time");
    }
    let left = if left == (0, 0) { interval } else { left };
    let armed = left != (0, 0);
    Ok(armed.then_some([interval.0, interval.1, left.0, left.1]))
}
