//! Timers: `setitimer`, `timer_create`, `timerfd`.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_gettime, timerfd_settime,
};

use super::{Check, Place, Program};
use crate::sys::signal;
use crate::sys::timer::{self, Setting, Timer};

pub const PROGRAMS: &[Program] = &[
    Program::new("timers-interval", interval),
    Program::new("timers-posix", posix),
    Program::new("timerfd", timerfd),
];

const HOUR: Duration = Duration::from_secs(3600);

static TICKS: AtomicU32 = AtomicU32::new(0);

extern "C" fn tick(_: i32) {
    TICKS.fetch_add(1, Ordering::SeqCst);
}

/// A timer of an hour that was dumped within minutes still has most of it to go.
fn nearly(left: Duration, what: &str) -> anyhow::Result<()> {
    ensure!(
        // The kernel rounds CPU time up to its ticks.
        left <= HOUR + Duration::from_millis(100) && left > HOUR / 2,
        "{what}: {left:?} are left of an hour"
    );
    Ok(())
}

fn wait_for_ticks(more: u32) -> anyhow::Result<()> {
    let (from, started) = (TICKS.load(Ordering::SeqCst), Instant::now());
    while TICKS.load(Ordering::SeqCst) < from + more {
        ensure!(
            started.elapsed() < Duration::from_secs(10),
            "the periodic timer stands still"
        );
        // Ended early by each tick.
        std::thread::yield_now();
    }
    Ok(())
}

fn interval(_: &Place) -> anyhow::Result<Check> {
    signal::handle(libc::SIGALRM, tick, libc::SA_RESTART, &[]);
    let period = Duration::from_millis(20);
    timer::set_interval(
        libc::ITIMER_REAL,
        Setting {
            left: period,
            period,
        },
    )?;
    let setting = Setting {
        left: HOUR,
        period: 2 * HOUR,
    };
    timer::set_interval(libc::ITIMER_VIRTUAL, setting)?;
    timer::set_interval(libc::ITIMER_PROF, setting)?;
    Ok(Box::new(move || {
        for which in [libc::ITIMER_VIRTUAL, libc::ITIMER_PROF] {
            let now = timer::interval(which)?;
            nearly(now.left, "interval timer")?;
            ensure!(now.period == 2 * HOUR, "period {:?}", now.period);
        }
        wait_for_ticks(3)
    }))
}

fn posix(_: &Place) -> anyhow::Result<Check> {
    signal::handle(libc::SIGRTMIN() + 4, tick, libc::SA_RESTART, &[]);
    let quiet = libc::SIGRTMIN() + 6;
    signal::block(&[quiet]);
    let period = Duration::from_millis(20);
    // A gap in the numbers, which programs remember.
    let ticking = Timer::create(libc::CLOCK_MONOTONIC, Some(libc::SIGRTMIN() + 4), 1)?;
    let long = Timer::create(libc::CLOCK_REALTIME, Some(quiet), 0x1234)?;
    let silent = Timer::create(libc::CLOCK_MONOTONIC, None, 0)?;
    let idle = Timer::create(libc::CLOCK_MONOTONIC, Some(quiet), 7)?;
    ticking.set(Setting {
        left: period,
        period,
    })?;
    let setting = Setting {
        left: HOUR,
        period: HOUR,
    };
    long.set(setting)?;
    silent.set(setting)?;
    Ok(Box::new(move || {
        for (name, timer) in [("long", long), ("silent", silent)] {
            let now = timer.get().with_context(|| format!("timer {timer:?}"))?;
            nearly(now.left, name)?;
            ensure!(now.period == HOUR, "period {:?}", now.period);
        }
        ensure!(idle.get()?.left.is_zero(), "a timer that was not set runs");
        wait_for_ticks(3)
    }))
}

fn spec(seconds: u64) -> Timespec {
    Timespec {
        tv_sec: seconds as i64,
        tv_nsec: 0,
    }
}

fn timerfd(_: &Place) -> anyhow::Result<Check> {
    let flags = TimerfdFlags::NONBLOCK;
    let long = timerfd_create(TimerfdClockId::Monotonic, flags)?;
    let setting = Itimerspec {
        it_interval: spec(60),
        it_value: spec(HOUR.as_secs()),
    };
    timerfd_settime(&long, TimerfdTimerFlags::empty(), &setting)?;
    let fired = timerfd_create(TimerfdClockId::Realtime, flags)?;
    let at_once = Itimerspec {
        it_interval: spec(0),
        it_value: spec(1),
    };
    let idle = timerfd_create(TimerfdClockId::Boottime, flags)?;
    // In the past: it has fired when the call returns.
    let set_fired = move |fired: &std::os::fd::OwnedFd| {
        timerfd_settime(fired, TimerfdTimerFlags::ABSTIME, &at_once).map(drop)
    };
    set_fired(&fired)?;
    Ok(Box::new(move || {
        let now = timerfd_gettime(&long)?;
        nearly(Duration::from_secs(now.it_value.tv_sec as u64), "timerfd")?;
        ensure!(
            now.it_interval.tv_sec == 60,
            "period {}",
            now.it_interval.tv_sec
        );
        let mut count = [0; 8];
        rustix::io::read(&fired, &mut count).context("the fired timerfd")?;
        ensure!(
            u64::from_ne_bytes(count) == 1,
            "ticks {}",
            u64::from_ne_bytes(count)
        );
        set_fired(&fired)?;
        ensure!(
            timerfd_gettime(&idle)?.it_value.tv_sec == 0,
            "an idle timerfd runs"
        );
        ensure!(
            rustix::io::read(&idle, &mut count) == Err(rustix::io::Errno::AGAIN),
            "an idle timerfd has ticks"
        );
        Ok(())
    }))
}
