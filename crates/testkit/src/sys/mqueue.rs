//! POSIX message queues.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::check;

/// Opens a queue; with a size (messages, bytes of one) it is made and must not be there yet.
pub fn open(name: &str, flags: i32, size: Option<(i64, i64)>) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    // SAFETY: all-zero bytes are a valid `mq_attr` of integers.
    let mut attributes: libc::mq_attr = unsafe { std::mem::zeroed() };
    let mut flags = flags | libc::O_CLOEXEC;
    if let Some((messages, bytes)) = size {
        (attributes.mq_maxmsg, attributes.mq_msgsize) = (messages, bytes);
        flags |= libc::O_CREAT | libc::O_EXCL;
    }
    // SAFETY: `name` is a live C string and `attributes` a live structure.
    let fd = unsafe { libc::mq_open(name.as_ptr(), flags, 0o620, &raw mut attributes) };
    check(i64::from(fd))?;
    // SAFETY: the kernel has just made the descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes the name of a queue away.
pub fn unlink(name: &str) -> io::Result<()> {
    let name = CString::new(name)?;
    // SAFETY: `name` is a live C string.
    check(i64::from(unsafe { libc::mq_unlink(name.as_ptr()) })).map(drop)
}

/// Sends a message.
pub fn send(queue: &OwnedFd, priority: u32, text: &[u8]) -> io::Result<()> {
    // SAFETY: `text` is readable for its length.
    let sent = unsafe {
        libc::mq_send(
            queue.as_raw_fd(),
            text.as_ptr().cast(),
            text.len(),
            priority,
        )
    };
    check(i64::from(sent)).map(drop)
}

/// Takes the next message, of 64 KiB at most.
pub fn receive(queue: &OwnedFd) -> io::Result<(u32, Vec<u8>)> {
    let mut buffer = vec![0; 1 << 16];
    let mut priority = 0;
    // SAFETY: `buffer` is writable for its length, `priority` is live.
    let length = unsafe {
        libc::mq_receive(
            queue.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            &raw mut priority,
        )
    };
    let length = check(length as i64)?;
    buffer.truncate(length as usize);
    Ok((priority, buffer))
}

/// What a queue may hold: messages, bytes of one; and what it holds.
pub fn size(queue: &OwnedFd) -> io::Result<(i64, i64, i64)> {
    // SAFETY: all-zero bytes are a valid `mq_attr` of integers.
    let mut attributes: libc::mq_attr = unsafe { std::mem::zeroed() };
    // SAFETY: `attributes` is live and writable.
    check(i64::from(unsafe {
        libc::mq_getattr(queue.as_raw_fd(), &raw mut attributes)
    }))?;
    Ok((
        attributes.mq_maxmsg,
        attributes.mq_msgsize,
        attributes.mq_curmsgs,
    ))
}

/// Asks for a signal when a message comes to the empty queue; how is `SIGEV_SIGNAL` or the like.
pub fn notify(queue: &OwnedFd, how: i32, (signal, value): (i32, usize)) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `sigevent`.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    (event.sigev_notify, event.sigev_signo) = (how, signal);
    event.sigev_value.sival_ptr = std::ptr::without_provenance_mut(value);
    // The call of the kernel itself: glibc makes threads.
    // SAFETY: `event` is a live structure, which the kernel reads.
    check(unsafe { libc::syscall(libc::SYS_mq_notify, queue.as_raw_fd(), &raw const event) })
        .map(drop)
}

/// Asks for a message on a netlink socket, as glibc does for `SIGEV_THREAD`.
pub fn notify_by(queue: &OwnedFd, socket: &OwnedFd) -> io::Result<()> {
    let cookie = [0_u8; 32];
    // SAFETY: all-zero bytes are a valid `sigevent`.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD;
    event.sigev_signo = socket.as_raw_fd();
    event.sigev_value.sival_ptr = cookie.as_ptr().cast_mut().cast();
    // SAFETY: `event` and the cookie that it points to are live; the kernel copies both.
    check(unsafe { libc::syscall(libc::SYS_mq_notify, queue.as_raw_fd(), &raw const event) })
        .map(drop)
}
