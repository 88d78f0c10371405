//! Descriptors that tell of events.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::ensure;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};
use rustix::fs::inotify;
use rustix::io::{read, write};

use super::files::descriptor;
use super::tasks::Child;
use super::{Check, Place, Program, unchanged};
use crate::sys::{signal, task};

pub const PROGRAMS: &[Program] = &[
    Program::new("eventfd", event_counter),
    Program::new("eventfd-semaphore", semaphore),
    Program::new("epoll", epolls),
    Program::new("epoll-closed", epoll_of_closed),
    Program::new("signalfd", signal_descriptor),
    Program::new("inotify", inotifies),
    Program::new("pidfd", pid_descriptor),
];

fn is_readable(fd: impl AsFd) -> anyhow::Result<bool> {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    Ok(poll(&mut fds, Some(&now))? == 1)
}

fn word(fd: &OwnedFd) -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    read(fd, &mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

fn event_counter(_: &Place) -> anyhow::Result<Check> {
    let counter = eventfd(41, EventfdFlags::NONBLOCK)?;
    let idle = eventfd(0, EventfdFlags::NONBLOCK)?;
    let fds = [counter.try_clone()?, idle.try_clone()?];
    let mut same = unchanged(move || fds.iter().map(descriptor).collect())?;
    Ok(Box::new(move || {
        same()?;
        ensure!(!is_readable(&idle)?, "the idle counter counts");
        let count = word(&counter)?;
        ensure!(count == 41, "count {count}");
        write(&counter, &41_u64.to_ne_bytes())?;
        Ok(())
    }))
}

/// Each read takes one.
fn semaphore(_: &Place) -> anyhow::Result<Check> {
    let semaphore = eventfd(3, EventfdFlags::SEMAPHORE | EventfdFlags::CLOEXEC)?;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", semaphore.as_raw_fd()))?;
    if !info.contains("eventfd-semaphore") {
        return Err(super::Missing("the kernel does not tell semaphores apart".into()).into());
    }
    Ok(Box::new(move || {
        for left in [3, 2, 1] {
            ensure!(is_readable(&semaphore)?, "{left} should be left");
            ensure!(word(&semaphore)? == 1, "a semaphore counts by one");
        }
        ensure!(!is_readable(&semaphore)?, "the semaphore has more");
        write(&semaphore, &3_u64.to_ne_bytes())?;
        Ok(())
    }))
}

/// Interests with their data, one of a duplicate whose first number is closed.
fn epolls(_: &Place) -> anyhow::Result<Check> {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let (out, into) = rustix::pipe::pipe()?;
    let counter = eventfd(5, EventfdFlags::NONBLOCK)?;
    let idle = eventfd(0, EventfdFlags::NONBLOCK)?;
    for (fd, data, flags) in [
        (&out, 0x1111_2222_3333_u64, epoll::EventFlags::IN),
        (&counter, 77, epoll::EventFlags::IN),
        (&idle, 78, epoll::EventFlags::IN | epoll::EventFlags::ET),
    ] {
        epoll::add(&set, fd, epoll::EventData::new_u64(data), flags)?;
    }
    let outer = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(
        &outer,
        &set,
        epoll::EventData::new_u64(1),
        epoll::EventFlags::IN,
    )?;
    let ready = |set: &OwnedFd| -> anyhow::Result<Vec<u64>> {
        let mut events = Vec::with_capacity(8);
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        epoll::wait(set, rustix::buffer::spare_capacity(&mut events), Some(&now))?;
        let mut data: Vec<u64> = events.iter().map(|event| event.data.u64()).collect();
        data.sort_unstable();
        Ok(data)
    };
    Ok(Box::new(move || {
        let _open = &counter;
        let found = ready(&set)?;
        ensure!(found == [77], "ready: {found:?}");
        write(&into, b"x")?;
        let found = ready(&set)?;
        ensure!(
            found == [77, 0x1111_2222_3333],
            "ready with data: {found:?}"
        );
        read(&out, &mut [0])?;
        write(&idle, &1_u64.to_ne_bytes())?;
        let found = ready(&set)?;
        ensure!(found == [77, 78], "ready with the idle one: {found:?}");
        word(&idle)?;
        ensure!(ready(&outer)? == [1], "the outer set is not ready");
        Ok(())
    }))
}

/// One file is watched twice, and the number of one watch is closed; another is watched by a closed number only.
fn epoll_of_closed(_: &Place) -> anyhow::Result<Check> {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let [twice, once] = [
        eventfd(1, EventfdFlags::NONBLOCK)?,
        eventfd(1, EventfdFlags::NONBLOCK)?,
    ];
    let watch = |fd: &OwnedFd, data| {
        epoll::add(
            &set,
            fd,
            epoll::EventData::new_u64(data),
            epoll::EventFlags::IN,
        )
    };
    watch(&twice, 1)?;
    let copies = [twice.try_clone()?, once.try_clone()?];
    watch(&copies[0], 2)?;
    watch(&copies[1], 3)?;
    drop(copies);
    let place = format!("/proc/self/fdinfo/{}", set.as_raw_fd());
    let watches = move || -> anyhow::Result<Vec<String>> {
        let text = fs::read_to_string(&place)?;
        let mut lines: Vec<String> = text
            .lines()
            .filter(|line| line.starts_with("tfd:"))
            .map(|line| line.split("ino:").next().unwrap_or(line).to_string())
            .collect();
        lines.sort();
        Ok(lines)
    };
    let before = watches()?;
    Ok(Box::new(move || {
        let _open = (&set, &twice, &once);
        let now = watches()?;
        ensure!(now == before, "{before:?} became {now:?}");
        Ok(())
    }))
}

fn signal_descriptor(_: &Place) -> anyhow::Result<Check> {
    let signals = [libc::SIGUSR2, libc::SIGRTMIN() + 2];
    signal::block(&signals);
    let fd = task::signal_fd(&signals)?;
    let own = std::process::id() as i32;
    signal::queue(own, signals[1], 5)?;
    Ok(Box::new(move || {
        let mut info = [0; 128];
        let length = read(&fd, &mut info)?;
        let found = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        ensure!(length == 128 && found == signals[1], "signal {found}");
        signal::queue(own, signals[0], 1)?;
        ensure!(is_readable(&fd)?, "a signal of the set is not seen");
        read(&fd, &mut [0; 128])?;
        signal::queue(own, signals[1], 5)?;
        Ok(())
    }))
}

fn inotifies(place: &Place) -> anyhow::Result<Check> {
    let directory = place.path("watched");
    fs::create_dir(&directory)?;
    let file = directory.join("file");
    fs::write(&file, "x")?;
    let fd = inotify::init(inotify::CreateFlags::NONBLOCK)?;
    let removed = inotify::add_watch(&fd, "/", inotify::WatchFlags::DELETE_SELF)?;
    inotify::remove_watch(&fd, removed)?;
    rustix::io::read(&fd, &mut [0; 256])
        .map(drop)
        .or_else(|error| match error {
            rustix::io::Errno::AGAIN => Ok(()),
            other => Err(other),
        })?;
    let of_directory = inotify::add_watch(&fd, &directory, inotify::WatchFlags::CREATE)?;
    let of_file = inotify::add_watch(&fd, &file, inotify::WatchFlags::MODIFY)?;
    let number = |bytes: &[u8]| i32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    Ok(Box::new(move || {
        let mut events = [0; 1024];
        fs::write(&file, "changed")?;
        read(&fd, &mut events)?;
        ensure!(
            number(&events) == of_file,
            "watch {} instead of {of_file}",
            number(&events)
        );
        while read(&fd, &mut events).is_ok() {}
        let new = directory.join("new");
        File::create(&new)?;
        read(&fd, &mut events)?;
        ensure!(
            number(&events) == of_directory,
            "watch {} instead of {of_directory}",
            number(&events)
        );
        fs::remove_file(&new)?;
        while read(&fd, &mut events).is_ok() {}
        Ok(())
    }))
}

/// Of a living child.
fn pid_descriptor(place: &Place) -> anyhow::Result<Check> {
    let mut child = Child::start(place, |_| Ok(Box::new(|| Ok(()))))?;
    let pid = rustix::process::Pid::from_raw(child.pid);
    let pid = pid.ok_or_else(|| anyhow::anyhow!("no pid"))?;
    let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    Ok(Box::new(move || {
        child.check()?;
        ensure!(!is_readable(&fd)?, "the living child has ended");
        rustix::process::pidfd_send_signal(&fd, rustix::process::Signal::CONT)?;
        Ok(())
    }))
}
