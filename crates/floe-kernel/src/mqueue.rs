//! POSIX message queues (`mq_overview(7)`).
//!
//! Contract relied on: names are C strings without the slash that libraries put before them; `mq_attr` is
//! eight longs, of which the kernel reads and writes the first four; a message is written to the buffer
//! only up to the length that is given.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What a queue may hold, and what it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// The most messages.
    pub max_messages: u32,
    /// The most bytes of a message.
    pub max_size: u32,
    /// Messages that wait.
    pub messages: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawAttributes {
    flags: libc::c_long,
    max_messages: libc::c_long,
    max_size: libc::c_long,
    messages: libc::c_long,
    reserved: [libc::c_long; 4],
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn c_name(name: &str) -> io::Result<CString> {
    CString::new(name).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Opens a queue of the IPC namespace that the calling thread is in; `flags` of `open(2)`.
pub fn open(name: &str, flags: u32) -> io::Result<OwnedFd> {
    let name = c_name(name)?;
    let nothing = std::ptr::null::<RawAttributes>();
    // SAFETY: `name` is a live C string; without O_CREAT the last two arguments are not looked at.
    let fd = check(unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0, nothing) })?;
    // SAFETY: the kernel has just made the descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Makes a queue that must not be there yet, and opens it for reading and writing without blocking.
pub fn create(name: &str, mode: u32, attributes: &Attributes) -> io::Result<OwnedFd> {
    let name = c_name(name)?;
    let raw = RawAttributes {
        max_messages: attributes.max_messages.into(),
        max_size: attributes.max_size.into(),
        ..RawAttributes::default()
    };
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC;
    // SAFETY: `name` is a live C string and `raw` a live structure that the kernel reads.
    let fd = check(unsafe {
        libc::syscall(
            libc::SYS_mq_open,
            name.as_ptr(),
            flags,
            mode,
            &raw const raw,
        )
    })?;
    // SAFETY: the kernel has just made the descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Takes a queue's name away; it lives on while it is open.
pub fn unlink(name: &str) -> io::Result<()> {
    let name = c_name(name)?;
    // SAFETY: `name` is a live C string.
    check(unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) }).map(drop)
}

/// What an open queue may hold, and holds.
pub fn attributes(queue: BorrowedFd<'_>) -> io::Result<Attributes> {
    let mut raw = RawAttributes::default();
    let nothing = std::ptr::null::<RawAttributes>();
    // SAFETY: `raw` is live and writable; nothing is to be set.
    check(unsafe {
        libc::syscall(
            libc::SYS_mq_getsetattr,
            queue.as_raw_fd(),
            nothing,
            &raw mut raw,
        )
    })?;
    let small = |number: libc::c_long| {
        u32::try_from(number).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
    };
    Ok(Attributes {
        max_messages: small(raw.max_messages)?,
        max_size: small(raw.max_size)?,
        messages: small(raw.messages)?,
    })
}

/// Takes the next message: its priority and text. `EAGAIN` where there is none and the descriptor does not
/// block; `buffer` must have room for the largest message of the queue.
pub fn receive(queue: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(u32, Vec<u8>)> {
    let mut priority = 0_u32;
    // SAFETY: `buffer` is writable for its length, `priority` is live; no time limit is given.
    let length = check(unsafe {
        libc::syscall(
            libc::SYS_mq_timedreceive,
            queue.as_raw_fd(),
            buffer.as_mut_ptr(),
            buffer.len(),
            &raw mut priority,
            std::ptr::null::<libc::timespec>(),
        )
    })?;
    Ok((priority, buffer[..length as usize].to_vec()))
}

/// Sends a message; `EAGAIN` where the queue is full and the descriptor does not block.
pub fn send(queue: BorrowedFd<'_>, priority: u32, text: &[u8]) -> io::Result<()> {
    // SAFETY: `text` is readable for its length; no time limit is given.
    check(unsafe {
        libc::syscall(
            libc::SYS_mq_timedsend,
            queue.as_raw_fd(),
            text.as_ptr(),
            text.len(),
            priority,
            std::ptr::null::<libc::timespec>(),
        )
    })
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn messages_come_by_priority() {
        let name = format!("floe-test-{}", std::process::id());
        let wanted = Attributes {
            max_messages: 3,
            max_size: 16,
            messages: 0,
        };
        let Ok(queue) = create(&name, 0o600, &wanted) else {
            return; // The kernel has no such queues.
        };
        let queue = queue.as_fd();
        send(queue, 1, b"low").expect("sent");
        send(queue, 7, b"high").expect("sent");
        let again = open(&name, 0).expect("opened");
        unlink(&name).expect("unlinked");
        assert_eq!(attributes(again.as_fd()).expect("told").messages, 2);
        let mut buffer = [0; 16];
        let next = receive(again.as_fd(), &mut buffer).expect("received");
        assert_eq!(next, (7, b"high".to_vec()));
    }
}
