//! Programs that change their memory at random all the time, and know what must be in it: a root with
//! several threads, and a child that forks others, of which some become other programs.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow, ensure};
use libc::{PROT_NONE, PROT_READ, PROT_WRITE};

use super::churn_shared::{self, Kinds, Part};
use super::{Check, Place, Program};
use crate::sys::memory::{Map, Mapping, PAGE};
use crate::sys::task;

pub const PROGRAMS: &[Program] = &[
    Program::new("memory-churn", |place| churn(place, Kinds::All)),
    Program::new("memory-churn-without-system-v", |place| {
        churn(place, Kinds::WithoutSystemV)
    }),
    Program::new("memory-churn-again", again),
];

/// Threads of the root that churn.
const THREADS: usize = 2;
/// Steps between two breaks, in which a check can come in.
const STEPS: usize = 25;
/// How long a break is: the dumps need the processors, too.
const BREAK: Duration = Duration::from_millis(2);
/// Regions at most.
const REGIONS: usize = 16;
/// Pages in the file that some regions map.
const FILE_PAGES: usize = 32;
/// Pages of a region with huge pages: one of them whatever its address.
const HUGE_PAGES: usize = 1024;
/// Seed of the file's pages.
const FILE_SEED: u64 = 0xf11e;

/// What a page must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Zero,
    Filled(u64),
    /// `MADV_FREE`: what it was, or zeros.
    FreedFrom(u64),
    /// The page of the file at this place.
    File,
}

/// What a region is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Anonymous,
    Shared,
    /// A private mapping of the file.
    File,
}

struct Region {
    map: Mapping,
    pages: Vec<Content>,
    kind: Kind,
    hidden: bool,
}

struct Churn {
    regions: Vec<Region>,
    /// What is shared with another process that writes it, too.
    parts: Vec<Part>,
    file: File,
    random: u64,
    steps: u64,
}

impl Churn {
    fn new(file: File, random: u64) -> Self {
        Churn {
            regions: Vec::new(),
            parts: Vec::new(),
            file,
            random: random | 1,
            steps: 0,
        }
    }

    fn next(&mut self, below: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as usize % below
    }

    fn step(&mut self) -> anyhow::Result<()> {
        self.steps += 1;
        if self.regions.len() < 4 {
            return self.map();
        }
        if !self.parts.is_empty() && self.next(5) == 0 {
            return self.step_shared();
        }
        match self.next(100) {
            0..58 => self.write(),
            58..66 if self.regions.len() < REGIONS => self.map(),
            66..70 => {
                let victim = self.next(self.regions.len());
                self.regions.swap_remove(victim);
                Ok(())
            }
            70..74 => self.renew(),
            74..80 => self.resize(),
            80..86 => self.drop_pages(libc::MADV_DONTNEED),
            86..90 => self.drop_pages(libc::MADV_FREE),
            90..93 => self.drop_pages(libc::MADV_REMOVE),
            _ => self.protect(),
        }
    }

    fn step_shared(&mut self) -> anyhow::Result<()> {
        let mut parts = std::mem::take(&mut self.parts);
        let at = self.next(parts.len());
        let done = parts[at].step(&mut |below| self.next(below));
        self.parts = parts;
        done
    }

    fn map(&mut self) -> anyhow::Result<()> {
        let (kind, huge) = match self.next(40) {
            0..10 => (Kind::File, false),
            10..16 => (Kind::Shared, false),
            16 => (Kind::Anonymous, true),
            _ => (Kind::Anonymous, false),
        };
        let pages = match kind {
            Kind::File => FILE_PAGES,
            _ if huge => HUGE_PAGES,
            _ => 1 + self.next(40),
        };
        let file = self.file.try_clone()?;
        let how = match kind {
            Kind::File => Map {
                file: Some((file.as_fd(), 0)),
                ..Map::private(pages * PAGE)
            },
            Kind::Shared => Map::shared(pages * PAGE),
            Kind::Anonymous => Map::private(pages * PAGE),
        };
        let map = how.make()?;
        if huge {
            map.advise(0, pages, libc::MADV_HUGEPAGE)?;
        }
        let content = match kind {
            Kind::File => Content::File,
            _ => Content::Zero,
        };
        self.regions.push(Region {
            map,
            pages: vec![content; pages],
            kind,
            hidden: false,
        });
        Ok(())
    }

    /// Replaces a region by a new one at its address.
    fn renew(&mut self) -> anyhow::Result<()> {
        let at = self.next(self.regions.len());
        let region = &mut self.regions[at];
        if region.kind == Kind::Anonymous {
            region.map.renew()?;
            region.pages.fill(Content::Zero);
            region.hidden = false;
        }
        Ok(())
    }

    /// A region that can be written.
    fn open_region(&mut self) -> Option<usize> {
        let at = self.next(self.regions.len());
        (!self.regions[at].hidden).then_some(at)
    }

    fn write(&mut self) -> anyhow::Result<()> {
        let Some(at) = self.open_region() else {
            return Ok(());
        };
        let seed = self.random | 1;
        let len = self.regions[at].pages.len();
        let (first, count) = (self.next(len), 1 + self.next(4));
        let region = &mut self.regions[at];
        for page in first..len.min(first + count) {
            region.map.fill_page(page, seed);
            region.pages[page] = Content::Filled(seed);
        }
        Ok(())
    }

    fn resize(&mut self) -> anyhow::Result<()> {
        let Some(at) = self.open_region() else {
            return Ok(());
        };
        let pages = 1 + self.next(60);
        let region = &mut self.regions[at];
        if region.kind != Kind::Anonymous {
            return Ok(());
        }
        region.map.resize(pages)?;
        region.pages.resize(pages, Content::Zero);
        Ok(())
    }

    fn drop_pages(&mut self, advice: i32) -> anyhow::Result<()> {
        let Some(at) = self.open_region() else {
            return Ok(());
        };
        let len = self.regions[at].pages.len();
        let first = self.next(len);
        let count = 1 + self.next(len - first);
        let region = &mut self.regions[at];
        let possible = match advice {
            libc::MADV_FREE => region.kind == Kind::Anonymous,
            libc::MADV_REMOVE => region.kind == Kind::Shared,
            _ => true,
        };
        if !possible {
            return Ok(());
        }
        region.map.advise(first, count, advice)?;
        for content in &mut region.pages[first..first + count] {
            *content = match (*content, region.kind) {
                // The pages of the object stay.
                (kept, Kind::Shared) if advice == libc::MADV_DONTNEED => kept,
                (_, Kind::File) => Content::File,
                (Content::Filled(seed) | Content::FreedFrom(seed), _)
                    if advice == libc::MADV_FREE =>
                {
                    Content::FreedFrom(seed)
                }
                _ => Content::Zero,
            };
        }
        Ok(())
    }

    fn protect(&mut self) -> anyhow::Result<()> {
        let at = self.next(self.regions.len());
        let region = &mut self.regions[at];
        region.hidden = !region.hidden;
        let protection = if region.hidden {
            PROT_NONE
        } else {
            PROT_READ | PROT_WRITE
        };
        Ok(region.map.protect(0, region.pages.len(), protection)?)
    }

    fn check(&self) -> anyhow::Result<()> {
        self.parts.iter().try_for_each(Part::check)?;
        for region in &self.regions {
            let pages = region.pages.len();
            if region.hidden {
                region.map.protect(0, pages, PROT_READ)?;
            }
            for (page, content) in region.pages.iter().enumerate() {
                region.check_page(page, *content)?;
            }
            if region.hidden {
                region.map.protect(0, pages, PROT_NONE)?;
            }
        }
        Ok(())
    }
}

impl Region {
    fn is_zero(&self, page: usize) -> bool {
        (0..PAGE / 8).all(|word| self.map.read(page * PAGE + word * 8) == 0)
    }

    fn check_page(&self, page: usize, content: Content) -> anyhow::Result<()> {
        let filled = |seed| {
            let checked = self.map.check_page(page, seed);
            checked.map_err(|error| anyhow!("{error} (at {:#x})", self.map.address()))
        };
        match content {
            Content::Filled(seed) => filled(seed),
            Content::File => filled(FILE_SEED),
            Content::Zero => {
                ensure!(
                    self.is_zero(page),
                    "page {page} at {:#x} is not zero",
                    self.map.address()
                );
                Ok(())
            }
            Content::FreedFrom(_) if self.is_zero(page) => Ok(()),
            Content::FreedFrom(seed) => filled(seed),
        }
    }
}

/// A file whose pages look as if [`Mapping::fill_page`] had written them.
fn make_file(place: &Place) -> anyhow::Result<File> {
    let path = place.path("churned");
    let mut file = File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(path)?;
    file.write_all(&vec![0; FILE_PAGES * PAGE])?;
    let shared = Map {
        file: Some((file.as_fd(), 0)),
        ..Map::shared(FILE_PAGES * PAGE)
    };
    shared.make()?.fill(FILE_SEED);
    Ok(file)
}

/// What the processes tell each other: words in a file that all map.
struct Board(Mapping);

impl Board {
    /// Places for processes below the root; the first is that of the one that forks the others.
    const SLOTS: usize = 5;
    /// The number of the last question.
    const ASKED: usize = 0;
    /// Not zero when a process found its memory changed.
    const FAILED: usize = 1;

    fn open(directory: &Path) -> anyhow::Result<Board> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(directory.join("board"))?;
        file.set_len(PAGE as u64)?;
        let how = Map {
            file: Some((file.as_fd(), 0)),
            ..Map::shared(PAGE)
        };
        Ok(Board(how.make()?))
    }

    fn get(&self, word: usize) -> u64 {
        self.0.read(word * 8)
    }

    fn set(&self, word: usize, value: u64) {
        self.0.write(word * 8, value);
    }

    /// Where a process says which question it answered last.
    fn answered(slot: usize) -> usize {
        8 + slot
    }

    /// Not zero while a process has the slot.
    fn taken(slot: usize) -> usize {
        16 + slot
    }

    /// Has every process below the root check itself.
    fn ask(&self) -> anyhow::Result<()> {
        let question = self.get(Self::ASKED) + 1;
        self.set(Self::ASKED, question);
        let deadline = Instant::now() + Duration::from_secs(30);
        for slot in 0..Self::SLOTS {
            while self.get(Self::taken(slot)) != 0 && self.get(Self::answered(slot)) != question {
                ensure!(
                    Instant::now() < deadline,
                    "the process in slot {slot} does not answer"
                );
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        ensure!(
            self.get(Self::FAILED) == 0,
            "a process found its memory changed (see its output)"
        );
        Ok(())
    }
}

/// One process below the root: churns, and answers questions.
struct Worker {
    churn: Churn,
    board: Board,
    slot: usize,
}

impl Worker {
    fn work(&mut self) {
        let done = (0..STEPS).try_for_each(|_| self.churn.step());
        let asked = self.board.get(Board::ASKED);
        let checked = match done {
            Ok(()) if self.board.get(Board::answered(self.slot)) != asked => self.churn.check(),
            other => other,
        };
        if let Err(error) = checked {
            println!("slot {}: {error:#}", self.slot);
            self.board.set(Board::FAILED, 1);
        }
        self.board.set(Board::answered(self.slot), asked);
        std::thread::sleep(BREAK);
    }

    /// The first below the root: forks others and reaps them.
    fn breed(mut self, directory: &Path) -> i32 {
        let mut children = [0; Board::SLOTS];
        loop {
            self.work();
            let slot = 1 + self.churn.next(Board::SLOTS - 1);
            if children[slot] == 0 && self.churn.next(8) == 0 {
                self.board
                    .set(Board::answered(slot), self.board.get(Board::ASKED));
                self.board.set(Board::taken(slot), 1);
                let seed = self.churn.random;
                let child = task::fork(0, || self.live(slot, seed, directory));
                children[slot] = child.unwrap_or(0);
            }
            for (slot, child) in children.iter_mut().enumerate() {
                let ended = *child != 0
                    && matches!(
                        task::wait_id(*child, libc::WEXITED | libc::WNOHANG),
                        Ok(Some(_))
                    );
                if ended {
                    *child = 0;
                    self.board.set(Board::taken(slot), 0);
                }
            }
        }
    }

    /// A forked child: goes on with its parent's memory, and may become another program.
    fn live(&mut self, slot: usize, seed: u64, directory: &Path) -> i32 {
        self.slot = slot;
        // The parent goes on to write what is shared.
        self.churn.parts.clear();
        self.churn
            .regions
            .retain(|region| region.kind != Kind::Shared);
        self.churn.random = seed.rotate_left(17) | 1;
        for _ in 0..self.churn.next(150) {
            self.work();
        }
        if self.churn.next(3) == 0 {
            let error = Command::new("/proc/self/exe")
                .args(["memory-churn-again".as_ref(), directory.as_os_str()])
                .env("CHURN_SLOT", slot.to_string())
                .exec();
            println!("exec: {error}");
        }
        0
    }
}

/// A child that became another program.
fn again(place: &Place) -> anyhow::Result<Check> {
    let slot = std::env::var("CHURN_SLOT").context("the slot")?.parse()?;
    let file = File::open(place.path("churned"))?;
    let mut worker = Worker {
        churn: Churn::new(file, seed()?),
        board: Board::open(&place.directory)?,
        slot,
    };
    for _ in 0..worker.churn.next(300) {
        worker.work();
    }
    std::process::exit(0);
}

fn seed() -> anyhow::Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(now.as_nanos() as u64 ^ u64::from(std::process::id()) << 40 | 1)
}

/// Starts over without restartable sequences: the kernel writes the number of the processor to their
/// memory whenever a thread comes back from a stop, so that two dumps of a stopped program differ.
fn without_rseq() -> anyhow::Result<()> {
    const TUNABLES: &str = "GLIBC_TUNABLES";
    if std::env::var_os(TUNABLES).is_some() {
        return Ok(());
    }
    let error = Command::new("/proc/self/exe")
        .args(std::env::args_os().skip(1))
        .env(TUNABLES, "glibc.pthread.rseq=0")
        .exec();
    Err(error).context("starting over")
}

/// Threads churn, a child churns and forks; a check holds them up and looks at every page.
fn churn(place: &Place, kinds: Kinds) -> anyhow::Result<Check> {
    without_rseq()?;
    let seed = seed()?;
    println!("seed {seed}");
    let file = make_file(place)?;
    let board = Board::open(&place.directory)?;
    let [ours, theirs] = churn_shared::make(kinds)?;
    let mut worker = Worker {
        churn: Churn::new(file.try_clone()?, seed.rotate_left(9)),
        board: Board::open(&place.directory)?,
        slot: 0,
    };
    board.set(Board::taken(0), 1);
    let mut ours = Some(ours);
    // Before there is a second thread, which might hold a lock.
    task::fork(0, || {
        ours = None;
        worker.churn.parts = theirs;
        worker.breed(&place.directory)
    })?;
    let states: Vec<Arc<Mutex<Churn>>> = (0..THREADS)
        .map(|thread| {
            let mut churn = Churn::new(file.try_clone()?, seed.rotate_left(20 + 7 * thread as u32));
            churn.parts = ours.take().unwrap_or_default();
            Ok(Arc::new(Mutex::new(churn)))
        })
        .collect::<anyhow::Result<_>>()?;
    for state in &states {
        let state = state.clone();
        std::thread::spawn(move || churn_on(&state));
    }
    Ok(Box::new(move || {
        board.ask()?;
        states.iter().try_for_each(|state| {
            let churn = state.lock().unwrap_or_else(PoisonError::into_inner);
            churn.check()
        })
    }))
}

fn churn_on(state: &Mutex<Churn>) {
    loop {
        {
            let mut churn = state.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = (0..STEPS).try_for_each(|_| churn.step()) {
                println!("churning failed: {error:#}");
                std::process::abort();
            }
        }
        std::thread::sleep(BREAK);
    }
}
