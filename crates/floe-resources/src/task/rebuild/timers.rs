//! Interval timers (`setitimer(2)`) and POSIX timers (`timer_create(2)`).
//!
//! Saved:    time left and interval; of POSIX timers number, clock, notification and overrun too.
//! Rebuilt:  created with the same number, then set. Needs: threads and signal actions.
//! Not kept: overruns that a program has not asked for yet: no call can set them. The time between dump
//!           and restore does not count.

use floe_image::messages::{ItimerEntry, PosixTimerEntry, TaskTimersEntry};
use floe_inject::{Arg, BufferId, Program};

use super::TaskContext;
use crate::restore::PlanError;

/// `PR_TIMER_CREATE_RESTORE_IDS`: `timer_create` takes the number that it is given (Linux 6.16).
const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
/// Notification bit: the signal is for one thread.
const SIGEV_THREAD_ID: u32 = 4;
/// Bytes of `struct sigevent`.
const SIGEVENT: usize = 64;
/// How many timers are made and deleted to reach a number, on kernels that cannot be told one.
const MAX_DISCARDED: u64 = 4096;

/// Arms the three interval timers and makes the POSIX timers of a process.
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
    let mut posix: Vec<&PosixTimerEntry> = timers.posix.iter().collect();
    posix.sort_by_key(|timer| timer.it_id);
    if posix.windows(2).any(|pair| pair[0].it_id == pair[1].it_id) {
        return Err(context.damaged("two timers have the same number"));
    }
    if posix.is_empty() {
        return Ok(());
    }
    if context.features.timer_restore_ids {
        plan_posix_by_id(&posix, context, program)
    } else {
        plan_posix_by_count(&posix, context, program)
    }
}

/// Interval and time left as the kernel takes them, given the units of a second.
///
/// A timer that was just about to expire has no time left, which would disarm it: it starts over.
fn setting(
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

fn words(program: &mut Program, words: &[u64; 4]) -> BufferId {
    program.buffer(&words.map(u64::to_le_bytes).concat())
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
        let value = words(program, &setting);
        let args = [Arg::from(which), Arg::from(value)];
        program.call(format!("setitimer({name})"), libc::SYS_setitimer, &args);
    }
    Ok(())
}

fn plan_posix_by_id(
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
fn plan_posix_by_count(
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
    let thread = timer.notify_thread_id.unwrap_or(0);
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
    let value = words(program, &setting.unwrap_or_default());
    let args = [Arg::from(timer.it_id), Arg::from(0), Arg::from(value)];
    let label = format!("timer_settime({})", timer.it_id);
    program.call(label, libc::SYS_timer_settime, &args);
    Ok(())
}
