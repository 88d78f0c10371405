//! POSIX timers (`timer_create(2)`).
//!
//! Saved:    number, clock, notification (`/proc/<pid>/timers`), time left, interval and overrun.
//! Rebuilt:  created with the same number, then set. Needs: threads and signal actions.
//! Not kept: overruns that a program has not asked for yet: no call can set them. The time between dump
//!           and restore does not count.

use floe_image::messages::{PosixTimerEntry, TaskTimersEntry};
use floe_inject::{Arg, BufferId, CallId, Outcome, Program};
use floe_kernel::ids::HostPid;
use floe_kernel::proc::{PosixTimer, ProcDir, parse_timers};

use super::itimers::setting;
use super::rebuild::TaskContext;
use super::word;
use crate::collect::CollectError;
use crate::namespace::PidView;
use crate::restore::PlanError;

/// `PR_TIMER_CREATE_RESTORE_IDS`: `timer_create` takes the number that it is given (Linux 6.16).
const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
/// Notification bit: the signal is for one thread.
const SIGEV_THREAD_ID: u32 = 4;
/// Bytes of `struct sigevent`.
const SIGEVENT: usize = 64;
/// How many timers are made and deleted to reach a number, on kernels that cannot be told one.
const MAX_DISCARDED: u64 = 4096;

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
    pub fn read(&self, outcome: &Outcome, pids: &PidView) -> Vec<PosixTimerEntry> {
        let entry = |asked: &Asked| {
            let entry = asked.read(outcome);
            let thread = entry.notify_thread_id;
            PosixTimerEntry {
                notify_thread_id: thread.map(|tid| pids.number(HostPid(tid)).cast_signed()),
                ..entry
            }
        };
        self.0.iter().map(entry).collect()
    }
}

impl Asked {
    fn read(&self, outcome: &Outcome) -> PosixTimerEntry {
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

/// Makes and arms the timers of a process.
pub fn plan(
    timers: &TaskTimersEntry,
    context: &TaskContext<'_>,
    program: &mut Program,
) -> Result<(), PlanError> {
    let mut posix: Vec<&PosixTimerEntry> = timers.posix.iter().collect();
    posix.sort_by_key(|timer| timer.it_id);
    if posix.windows(2).any(|pair| pair[0].it_id == pair[1].it_id) {
        return Err(context.damaged("two timers have the same number"));
    }
    if posix.is_empty() {
        return Ok(());
    }
    if context.features.timer_restore_ids {
        plan_by_id(&posix, context, program)
    } else {
        plan_by_count(&posix, context, program)
    }
}

fn plan_by_id(
    timers: &[&PosixTimerEntry],
    context: &TaskContext<'_>,
    program: &mut Program,
) -> Result<(), PlanError> {
    let switch = |program: &mut Program, on: i32| {
        let args = [PR_TIMER_CREATE_RESTORE_IDS, on].map(Arg::from);
        program.call("prctl(PR_TIMER_CREATE_RESTORE_IDS)", libc::SYS_prctl, &args);
    };
    switch(program, 1);
    for timer in timers {
        create(timer, context, program)?;
        arm(timer, context, program)?;
    }
    switch(program, 0);
    Ok(())
}

/// A new process numbers its timers from 0 and does not use a number again, so the gaps are filled
/// with timers that are deleted at once. Calls on a wrong number fail: nothing else needs checking.
fn plan_by_count(
    timers: &[&PosixTimerEntry],
    context: &TaskContext<'_>,
    program: &mut Program,
) -> Result<(), PlanError> {
    let highest = timers.last().map_or(0, |timer| u64::from(timer.it_id));
    // Numbers are distinct, so there are at least as many below as there are timers.
    if highest + 1 - timers.len() as u64 > MAX_DISCARDED {
        return Err(PlanError::Missing {
            object: format!("POSIX timer {highest} of task {}", context.tid),
            feature: "PR_TIMER_CREATE_RESTORE_IDS (Linux 6.16)".to_string(),
        });
    }
    let id = program.zeroed(8);
    let mut next = 0;
    for timer in timers {
        for number in next..timer.it_id {
            let args = [
                Arg::from(libc::CLOCK_MONOTONIC),
                Arg::from(0),
                Arg::from(id),
            ];
            program.call("timer_create(to be deleted)", libc::SYS_timer_create, &args);
            let label = format!("timer_delete({number})");
            program.call(label, libc::SYS_timer_delete, &[Arg::from(number)]);
        }
        create(timer, context, program)?;
        arm(timer, context, program)?;
        next = timer.it_id + 1;
    }
    Ok(())
}

fn create(
    timer: &PosixTimerEntry,
    context: &TaskContext<'_>,
    program: &mut Program,
) -> Result<(), PlanError> {
    let thread = timer.notify_thread_id.unwrap_or(0).cast_unsigned();
    let thread = context.nested.seen_by(context.tid, thread);
    if timer.it_sigev_notify & SIGEV_THREAD_ID != 0 && thread == 0 {
        return Err(context.damaged(format!("timer {} notifies no thread", timer.it_id)));
    }
    let mut event = timer.sival_ptr.to_le_bytes().to_vec();
    event.extend_from_slice(&timer.si_signo.to_le_bytes());
    event.extend_from_slice(&timer.it_sigev_notify.to_le_bytes());
    event.extend_from_slice(&thread.to_le_bytes());
    event.resize(SIGEVENT, 0);
    let event = program.buffer(&event);
    let id = program.buffer(&timer.it_id.to_le_bytes());
    let args = [
        Arg::from(timer.clock_id.cast_signed()),
        Arg::from(event),
        Arg::from(id),
    ];
    let label = format!("timer_create({})", timer.it_id);
    program.call(label, libc::SYS_timer_create, &args);
    Ok(())
}

/// Sets the timer; an unarmed one is "set" to nothing, to be sure that it has its number.
fn arm(
    timer: &PosixTimerEntry,
    context: &TaskContext<'_>,
    program: &mut Program,
) -> Result<(), PlanError> {
    let (interval, left) = ((timer.isec, timer.insec), (timer.vsec, timer.vnsec));
    let setting = setting(interval, left, 1_000_000_000).map_err(|what| context.damaged(what))?;
    let value = program.buffer(&setting.unwrap_or_default().map(u64::to_le_bytes).concat());
    let args = [Arg::from(timer.it_id), Arg::from(0), Arg::from(value)];
    let label = format!("timer_settime({})", timer.it_id);
    program.call(label, libc::SYS_timer_settime, &args);
    Ok(())
}
