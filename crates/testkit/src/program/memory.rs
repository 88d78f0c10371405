//! Memory of every kind.

use std::fs::{self, File};
use std::os::fd::AsFd;

use anyhow::{Context, anyhow, ensure};
use libc::{MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE};
use rustix::fs::{MemfdFlags, SealFlags};

use super::tasks::Child;
use super::{Check, Missing, Place, Program, fact, unchanged};
use crate::sys::memory::{Map, Mapping, PAGE, program_break};
use crate::sys::sysv;

pub const PROGRAMS: &[Program] = &[
    Program::new("memory-private", private),
    Program::new("memory-sparse", sparse),
    Program::new("memory-shared", shared),
    Program::new("memory-cow", cow),
    Program::new("memory-growsdown", growsdown),
    Program::new("memory-files", files),
    Program::new("memory-deleted-file", deleted_file),
    Program::new("memory-memfd", memfd),
    Program::new("memory-advice", advice),
    Program::new("memory-hugetlb", hugetlb),
    Program::new("memory-guard", guard),
    Program::new("memory-system-v", system_v),
    Program::new("memory-large", large),
];

fn text(result: Result<(), String>) -> anyhow::Result<()> {
    result.map_err(|error| anyhow!(error))
}

/// Values of the line `field` of the `smaps` entry that holds `address`.
fn smaps(address: usize, field: &str) -> anyhow::Result<String> {
    let text = fs::read_to_string("/proc/self/smaps")?;
    let mut inside = false;
    for line in text.lines() {
        let range = line
            .split_once(' ')
            .and_then(|(range, _)| range.split_once('-'))
            .and_then(|(start, end)| {
                Some((
                    usize::from_str_radix(start, 16).ok()?,
                    usize::from_str_radix(end, 16).ok()?,
                ))
            });
        if let Some((start, end)) = range {
            inside = (start..end).contains(&address);
        } else if let Some(rest) = line.strip_prefix(field)
            && inside
        {
            return Ok(rest.trim_start_matches(':').trim().to_owned());
        }
    }
    Err(anyhow!("no {field} for {address:#x} in smaps"))
}

fn kib(address: usize, field: &str) -> anyhow::Result<u64> {
    let value = smaps(address, field)?;
    let number = value.split_whitespace().next().unwrap_or_default();
    number.parse().with_context(|| format!("{field} {value}"))
}

/// More than an engine may hold at once.
fn large(_: &Place) -> anyhow::Result<Check> {
    let memory = Map::private(64 << 20).make()?.leak();
    memory.fill(3);
    Ok(Box::new(move || text(memory.check(3))))
}

/// Pages of every protection with content, and holes between them.
fn private(_: &Place) -> anyhow::Result<Check> {
    let memory = Map::private(64 * PAGE).make()?.leak();
    memory.fill(1);
    memory.punch(20, 4)?;
    memory.protect(8, 4, PROT_READ)?;
    memory.protect(32, 8, PROT_NONE)?;
    let heap: Vec<u64> = (0..100_000).collect();
    let end = program_break();
    Ok(Box::new(move || {
        ensure!(!memory.is_readable(21)?, "the hole is mapped");
        ensure!(!memory.is_readable(33)?, "PROT_NONE can be read");
        memory.protect(32, 8, PROT_READ)?;
        for page in (0..20).chain(24..64) {
            text(memory.check_page(page, 1))?;
        }
        memory.protect(32, 8, PROT_NONE)?;
        memory.fill_page(0, 1);
        ensure!(
            heap.iter().copied().eq(0..100_000),
            "the heap has other content"
        );
        ensure!(program_break() >= end, "the heap's end moved down");
        Ok(())
    }))
}

/// A page here and there; pages of zeroes stay without memory.
fn sparse(_: &Place) -> anyhow::Result<Check> {
    let mut map = Map::private(1 << 30);
    map.flags |= MAP_NORESERVE;
    let memory = map.make()?.leak();
    memory.advise(0, memory.pages(), libc::MADV_NOHUGEPAGE)?;
    for page in (0..memory.pages()).step_by(1000) {
        memory.fill_page(page, 2);
    }
    // Read only: these get the kernel's page of zeroes.
    (1..memory.pages()).step_by(1000).for_each(|page| {
        memory.read(page * PAGE);
    });
    let address = memory.address();
    Ok(Box::new(move || {
        let held = kib(address, "Rss")?;
        ensure!(held < 8 * 1024, "{held} KiB are held for 1 MiB of content");
        for page in (0..memory.pages()).step_by(1000) {
            text(memory.check_page(page, 2))?;
        }
        Ok(())
    }))
}

/// A shared mapping without a name, seen by parent and child.
fn shared(place: &Place) -> anyhow::Result<Check> {
    let memory = Map::shared(32 * PAGE).make()?.leak();
    (0..16).for_each(|page| memory.fill_page(page, 3));
    let mut child = Child::start(place, |_| {
        Ok(Box::new(move || {
            (0..16).try_for_each(|page| text(memory.check_page(page, 3)))?;
            memory.write(20 * PAGE, memory.read(20 * PAGE) + 1);
            Ok(())
        }))
    })?;
    Ok(Box::new(move || {
        let before = memory.read(20 * PAGE);
        child.check()?;
        let after = memory.read(20 * PAGE);
        ensure!(after == before + 1, "the child's write is not seen");
        (0..16).try_for_each(|page| text(memory.check_page(page, 3)))
    }))
}

/// Pages shared copy-on-write stay shared; pages changed since the fork stay apart.
fn cow(place: &Place) -> anyhow::Result<Check> {
    const PAGES: usize = 2048;
    let memory = Map::private(PAGES * PAGE).make()?.leak();
    memory.advise(0, PAGES, libc::MADV_NOHUGEPAGE)?;
    memory.fill(4);
    let mut child = Child::start(place, |_| {
        (0..100).for_each(|page| memory.fill_page(page, 5));
        Ok(Box::new(move || {
            (0..100).try_for_each(|page| text(memory.check_page(page, 5)))?;
            (100..PAGES).try_for_each(|page| text(memory.check_page(page, 4)))
        }))
    })?;
    Ok(Box::new(move || {
        child.check()?;
        text(memory.check(4))?;
        let (rss, pss) = (kib(memory.address(), "Rss")?, kib(memory.address(), "Pss")?);
        ensure!(
            pss * 4 < rss * 3,
            "pages are not shared with the child: Pss {pss} KiB of Rss {rss} KiB"
        );
        Ok(())
    }))
}

/// A stack-like mapping, which grows when touched below.
fn growsdown(_: &Place) -> anyhow::Result<Check> {
    let mut map = Map::private(4 * PAGE);
    map.flags |= libc::MAP_GROWSDOWN;
    let memory = map.make()?.leak();
    memory.fill(6);
    Ok(Box::new(move || {
        text(memory.check(6))?;
        let flags = smaps(memory.address(), "VmFlags")?;
        ensure!(
            flags.split_whitespace().any(|flag| flag == "gd"),
            "the mapping does not grow: VmFlags {flags}"
        );
        Ok(())
    }))
}

/// Private and shared mappings of a file, the private one partly changed.
fn files(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("mapped");
    fs::write(&path, vec![0x55_u8; 16 * PAGE])?;
    let file = File::options().read(true).write(true).open(&path)?;
    let map = |flags, protection, offset: usize| Map {
        length: (16 - offset) * PAGE,
        protection,
        flags,
        file: Some((file.as_fd(), (offset * PAGE) as i64)),
    };
    let ours = map(MAP_PRIVATE, PROT_READ | PROT_WRITE, 0).make()?.leak();
    let theirs = map(MAP_SHARED, PROT_READ | PROT_WRITE, 4).make()?.leak();
    let looked = map(MAP_SHARED, PROT_READ, 8).make()?.leak();
    (0..4).for_each(|page| ours.fill_page(page, 7));
    theirs.fill_page(0, 8);
    drop(file);
    Ok(Box::new(move || {
        (0..4).try_for_each(|page| text(ours.check_page(page, 7)))?;
        ensure!(
            ours.read(5 * PAGE) == 0x5555_5555_5555_5555,
            "page 5 of the file differs"
        );
        text(theirs.check_page(0, 8))?;
        let next = theirs.read(6 * PAGE) + 1;
        theirs.write(6 * PAGE, next);
        ensure!(
            looked.read(2 * PAGE) == next,
            "the mappings of one file differ"
        );
        let file = fs::read(&path)?;
        let at = 10 * PAGE;
        ensure!(
            file[at..at + 8] == next.to_ne_bytes(),
            "the write is not in the file"
        );
        Ok(())
    }))
}

/// A mapping of a file that has no name any more, and a descriptor of it.
fn deleted_file(place: &Place) -> anyhow::Result<Check> {
    let path = place.path("gone");
    fs::write(&path, vec![0_u8; 8 * PAGE])?;
    let file = File::options().read(true).write(true).open(&path)?;
    let memory = Map {
        length: 8 * PAGE,
        protection: PROT_READ | PROT_WRITE,
        flags: MAP_SHARED,
        file: Some((file.as_fd(), 0)),
    };
    let memory = memory.make()?.leak();
    fs::remove_file(&path)?;
    memory.fill(9);
    Ok(Box::new(move || {
        text(memory.check(9))?;
        ensure!(!path.exists(), "the deleted file has its name again");
        let mut word = [0_u8; 8];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut word, PAGE as u64)?;
        ensure!(
            u64::from_ne_bytes(word) == memory.read(PAGE),
            "mapping and descriptor differ"
        );
        Ok(())
    }))
}

/// A sealed memfd, with a descriptor and two mappings.
fn memfd(_: &Place) -> anyhow::Result<Check> {
    let fd = rustix::fs::memfd_create("floe-test", MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, 16 * PAGE as u64)?;
    let map = |flags| Map {
        length: 16 * PAGE,
        protection: PROT_READ | PROT_WRITE,
        flags,
        file: Some((fd.as_fd(), 0)),
    };
    let shared: &Mapping = map(MAP_SHARED).make()?.leak();
    shared.fill(10);
    let private = map(MAP_PRIVATE).make()?.leak();
    private.fill_page(3, 11);
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(Box::new(move || {
        text(shared.check(10))?;
        text(private.check_page(3, 11))?;
        text(private.check_page(4, 10))?;
        let seals = rustix::fs::fcntl_get_seals(&fd)?;
        ensure!(
            seals == SealFlags::SHRINK | SealFlags::GROW,
            "seals are {seals:?}"
        );
        ensure!(
            rustix::fs::ftruncate(&fd, 0).is_err(),
            "the sealed memfd shrank"
        );
        Ok(())
    }))
}

/// What `madvise` and `mlock` left in the flags of mappings.
fn advice(_: &Place) -> anyhow::Result<Check> {
    let advices = [
        libc::MADV_NORMAL,
        libc::MADV_DONTFORK,
        libc::MADV_DONTDUMP,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_HUGEPAGE,
        libc::MADV_RANDOM,
        libc::MADV_SEQUENTIAL,
        libc::MADV_WIPEONFORK,
    ];
    let mut mappings = Vec::new();
    for advice in advices {
        // Kept apart by pages without access, so that no two of them merge.
        let memory = Map::private(6 * PAGE).make()?.leak();
        memory.fill(12);
        memory.protect(0, 1, PROT_NONE)?;
        memory.protect(5, 1, PROT_NONE)?;
        memory.advise(1, 4, advice)?;
        mappings.push((advice, memory));
    }
    let locked = Map::private(6 * PAGE).make()?.leak();
    locked.fill(12);
    locked.protect(0, 1, PROT_NONE)?;
    locked.protect(5, 1, PROT_NONE)?;
    locked.lock(1, 4)?;
    mappings.push((-1, locked));
    let list = mappings.clone();
    let mut flags = unchanged(move || {
        list.iter()
            .map(|(advice, memory)| {
                let flags = smaps(memory.address() + PAGE, "VmFlags")?;
                // Soft-dirty is the kernel's own note, not the program's wish.
                let flags: Vec<&str> = flags.split(' ').filter(|flag| *flag != "sd").collect();
                Ok(fact(
                    format!("VmFlags with advice {advice}"),
                    flags.join(" "),
                ))
            })
            .collect()
    })?;
    Ok(Box::new(move || {
        flags()?;
        for (_, memory) in &mappings {
            (1..5).try_for_each(|page| text(memory.check_page(page, 12)))?;
        }
        Ok(())
    }))
}

fn hugetlb(_: &Place) -> anyhow::Result<Check> {
    let mut map = Map::private(2 << 20);
    map.flags |= libc::MAP_HUGETLB;
    let memory = map
        .make()
        .map_err(|error| Missing(format!("no huge page is free: {error}")))?
        .leak();
    memory.fill(13);
    Ok(Box::new(move || {
        text(memory.check(13))?;
        let size = kib(memory.address(), "KernelPageSize")?;
        ensure!(size == 2048, "pages of {size} KiB");
        Ok(())
    }))
}

/// Pages that must not be touched, made so by `MADV_GUARD_INSTALL` (Linux 6.13).
fn guard(_: &Place) -> anyhow::Result<Check> {
    const GUARD_INSTALL: i32 = 102;
    let memory = Map::private(16 * PAGE).make()?.leak();
    memory.fill(14);
    memory
        .advise(4, 2, GUARD_INSTALL)
        .map_err(|error| Missing(format!("no guard regions: {error}")))?;
    Ok(Box::new(move || {
        for page in 0..16 {
            let guarded = (4..6).contains(&page);
            ensure!(
                memory.is_readable(page)? != guarded,
                "page {page}: guarded should be {guarded}"
            );
            if !guarded {
                text(memory.check_page(page, 14))?;
            }
        }
        Ok(())
    }))
}

/// A segment attached twice, with a hole and different protections, shared with a child.
fn system_v(place: &Place) -> anyhow::Result<Check> {
    const PAGES: usize = 8;
    let id = sysv::segment(libc::IPC_PRIVATE, PAGES)?;
    let memory = sysv::attach(id, PAGES, 0)?.leak();
    let seen = sysv::attach(id, PAGES, libc::SHM_RDONLY)?.leak();
    sysv::mark(id)?;
    (0..PAGES - 2).for_each(|page| memory.fill_page(page, 15));
    memory.protect(5, 1, PROT_READ)?;
    memory.punch(3, 1)?;
    let mut child = Child::start(place, move |_| {
        Ok(Box::new(move || {
            memory.write(7 * PAGE, memory.read(7 * PAGE) + 1);
            Ok(())
        }))
    })?;
    let before = sysv::state(id)?;
    ensure!(before.1, "the segment is not marked");
    Ok(Box::new(move || {
        let count = seen.read(7 * PAGE);
        child.check()?;
        ensure!(
            seen.read(7 * PAGE) == count + 1,
            "the child's write is not seen"
        );
        let after = sysv::state(id).context("asking for the segment by its number")?;
        ensure!(
            after == before,
            "attached and marked {after:?}, before {before:?}"
        );
        ensure!(!memory.is_readable(3)?, "the hole is mapped");
        ensure!(
            seen.protect(0, 1, PROT_READ | PROT_WRITE).is_err(),
            "it became writable"
        );
        memory.protect(5, 1, PROT_READ | PROT_WRITE)?;
        memory.protect(5, 1, PROT_READ)?;
        (0..PAGES - 2).try_for_each(|page| text(seen.check_page(page, 15)))
    }))
}
