//! Interval timers and POSIX timers.

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

use super::check;

/// Time left and period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// Until it fires next.
    pub left: Duration,
    /// From then on.
    pub period: Duration,
}

fn timeval(duration: Duration) -> libc::timeval {
    libc::timeval {
        tv_sec: duration.as_secs() as i64,
        tv_usec: i64::from(duration.subsec_micros()),
    }
}

fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: duration.as_secs() as i64,
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

/// Sets `ITIMER_*`.
pub fn set_interval(which: i32, setting: Setting) -> io::Result<()> {
    let value = libc::itimerval {
        it_interval: timeval(setting.period),
        it_value: timeval(setting.left),
    };
    // SAFETY: `value` is whole; no old value is asked for.
    let result = unsafe { libc::syscall(libc::SYS_setitimer, which, &value, 0_usize) };
    check(result).map(drop)
}

/// Reads `ITIMER_*`.
pub fn interval(which: i32) -> io::Result<Setting> {
    let mut value = MaybeUninit::<libc::itimerval>::zeroed();
    // SAFETY: the call writes `value` only, which is valid zeroed.
    let value = unsafe {
        check(libc::syscall(
            libc::SYS_getitimer,
            which,
            value.as_mut_ptr(),
        ))?;
        value.assume_init()
    };
    let duration =
        |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    Ok(Setting {
        left: duration(value.it_value),
        period: duration(value.it_interval),
    })
}

/// A POSIX timer by the kernel's own number, kept until the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timer(i32);

impl Timer {
    /// Makes a timer that sends `signal` with `value`; without a signal it only counts.
    pub fn create(clock: i32, signal: Option<i32>, value: i32) -> io::Result<Self> {
        // SAFETY: all zero is a valid sigevent.
        let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
        event.sigev_notify = signal.map_or(libc::SIGEV_NONE, |_| libc::SIGEV_SIGNAL);
        event.sigev_signo = signal.unwrap_or(0);
        event.sigev_value = libc::sigval {
            sival_ptr: value as usize as *mut _,
        };
        let mut id = 0_i32;
        // SAFETY: the raw call, whose timer id is an int; both pointers are to live values.
        check(unsafe { libc::syscall(libc::SYS_timer_create, clock, &event, &mut id) })?;
        Ok(Self(id))
    }

    /// Starts it.
    pub fn set(self, setting: Setting) -> io::Result<()> {
        let value = libc::itimerspec {
            it_interval: timespec(setting.period),
            it_value: timespec(setting.left),
        };
        // SAFETY: `value` is whole; no old value is asked for.
        let result = unsafe { libc::syscall(libc::SYS_timer_settime, self.0, 0, &value, 0_usize) };
        check(result).map(drop)
    }

    /// Time left and period.
    pub fn get(self) -> io::Result<Setting> {
        let mut value = MaybeUninit::<libc::itimerspec>::zeroed();
        // SAFETY: the call writes `value` only, which is valid zeroed.
        let value = unsafe {
            check(libc::syscall(
                libc::SYS_timer_gettime,
                self.0,
                value.as_mut_ptr(),
            ))?;
            value.assume_init()
        };
        let duration =
            |time: libc::timespec| Duration::new(time.tv_sec as u64, time.tv_nsec as u32);
        Ok(Setting {
            left: duration(value.it_value),
            period: duration(value.it_interval),
        })
    }
}
