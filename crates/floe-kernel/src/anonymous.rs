//! Anonymous files that rustix cannot make or set.
//!
//! Contract relied on: each call reads only the structure that it names.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `TFD_IOC_SET_TICKS` (`linux/timerfd.h`).
const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;

/// A signalfd for the signals of `mask`, bit 0 for signal 1.
pub fn signalfd(mask: u64) -> io::Result<OwnedFd> {
    let args = (-1, &raw const mask, size_of::<u64>(), libc::SFD_CLOEXEC);
    // SAFETY: the kernel reads the eight bytes of `mask`.
    let fd = unsafe { libc::syscall(libc::SYS_signalfd4, args.0, args.1, args.2, args.3) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Sets how often a timerfd has expired since it was read.
pub fn timerfd_set_ticks(timer: BorrowedFd<'_>, ticks: u64) -> io::Result<()> {
    // SAFETY: the request reads the eight bytes of `ticks`.
    let result = unsafe {
        libc::ioctl(
            timer.as_raw_fd(),
            TFD_IOC_SET_TICKS as libc::Ioctl,
            &raw const ticks,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
