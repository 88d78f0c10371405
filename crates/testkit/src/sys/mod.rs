//! System calls that neither `std` nor `rustix` offer safely, for the programs under test.
//!
//! The wrappers keep to what a test program needs: each owns or checks what it hands to the
//! kernel. They do not go through `floe-kernel`, whose code the programs are to test.

pub mod bpf;
pub mod memory;
pub mod mounts;
pub mod mqueue;
pub mod notify;
pub mod signal;
pub mod sysv;
pub mod task;
pub mod timer;
pub mod unseen;

use std::io;

/// The result of a call that answers -1 and sets errno.
pub(crate) fn check(result: i64) -> io::Result<i64> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
