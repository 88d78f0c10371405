//! Programs that dirty tracking could get wrong: memory changes places, or has writers that no tracker
//! sees.

use std::os::fd::AsFd;

use anyhow::{Context, anyhow, ensure};
use rustix::fs::MemfdFlags;

use super::{Check, Missing, Place, Program};
use crate::sys::memory::{Map, Mapping, PAGE};
use crate::sys::{sysv, unseen};

/// Programs that can be dumped.
pub const PROGRAMS: &[Program] = &[
    Program::new("memory-moved", moved),
    Program::new("memory-counted", counted),
    Program::new("memory-counted-huge", counted_huge),
    Program::new("memory-counted-hugetlb", counted_hugetlb),
    Program::new("memory-shared-hugetlb", shared_hugetlb),
    Program::new("aio-context", aio),
];

/// Programs with something that no checkpoint can have.
pub const NOT_DUMPED: &[Program] = &[
    Program::new("io-uring-buffers", io_uring),
    Program::new("own-userfaultfd", userfaultfd),
];

/// As large as what one table of pages maps: the kernel moves whole tables where it can.
const TABLE: usize = 2 << 20;

fn text(result: Result<(), String>) -> anyhow::Result<()> {
    result.map_err(|error| anyhow!(error))
}

/// Two mappings that swap their places with every check and are not written any more.
fn moved(_: &Place) -> anyhow::Result<Check> {
    let make = |seed| -> anyhow::Result<Mapping> {
        let memory = Map::private(2 * TABLE).aligned(TABLE)?;
        // A huge page is moved in another way.
        memory.advise(0, memory.pages(), libc::MADV_NOHUGEPAGE)?;
        memory.fill(seed);
        Ok(memory)
    };
    let (mut one, mut other) = (make(1)?, make(2)?);
    Ok(Box::new(move || {
        text(one.check(1))?;
        text(other.check(2))?;
        one.swap(&mut other).context("swapping two mappings")?;
        text(one.check(1))?;
        text(other.check(2))
    }))
}

fn counted(_: &Place) -> anyhow::Result<Check> {
    write_some(Map::private(8 << 20).make()?)
}

/// Where the kernel makes huge pages by itself.
fn counted_huge(_: &Place) -> anyhow::Result<Check> {
    let memory = Map::private(4 * TABLE).aligned(TABLE)?;
    memory
        .advise(0, memory.pages(), libc::MADV_HUGEPAGE)
        .map_err(|error| Missing(format!("no huge pages: {error}")))?;
    write_some(memory)
}

/// Huge pages that were set aside.
fn counted_hugetlb(_: &Place) -> anyhow::Result<Check> {
    let mut map = Map::private(2 * TABLE);
    map.flags |= libc::MAP_HUGETLB;
    let memory = map
        .make()
        .map_err(|error| Missing(format!("no huge page is free: {error}")))?;
    write_some(memory)
}

/// Shared memory in huge pages that were set aside, of every origin; each check writes one page.
fn shared_hugetlb(_: &Place) -> anyhow::Result<Check> {
    let missing = |error: std::io::Error| Missing(format!("no huge page is free: {error}"));
    let mut anonymous = Map::shared(TABLE);
    anonymous.flags |= libc::MAP_HUGETLB;
    let file = rustix::fs::memfd_create("huge", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?;
    rustix::fs::ftruncate(&file, TABLE as u64)?;
    let of_file = Map {
        file: Some((file.as_fd(), 0)),
        ..Map::shared(TABLE)
    };
    let id = sysv::segment_with(libc::IPC_PRIVATE, TABLE / PAGE, libc::SHM_HUGETLB);
    let id = id.map_err(missing)?;
    let of_file = of_file.make();
    let attached = sysv::attach(id, TABLE / PAGE, 0);
    sysv::mark(id)?;
    let all = [anonymous.make(), of_file, attached];
    let all: Vec<Mapping> = all.into_iter().collect::<Result<_, _>>().map_err(missing)?;
    all.iter().for_each(|memory| memory.fill(1));
    let mut round = 1;
    Ok(Box::new(move || {
        for memory in &all {
            text(memory.check_page(0, round))?;
            (1..memory.pages()).try_for_each(|page| text(memory.check_page(page, 1)))?;
            memory.fill_page(0, round + 1);
        }
        round += 1;
        Ok(())
    }))
}

/// Every check writes one page in ten of a mapping, others each time.
fn write_some(memory: Mapping) -> anyhow::Result<Check> {
    let mut seeds = vec![1_u64; memory.pages()];
    memory.fill(1);
    let mut round = 0;
    Ok(Box::new(move || {
        for (page, seed) in seeds.iter().enumerate() {
            text(memory.check_page(page, *seed))?;
        }
        round += 1;
        for page in (round % 10..seeds.len()).step_by(10) {
            seeds[page] = round as u64 + 1;
            memory.fill_page(page, seeds[page]);
        }
        Ok(())
    }))
}

/// A context of asynchronous I/O, into whose memory the kernel writes.
fn aio(_: &Place) -> anyhow::Result<Check> {
    let context = unseen::aio_context()?;
    Ok(Box::new(move || {
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        let start = format!("{context:x}-");
        let ring = maps.lines().find(|line| line.starts_with(&start));
        ensure!(ring.is_some_and(|line| line.contains("[aio]")), "no ring");
        Ok(())
    }))
}

/// A ring with a registered buffer, whose pages are pinned.
fn io_uring(_: &Place) -> anyhow::Result<Check> {
    let memory = Map::private(16 * PAGE).make()?;
    memory.fill(5);
    let ring = unseen::io_uring_with_buffer(&memory)
        .map_err(|error| Missing(format!("no io_uring: {error}")))?;
    Ok(Box::new(move || {
        let _ = &ring;
        text(memory.check(5))
    }))
}

/// A userfaultfd that waits for faults in a mapping which nobody touches.
fn userfaultfd(_: &Place) -> anyhow::Result<Check> {
    let memory = Map::private(16 * PAGE).make()?;
    let written = Map::private(16 * PAGE).make()?;
    written.fill(6);
    let fd = unseen::userfaultfd_over(&memory)
        .map_err(|error| Missing(format!("no userfaultfd: {error}")))?;
    Ok(Box::new(move || {
        let _ = (&fd, &memory);
        text(written.check(6))
    }))
}
