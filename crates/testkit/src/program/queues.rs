//! POSIX message queues.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use anyhow::ensure;

use super::{Check, Missing, Place, Program};
use crate::sys::{mqueue, signal, sysv};

pub const PROGRAMS: &[Program] = &[
    Program::new("posix-queues", queues),
    Program::new("posix-queues-outside", outside),
    Program::new("posix-queues-no-name", without_name),
];

/// Programs that cannot be dumped.
pub const REFUSED: &[Program] = &[Program::new("posix-queue-by-thread", by_thread)];

/// The signal and the value of a notification.
const TOLD: (i32, usize) = (libc::SIGUSR2, 123_456);

const WAITING: [(u32, &str); 5] = [
    (9, "first"),
    (9, "second"),
    (4, "third"),
    (0, ""),
    (0, "last"),
];

fn made(name: &str, size: (i64, i64)) -> anyhow::Result<OwnedFd> {
    let made = mqueue::open(name, libc::O_RDWR | libc::O_NONBLOCK, Some(size));
    made.map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSYS) => Missing("the kernel has no POSIX queues".into()).into(),
        _ => error.into(),
    })
}

fn fill(queue: &OwnedFd) -> anyhow::Result<()> {
    for (priority, text) in WAITING.iter().rev() {
        mqueue::send(queue, *priority, text.as_bytes())?;
    }
    // Of one priority the older one comes first.
    for _ in 0..WAITING.len() {
        let (priority, text) = mqueue::receive(queue)?;
        mqueue::send(queue, priority, &text)?;
    }
    Ok(())
}

/// All messages, which are sent again.
fn around(queue: &OwnedFd) -> anyhow::Result<Vec<(u32, String)>> {
    let mut found = Vec::new();
    while let Ok((priority, text)) = mqueue::receive(queue) {
        found.push((priority, String::from_utf8_lossy(&text).into_owned()));
    }
    for (priority, text) in &found {
        mqueue::send(queue, *priority, text.as_bytes())?;
    }
    Ok(found)
}

fn facts(queue: &OwnedFd) -> anyhow::Result<String> {
    let number = queue.as_raw_fd();
    let link = fs::read_link(format!("/proc/self/fd/{number}"))?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
    let flags = info.lines().find(|line| line.starts_with("flags:"));
    let stat = rustix::fs::fstat(queue)?;
    Ok(format!(
        "{} {flags:?} {:?} {:o} {} {}",
        link.display(),
        mqueue::size(queue)?,
        stat.st_mode,
        stat.st_uid,
        stat.st_gid
    ))
}

/// In a namespace of their own: one that nobody has open, one with several descriptors, one that tells of
/// the next message, one without a name.
fn queues(_: &Place) -> anyhow::Result<Check> {
    sysv::leave().map_err(|error| Missing(format!("no namespaces: {error}")))?;
    fill(&made("/closed", (10, 100))?)?;
    let queue = made("/open", (7, 8192))?;
    rustix::fs::fchmod(&queue, rustix::fs::Mode::from_raw_mode(0o604))?;
    rustix::fs::fchown(&queue, Some(rustix::fs::Uid::from_raw(77)), None)?;
    fill(&queue)?;
    let writer = mqueue::open("/open", libc::O_WRONLY, None)?;
    let telling = made("/telling", (3, 64))?;
    mqueue::notify(&telling, libc::SIGEV_SIGNAL, TOLD)?;
    signal::block(&[libc::SIGUSR1, libc::SIGUSR2]);
    let gone = made("/gone", (10, 64))?;
    fill(&gone)?;
    mqueue::unlink("/gone")?;
    let all = move |queues: [&OwnedFd; 4]| -> anyhow::Result<Vec<String>> {
        queues.into_iter().map(facts).collect()
    };
    let before = all([&queue, &writer, &telling, &gone])?;
    let messages = around(&queue)?;
    Ok(Box::new(move || {
        let after = all([&queue, &writer, &telling, &gone])?;
        ensure!(before == after, "{before:?} became {after:?}");
        let closed = mqueue::open("/closed", libc::O_RDWR | libc::O_NONBLOCK, None)?;
        for queue in [&queue, &gone, &closed] {
            let found = around(queue)?;
            ensure!(found == messages, "{found:?} instead of {messages:?}");
        }
        mqueue::send(&telling, 1, b"x")?;
        let taken = signal::take(&[libc::SIGUSR2], Some(Duration::from_secs(5)));
        let taken = taken.map_err(|error| anyhow::anyhow!("no notification: {error}"))?;
        ensure!(taken.value == TOLD.1 as i32, "the value is {}", taken.value);
        mqueue::receive(&telling)?;
        mqueue::notify(&telling, libc::SIGEV_SIGNAL, TOLD)?;
        Ok(())
    }))
}

/// A queue of the host, which the program removes when it is asked for the third time.
fn outside(_: &Place) -> anyhow::Result<Check> {
    let name = format!("/floe-outside-{}", std::process::id());
    let queue = made(&name, (10, 64))?;
    fill(&queue)?;
    let messages = around(&queue)?;
    let before = facts(&queue)?;
    let mut left = 3;
    Ok(Box::new(move || {
        left -= 1;
        let after = facts(&queue);
        let found = around(&queue);
        if left == 0 {
            mqueue::unlink(&name)?;
        }
        let (after, found) = (after?, found?);
        ensure!(before == after, "{before} became {after}");
        ensure!(found == messages, "{found:?} instead of {messages:?}");
        Ok(())
    }))
}

/// A queue without a name in the host's namespace, with two descriptions.
fn without_name(_: &Place) -> anyhow::Result<Check> {
    let name = format!("/floe-no-name-{}", std::process::id());
    let queue = made(&name, (10, 64))?;
    let second = mqueue::open(&name, libc::O_WRONLY, None);
    mqueue::unlink(&name)?;
    let second = second?;
    fill(&queue)?;
    let messages = around(&queue)?;
    let before = (facts(&queue)?, facts(&second)?);
    Ok(Box::new(move || {
        let after = (facts(&queue)?, facts(&second)?);
        ensure!(before == after, "{before:?} became {after:?}");
        let found = around(&queue)?;
        ensure!(found == messages, "{found:?} instead of {messages:?}");
        mqueue::send(&second, 32_767, b"other")?;
        ensure!(mqueue::receive(&queue)? == (32_767, b"other".to_vec()));
        Ok(())
    }))
}

/// A notification by a thread, as glibc asks for one: by a socket that is told.
fn by_thread(_: &Place) -> anyhow::Result<Check> {
    sysv::leave().map_err(|error| Missing(format!("no namespaces: {error}")))?;
    let queue = made("/thread", (3, 64))?;
    let kind = rustix::net::SocketType::RAW;
    let socket = rustix::net::socket(rustix::net::AddressFamily::NETLINK, kind, None)?;
    mqueue::notify_by(&queue, &socket)?;
    Ok(Box::new(move || {
        let _open = (&queue, &socket);
        Ok(())
    }))
}
