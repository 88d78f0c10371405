//! `cargo xtask bench --group rounds`: checkpoints in rounds of a GiB of which 1 % changes between them,
//! beside a full dump of the peer in the same run.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use testkit::sys::memory::Map;
use testkit::{Engine, Fixture};

const WORKLOAD: &str = "bench-rounds";
/// The same with shared memory.
const SHARED: &str = "bench-rounds-shared";
/// Rows of the table.
const VALUES: usize = 11;
/// Pages that change between two rounds: 1 % of a GiB.
const DIRTY: u64 = 2621;
const PAGE: u64 = 4096;
/// Generations of the chain that is restored.
const CHAIN: usize = 10;
/// How long writes are counted.
const WINDOW: Duration = Duration::from_secs(1);
/// How long the workload may take for what it is asked for.
const LIMIT: Duration = Duration::from_secs(30);

/// Words of the workload's `clock`.
const GAP: u64 = 0;
const LOOKS: u64 = 8;
const CHANGE: u64 = 16;
const WRITING: u64 = 24;
const WRITES: u64 = 32;

/// What a row must reach.
enum Mark {
    AtMost(f64),
    AtLeast(f64),
    None,
}

struct Row {
    name: &'static str,
    unit: &'static str,
    mark: Mark,
    values: Vec<f64>,
}

/// Measures all, and gives the rows of the document.
pub fn measure(
    floe: &Engine,
    peer: Option<&Engine>,
    place: &Path,
    rounds: usize,
) -> anyhow::Result<String> {
    let row = |name, unit, mark| Row {
        name,
        unit,
        mark,
        values: Vec::new(),
    };
    let mut rows = [
        row("freeze of the first round", "ms", Mark::AtMost(25.0)),
        row("freeze of a later round", "ms", Mark::AtMost(8.0)),
        row("freeze of the final dump", "ms", Mark::AtMost(15.0)),
        row("freeze of the peer's full dump", "ms", Mark::None),
        row("the peer's freeze to ours", "times", Mark::AtLeast(30.0)),
        row(
            "bytes written to bytes changed",
            "times",
            Mark::AtMost(1.05),
        ),
        row(
            "writes between rounds to untracked",
            "times",
            Mark::AtLeast(0.95),
        ),
        row("restore of 10 generations", "ms", Mark::None),
        row("the same, squashed to one", "ms", Mark::None),
        row(
            "restore of the chain to that of one",
            "times",
            Mark::AtMost(1.1),
        ),
        row("freeze of the final dump, the GiB shared", "ms", Mark::None),
    ];
    for round in 0..=rounds {
        let mut found = [f64::NAN; VALUES];
        life(floe, peer, place, &mut found)?;
        restores(floe, place, &mut found)?;
        found[10] = shared(floe, place)?;
        for (row, value) in rows.iter_mut().zip(found) {
            eprintln!("{} {round}: {value:.3} {}", row.name, row.unit);
            if round > 0 && !value.is_nan() {
                row.values.push(value);
            }
        }
    }
    Ok(table(&mut rows))
}

/// A running workload and where its generations go.
struct Life {
    fixture: Fixture,
    clock: File,
    chain: PathBuf,
    generations: usize,
}

impl Life {
    fn start(workload: &str, place: &Path) -> anyhow::Result<Life> {
        let fixture = Fixture::start_in(workload, place)?;
        let clock = File::options()
            .read(true)
            .write(true)
            .open(fixture.home().join("clock"))
            .context("the workload's clock")?;
        let chain = fixture.home().with_file_name("chain");
        fs::create_dir_all(&chain)?;
        Ok(Life {
            fixture,
            clock,
            chain,
            generations: 0,
        })
    }

    fn word(&self, at: u64) -> anyhow::Result<u64> {
        let mut bytes = [0; 8];
        self.clock.read_exact_at(&mut bytes, at)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn set(&self, at: u64, value: u64) -> anyhow::Result<()> {
        Ok(self.clock.write_all_at(&value.to_ne_bytes(), at)?)
    }

    /// Runs a command on the tree; how long its clock stood still, in milliseconds.
    fn freeze(
        &mut self,
        (engine, word): (&Engine, &str),
        images: &Path,
        options: &[&str],
    ) -> anyhow::Result<f64> {
        fs::create_dir_all(images)?;
        warm_memory()?;
        self.set(GAP, 0)?;
        let tree = self.fixture.pid.to_string();
        let words = [word, "--tree", &tree];
        let outcome = engine.run(&words, images, "dump.log", options, &[])?;
        outcome.ok(&format!("{word} by {}", engine.name))?;
        // The gap is whole when the clock has looked again afterwards.
        let looks = self.word(LOOKS)?;
        self.wait(|life| Ok(life.word(LOOKS)? >= looks + 2))?;
        Ok(self.word(GAP)? as f64 / 1e6)
    }

    /// The next generation, as a round or as the final dump of a tree that runs on.
    fn generation(&mut self, floe: &Engine, word: &str) -> anyhow::Result<f64> {
        let number = self.generations;
        self.generations += 1;
        let before = format!("../{}", number.saturating_sub(1));
        let mut options = vec!["--track-mem"];
        if number > 0 {
            options.extend(["--prev-images-dir", &before]);
        }
        if word == "dump" {
            // As in a dump that ends the tree, nothing is tracked any more.
            options.retain(|option| *option != "--track-mem");
            options.push("--leave-running");
        }
        let images = self.chain.join(number.to_string());
        self.freeze((floe, word), &images, &options)
    }

    fn change(&self) -> anyhow::Result<()> {
        self.set(CHANGE, DIRTY)?;
        self.wait(|life| Ok(life.word(CHANGE)? == 0))
    }

    fn wait(&self, done: impl Fn(&Life) -> anyhow::Result<bool>) -> anyhow::Result<()> {
        let deadline = Instant::now() + LIMIT;
        while !done(self)? {
            ensure!(Instant::now() < deadline, "the workload does not answer");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Pages written in a second.
    fn throughput(&self) -> anyhow::Result<f64> {
        let (began, before) = (Instant::now(), self.word(WRITES)?);
        self.set(WRITING, 1)?;
        std::thread::sleep(WINDOW);
        let written = self.word(WRITES)? - before;
        let took = began.elapsed();
        self.set(WRITING, 0)?;
        Ok(written as f64 / took.as_secs_f64())
    }
}

/// One chain of three generations, beside a full dump of the peer.
fn life(
    floe: &Engine,
    peer: Option<&Engine>,
    place: &Path,
    found: &mut [f64; VALUES],
) -> anyhow::Result<()> {
    let mut life = Life::start(WORKLOAD, place)?;
    if let Some(peer) = peer {
        let images = life.chain.join("peer");
        found[3] = life.freeze((peer, "dump"), &images, &["--leave-running"])?;
        fs::remove_dir_all(&images)?;
    }
    let untracked = life.throughput()?;
    found[0] = life.generation(floe, "pre-dump")?;
    found[6] = life.throughput()? / untracked;
    life.change()?;
    life.generation(floe, "pre-dump")?;
    life.change()?;
    found[1] = life.generation(floe, "pre-dump")?;
    life.change()?;
    found[2] = life.generation(floe, "dump")?;
    found[4] = found[3] / found[2];
    let pages = fs::metadata(life.chain.join("3/pages-1.img"))?.size();
    found[5] = pages as f64 / (DIRTY * PAGE) as f64;
    life.fixture.check()
}

/// The final freeze of a program whose memory is shared.
fn shared(floe: &Engine, place: &Path) -> anyhow::Result<f64> {
    let mut life = Life::start(SHARED, place)?;
    for _ in 0..2 {
        life.generation(floe, "pre-dump")?;
        life.change()?;
    }
    let freeze = life.generation(floe, "dump")?;
    life.fixture.check()?;
    Ok(freeze)
}

/// A chain of ten generations and the same as one, restored one after the other.
fn restores(floe: &Engine, place: &Path, found: &mut [f64; VALUES]) -> anyhow::Result<()> {
    let mut life = Life::start(WORKLOAD, place)?;
    for _ in 1..CHAIN {
        life.generation(floe, "pre-dump")?;
        life.change()?;
    }
    life.generation(floe, "dump")?;
    life.fixture.kill()?;
    let chain = life.chain.join((CHAIN - 1).to_string());
    let single = life.chain.join("single");
    squash(floe, &chain, &single)?;
    let mut took = [Vec::new(), Vec::new()];
    for turn in 0..4 {
        for which in [turn % 2, 1 - turn % 2] {
            warm_memory()?;
            let (images, took) = ([&chain, &single][which], &mut took[which]);
            life.fixture.set_images(images.clone());
            took.push(life.fixture.restore(floe, &[])?.took.as_secs_f64() * 1e3);
            life.fixture.check().context("after the restore")?;
            life.fixture.kill()?;
        }
    }
    // What a restore takes longer than the shortest is the machine's doing.
    let [chain, single] = took.map(|took| took.into_iter().fold(f64::INFINITY, f64::min));
    (found[7], found[8], found[9]) = (chain, single, chain / single);
    Ok(())
}

/// Has this machine get as much memory as is needed next: a virtual machine may have handed free memory back
/// to its host, and then a page costs ten times as much when it is touched first.
fn warm_memory() -> anyhow::Result<()> {
    let memory = Map::private(5 << 28).make()?;
    (0..memory.pages()).for_each(|page| memory.write(page * PAGE as usize, 1));
    Ok(())
}

/// Makes one checkpoint of a chain.
fn squash(floe: &Engine, chain: &Path, single: &Path) -> anyhow::Result<()> {
    let mut command = std::process::Command::new(&floe.path);
    let output = command
        .arg("squash")
        .arg(chain)
        .arg("-o")
        .arg(single)
        .output()?;
    ensure!(
        output.status.success(),
        "squash: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn table(rows: &mut [Row]) -> String {
    let mut text = String::from(
        "|  | median | least | most | mark |  |\n| --- | --- | --- | --- | --- | --- |\n",
    );
    for row in rows.iter_mut().filter(|row| !row.values.is_empty()) {
        let middle = median(&mut row.values);
        let (least, most) = (row.values[0], row.values[row.values.len() - 1]);
        let (mark, verdict) = match row.mark {
            Mark::AtMost(mark) => (format!("at most {mark}"), verdict(middle <= mark)),
            Mark::AtLeast(mark) => (format!("at least {mark}"), verdict(middle >= mark)),
            Mark::None => (String::new(), ""),
        };
        let digits = if row.unit == "ms" { 1 } else { 3 };
        text.push_str(&format!(
            "| {}, {} | {middle:.digits$} | {least:.digits$} | {most:.digits$} | {mark} | {verdict} |\n",
            row.name, row.unit
        ));
    }
    text
}

fn verdict(holds: bool) -> &'static str {
    if holds { "holds" } else { "misses" }
}
