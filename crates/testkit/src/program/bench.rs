//! Workloads of the benchmark: each with a thread that measures how long it did not run.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure};
use rustix::event::{EventfdFlags, eventfd};

use super::{Check, Place, Program};
use crate::sys::memory::{Map, Mapping, PAGE};
use crate::sys::task;

pub const PROGRAMS: &[Program] = &[
    Program::new("bench-small", small),
    Program::new("bench-pages", pages),
    Program::new("bench-huge", huge),
    Program::new("bench-threads", threads),
    Program::new("bench-processes", processes),
    Program::new("bench-descriptors", descriptors),
];

/// The workload of dumps in rounds.
pub const IN_ROUNDS: &[Program] = &[
    Program::new("bench-rounds", rounds),
    Program::new("bench-rounds-shared", rounds_shared),
];

const GIB: usize = 1 << 30;

/// Starts the clock: a thread that looks at the time every few microseconds and keeps the longest
/// gap between two looks, in nanoseconds, in the first word of the file `clock`, and the number of
/// looks in the second. Whoever writes zero to the first starts a new measurement.
fn start_clock(place: &Place) -> anyhow::Result<&'static Mapping> {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(place.path("clock"))?;
    file.set_len(PAGE as u64)?;
    let map = Map {
        file: Some((file.as_fd(), 0)),
        ..Map::shared(PAGE)
    };
    let page = map.make()?.leak();
    std::thread::Builder::new()
        .name("clock".into())
        .spawn(move || watch(page))?;
    Ok(page)
}

fn watch(page: &Mapping) {
    // Without it the kernel adds 50 microseconds to each sleep.
    let _ = task::control(libc::PR_SET_TIMERSLACK, 1);
    let mut last = Instant::now();
    loop {
        std::thread::sleep(Duration::from_micros(5));
        let now = Instant::now();
        let gap = (now - last).as_nanos() as u64;
        if gap > page.read(0) {
            page.write(0, gap);
        }
        last = now;
        page.write(8, page.read(8) + 1);
    }
}

fn small(place: &Place) -> anyhow::Result<Check> {
    start_clock(place)?;
    Ok(Box::new(|| Ok(())))
}

/// A filled GiB: the mapping and its first page of interest.
fn gibibyte(
    how: fn(usize) -> Map<'static>,
    advice: i32,
) -> anyhow::Result<(&'static Mapping, usize)> {
    const HUGE: usize = 2 << 20;
    let memory = how(GIB + HUGE).make()?.leak();
    let first = (HUGE - memory.address() % HUGE) % HUGE / PAGE;
    let count = GIB / PAGE;
    memory.advise(first, count, advice)?;
    for page in first..first + count {
        memory.fill_page(page, 20);
    }
    Ok((memory, first))
}

fn memory(place: &Place, advice: i32) -> anyhow::Result<Check> {
    let (memory, first) = gibibyte(Map::private, advice)?;
    let count = GIB / PAGE;
    start_clock(place)?;
    Ok(Box::new(move || {
        (first..first + count)
            .step_by(61)
            .try_for_each(|page| memory.check_page(page, 20))
            .map_err(|error| anyhow!(error))
    }))
}

fn pages(place: &Place) -> anyhow::Result<Check> {
    memory(place, libc::MADV_NOHUGEPAGE)
}

fn huge(place: &Place) -> anyhow::Result<Check> {
    memory(place, libc::MADV_HUGEPAGE)
}

/// A GiB that changes on demand: as many pages as the third word of `clock` says, all over it, after
/// which the word is zero again; or, while the fourth is not zero, pages of a part of it again and again,
/// counted in the fifth.
fn rounds(place: &Place) -> anyhow::Result<Check> {
    changing(place, Map::private)
}

/// The same with shared memory.
fn rounds_shared(place: &Place) -> anyhow::Result<Check> {
    changing(place, Map::shared)
}

fn changing(place: &Place, how: fn(usize) -> Map<'static>) -> anyhow::Result<Check> {
    let (memory, first) = gibibyte(how, libc::MADV_NOHUGEPAGE)?;
    let count = GIB / PAGE;
    let board = start_clock(place)?;
    std::thread::spawn(move || {
        let mut turn = 0;
        loop {
            let wanted = (board.read(16) as usize).min(count);
            if wanted > 0 {
                for page in 0..wanted {
                    let page = first + page * (count / wanted);
                    memory.write(page * PAGE, memory.read(page * PAGE) + 1);
                }
                board.write(16, 0);
            } else if board.read(24) != 0 {
                // One percent, every page written whole: a program that writes one word only for
                // each fault exists in benchmarks only.
                turn = (turn + 1) % (count / 100);
                memory.fill_page(first + turn * 100, turn as u64);
                board.write(32, board.read(32) + 1);
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    });
    Ok(Box::new(move || {
        (first..first + count).step_by(61).try_for_each(|page| {
            let right = memory.read(page * PAGE + 8) != 0;
            ensure!(right, "page {page} lost its content");
            Ok(())
        })
    }))
}

fn threads(place: &Place) -> anyhow::Result<Check> {
    const COUNT: usize = 500;
    for _ in 0..COUNT {
        std::thread::Builder::new().stack_size(64 << 10).spawn(|| {
            loop {
                std::thread::park();
            }
        })?;
    }
    start_clock(place)?;
    Ok(Box::new(|| {
        let count = std::fs::read_dir("/proc/self/task")?.count();
        ensure!(count == COUNT + 2, "{count} threads");
        Ok(())
    }))
}

fn processes(place: &Place) -> anyhow::Result<Check> {
    let mut children = Vec::new();
    for _ in 0..200 {
        children.push(task::fork(0, task::sleep_forever)?);
    }
    start_clock(place)?;
    Ok(Box::new(move || {
        for child in &children {
            let ended = task::wait_id(*child, libc::WEXITED | libc::WNOHANG)?;
            ensure!(ended.is_none(), "child {child} ended: {ended:?}");
        }
        Ok(())
    }))
}

/// A thousand: files, pipes, counters and pairs of sockets.
fn descriptors(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("data");
    std::fs::write(&path, [b'x'; 4096])?;
    let mut held: Vec<OwnedFd> = Vec::new();
    for _ in 0..600 {
        held.push(File::open(&path)?.into());
    }
    for _ in 0..100 {
        let (out, into) = rustix::pipe::pipe()?;
        held.extend([out, into]);
        held.push(eventfd(1, EventfdFlags::NONBLOCK)?);
    }
    for _ in 0..50 {
        let (left, right) = UnixStream::pair()?;
        held.extend([left.into(), right.into()]);
    }
    start_clock(place)?;
    Ok(Box::new(move || {
        held.iter()
            .try_for_each(|fd| rustix::io::fcntl_getfd(fd).map(drop))
            .map_err(Into::into)
    }))
}
