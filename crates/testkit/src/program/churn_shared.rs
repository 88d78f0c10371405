//! Memory that two processes of `memory-churn` share and change at random: anonymous, a memfd, System V.
//! Each has every second page of a segment for its own, and knows what must be in those.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::{anyhow, ensure};
use libc::{PROT_READ, PROT_WRITE};
use rustix::fs::{FallocateFlags, MemfdFlags};

use crate::sys::memory::{Map, Mapping, PAGE, page_bytes};
use crate::sys::{sysv, task};

/// Pages of a segment.
const PAGES: usize = 768;
/// Processes that write a segment.
const WRITERS: usize = 2;

/// What a segment is.
enum Origin {
    Anonymous,
    Memfd(File),
    SystemV(i32),
}

/// A segment as one of its writers has it.
pub struct Part {
    map: Mapping,
    origin: Origin,
    writer: usize,
    /// What our own pages hold: the seed, or 0 for zeros.
    seeds: Vec<u64>,
}

/// Which segments there are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kinds {
    All,
    /// CRIU restores none of System V outside of an IPC namespace.
    WithoutSystemV,
}

/// The parts of each writer, in one address space: the others are to be dropped after a fork.
pub fn make(kinds: Kinds) -> anyhow::Result<[Vec<Part>; WRITERS]> {
    let mut parts = [Vec::new(), Vec::new()];
    let memfd = File::from(rustix::fs::memfd_create("churned", MemfdFlags::CLOEXEC)?);
    memfd.set_len((PAGES * PAGE) as u64)?;
    let id = match kinds {
        Kinds::All => Some(sysv::segment(libc::IPC_PRIVATE, PAGES)?),
        Kinds::WithoutSystemV => None,
    };
    let anonymous = Map::shared(PAGES * PAGE).make()?;
    for (writer, part) in parts.iter_mut().enumerate() {
        let mut add = |map, origin| {
            part.push(Part {
                map,
                origin,
                writer,
                seeds: vec![0; PAGES],
            });
        };
        add(anonymous.again()?, Origin::Anonymous);
        add(map_file(&memfd)?, Origin::Memfd(memfd.try_clone()?));
        if let Some(id) = id {
            add(sysv::attach(id, PAGES, 0)?, Origin::SystemV(id));
        }
    }
    id.map_or(Ok(()), sysv::mark)?;
    Ok(parts)
}

fn map_file(file: &File) -> anyhow::Result<Mapping> {
    let how = Map {
        file: Some((file.as_fd(), 0)),
        ..Map::shared(PAGES * PAGE)
    };
    Ok(how.make()?)
}

impl Part {
    /// Changes something; `next` answers numbers below its argument.
    pub fn step(&mut self, next: &mut dyn FnMut(usize) -> usize) -> anyhow::Result<()> {
        let page = next(PAGES / WRITERS) * WRITERS + self.writer;
        let seed = (next(1 << 50) | 1) as u64;
        match next(100) {
            0..50 => self.fill(page, seed),
            50..58 => self
                .map
                .advise(page, 1 + next(PAGES - page), libc::MADV_DONTNEED)?,
            58..66 => self.empty(page)?,
            // Through page tables that are gone at the next look.
            66..72 => {
                self.map.again()?.fill_page(page, seed);
                self.seeds[page] = seed;
            }
            72..77 => self.fill_by_child(page, seed)?,
            77..83 => self.renew()?,
            83..90 => self.fill_past_mapping(page, seed)?,
            90..94 => {
                self.map.protect(0, PAGES, PROT_READ)?;
                self.map.protect(0, PAGES, PROT_READ | PROT_WRITE)?;
            }
            _ => drop(self.map.read(next(PAGES) * PAGE)),
        }
        Ok(())
    }

    fn fill(&mut self, page: usize, seed: u64) {
        self.map.fill_page(page, seed);
        self.seeds[page] = seed;
    }

    /// Takes a page out of the segment.
    fn empty(&mut self, page: usize) -> anyhow::Result<()> {
        match &self.origin {
            Origin::Memfd(file) => {
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(file, how, (page * PAGE) as u64, PAGE as u64)?;
            }
            _ => self.map.advise(page, 1, libc::MADV_REMOVE)?,
        }
        self.seeds[page] = 0;
        Ok(())
    }

    /// A child writes and ends.
    fn fill_by_child(&mut self, page: usize, seed: u64) -> anyhow::Result<()> {
        let map = &self.map;
        let child = task::fork(0, || {
            map.fill_page(page, seed);
            0
        })?;
        let ended = task::wait_id(child, libc::WEXITED)?;
        ensure!(
            matches!(ended, Some((libc::CLD_EXITED, 0))),
            "the child that writes ended with {ended:?}"
        );
        self.seeds[page] = seed;
        Ok(())
    }

    /// Maps the segment anew, elsewhere.
    fn renew(&mut self) -> anyhow::Result<()> {
        self.map = self.other()?;
        Ok(())
    }

    /// A further mapping.
    fn other(&self) -> anyhow::Result<Mapping> {
        match &self.origin {
            Origin::Anonymous => Ok(self.map.again()?),
            Origin::Memfd(file) => map_file(file),
            Origin::SystemV(id) => Ok(sysv::attach(*id, PAGES, 0)?),
        }
    }

    /// Writes it in a way that no mapping of before shows.
    fn fill_past_mapping(&mut self, page: usize, seed: u64) -> anyhow::Result<()> {
        if let Origin::Memfd(file) = &self.origin {
            file.write_all_at(&page_bytes(page, seed), (page * PAGE) as u64)?;
        } else {
            self.other()?.fill_page(page, seed);
        }
        self.seeds[page] = seed;
        Ok(())
    }

    /// Whether every page of ours holds what it must.
    pub fn check(&self) -> anyhow::Result<()> {
        let mine = self.seeds.iter().enumerate();
        for (page, &seed) in mine.skip(self.writer).step_by(WRITERS) {
            if seed != 0 {
                let checked = self.map.check_page(page, seed);
                checked.map_err(|error| anyhow!("shared with another process: {error}"))?;
                continue;
            }
            let is_zero = (0..PAGE / 8).all(|word| self.map.read(page * PAGE + word * 8) == 0);
            ensure!(is_zero, "page {page} of shared memory is not zero");
        }
        Ok(())
    }
}
