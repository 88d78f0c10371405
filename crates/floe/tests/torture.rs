//! Chains of pre-dumps of programs that change their memory at random: at the final freeze a full dump is
//! taken too, and every page that the chain resolves to, by each tracker, equals the full dump's.
//!
//! `FLOE_TORTURE=N` takes N chains; 200 without it.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use floe_image::messages::{CoreEntry, PstreeEntry};
use floe_image::{ImageDir, ImageKind};
use floe_memory::{PageIndex, StoredRun};
use rustix::process::{Pid, Signal, kill_process};
use testkit::{Engine, Fixture, skips};

/// Chains without `FLOE_TORTURE`.
const CHAINS: usize = 200;
const PAGE: usize = 4096;

fn floe() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

/// Makes a directory for a generation, and one round in it.
fn pre_dump(pid: i32, base: &Path, number: usize, tracker: &str) -> anyhow::Result<()> {
    let images = base.join(number.to_string());
    fs::create_dir_all(&images)?;
    let previous = number.checked_sub(1).map(|before| format!("../{before}"));
    let mut options = vec!["--track-mem", "--tracker", tracker];
    if let Some(previous) = &previous {
        options.extend(["--prev-images-dir", previous]);
    }
    let tree = pid.to_string();
    let words = ["pre-dump", "--tree", &tree];
    let outcome = floe().run(&words, &images, "pre-dump.log", &options, &[])?;
    outcome.ok(&format!("round {number}")).map(drop)
}

/// The bytes of a run.
fn read(index: &PageIndex, run: StoredRun) -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![0; run.len as usize];
    index
        .open(run.file)?
        .read_exact_at(&mut bytes, run.offset)?;
    Ok(bytes)
}

/// Every page of the full dump is in the chain with the same content, and none besides; answers how many.
/// A page that is not there counts as one of zeros, or of the mapped file: khugepaged fills holes even in
/// a stopped program, and a page of a file that the kernel drops looks as if it were swapped out.
fn compare(chain: &Path, full: &Path, file: &[u8]) -> anyhow::Result<u64> {
    let (chain, full) = (ImageDir::open(chain)?, ImageDir::open(full)?);
    let mut compared = 0;
    for kind in [ImageKind::Pagemap, ImageKind::ShmemPagemap] {
        let ids = full.ids(kind)?;
        ensure!(chain.ids(kind)? == ids, "other {kind:?}s than {ids:?}");
        for id in ids {
            let found = PageIndex::read(&chain, kind, id)?;
            let wanted = PageIndex::read(&full, kind, id)?;
            let rseq = match kind {
                ImageKind::Pagemap => rseq_areas(&full, id)?,
                _ => Vec::new(),
            };
            let known = (file, rseq.as_slice());
            let pages =
                contains(&found, &wanted, known).and_then(|_| contains(&wanted, &found, known));
            compared += pages.with_context(|| format!("{kind:?} {id}"))?;
        }
    }
    Ok(compared)
}

/// Where the threads of a process have registered restartable sequences (`rseq(2)`).
fn rseq_areas(images: &ImageDir, pid: u64) -> anyhow::Result<Vec<u64>> {
    let tree: Vec<PstreeEntry> = images.read_all(ImageKind::Pstree, 0)?;
    let task = tree.iter().find(|task| u64::from(task.pid) == pid);
    let mut areas = Vec::new();
    for tid in &task.context("a pagemap of no task")?.threads {
        let core: CoreEntry = images.read_one(ImageKind::Core, u64::from(*tid))?;
        let rseq = core.thread_core.and_then(|thread| thread.rseq_entry);
        areas.extend(rseq.map(|rseq| rseq.rseq_abi_pointer));
    }
    Ok(areas)
}

/// Empties what the kernel itself writes into the areas when a thread comes to another processor, which our
/// own calls let it do while the program is stopped: `cpu_id_start`, `cpu_id`, `node_id`, `mm_cid`.
fn without_processor(page: &mut [u8], at: u64, rseq: &[u64]) {
    for area in rseq {
        for word in [0, 4, 20, 24] {
            let offset = (area + word).checked_sub(at).map(|offset| offset as usize);
            if let Some(bytes) = offset.and_then(|offset| page.get_mut(offset..offset + 4)) {
                bytes.fill(0);
            }
        }
    }
}

/// All that `wanted` has is in `found`; answers how many pages that are.
fn contains(
    found: &PageIndex,
    wanted: &PageIndex,
    (file, rseq): (&[u8], &[u64]),
) -> anyhow::Result<u64> {
    let mut compared = 0;
    for run in wanted.runs() {
        let mut there = vec![0; run.len as usize];
        for piece in found.runs_in(run.start..run.end()) {
            let from = (piece.start - run.start) as usize;
            there[from..from + piece.len as usize].copy_from_slice(&read(found, piece)?);
        }
        let mut bytes = read(wanted, *run)?;
        without_processor(&mut there, run.start, rseq);
        without_processor(&mut bytes, run.start, rseq);
        let pages = there.chunks(PAGE).zip(bytes.chunks(PAGE)).enumerate();
        for (page, (there, wanted)) in pages {
            let at = run.start + (page * PAGE) as u64;
            let is_stored = found.runs_in(at..at + PAGE as u64).next().is_some();
            let is_of_file = !is_stored && file.chunks(PAGE).any(|page| page == wanted);
            ensure!(
                there == wanted || is_of_file,
                "page {at:#x} differs{}: {}",
                if is_stored { "" } else { " and is not stored" },
                difference(there, wanted)
            );
            compared += 1;
        }
    }
    Ok(compared)
}

/// The bytes from the first to the last that differ.
fn difference(there: &[u8], wanted: &[u8]) -> String {
    let differs = |at: &usize| there[*at] != wanted[*at];
    let (first, last) = (
        (0..wanted.len()).find(differs),
        (0..wanted.len()).rfind(differs),
    );
    let (first, last) = (first.unwrap_or(0), last.unwrap_or(0));
    let end = (last + 1).min(first + 32);
    format!(
        "{first:#x} to {last:#x}, {:02x?} for {:02x?}",
        &there[first..end],
        &wanted[first..end]
    )
}

/// Rounds with one tracker, then final dumps with all of them and a full one, and a restore.
fn chain(seed: usize, trackers: &[&str]) -> anyhow::Result<()> {
    // What copies the rounds, in turn, most often the best. The final dump is made with each.
    let live = trackers[(seed % (trackers.len() + 1)).saturating_sub(1)];
    let rounds = 1 + seed / 4 % 4;
    let mut fixture = Fixture::start("memory-churn")?;
    // In memory, where nothing waits for a disk.
    let base = tempfile::tempdir_in("/dev/shm")?;
    for number in 0..rounds {
        pre_dump(fixture.pid, base.path(), number, live)?;
        std::thread::sleep(Duration::from_millis((seed * 7 + number * 11) as u64 % 23));
    }
    let previous = format!("../{}", rounds - 1);
    for &tracker in trackers {
        fixture.set_images(base.path().join(tracker));
        let options = [
            "--leave-stopped",
            "--prev-images-dir",
            &previous,
            "--tracker",
            tracker,
        ];
        let outcome = fixture.try_dump(&floe(), &options, &[])?;
        outcome.ok(&format!("the final dump with {tracker}"))?;
    }
    let full = base.path().join("full");
    fixture.set_images(full.clone());
    let outcome = fixture.try_dump(&floe(), &["--leave-stopped"], &[])?;
    outcome.ok("the full dump")?;
    let file = fs::read(fixture.home().join("churned"))?;
    for &tracker in trackers {
        let pages = compare(&base.path().join(tracker), &full, &file);
        let pages = pages.with_context(|| format!("rounds by {live}, at last {tracker}"))?;
        ensure!(pages > 100, "only {pages} pages were compared");
    }
    fixture.kill()?;
    fixture.set_images(base.path().join(trackers[seed / 2 % trackers.len()]));
    fixture.restore(&floe(), &[])?;
    // All but the first dump found the tasks stopped.
    for pid in fixture.family().into_iter().filter_map(Pid::from_raw) {
        let _ = kill_process(pid, Signal::CONT);
    }
    fixture.check().context("after the restore")?;
    fixture.check().context("when it had run on")
}

/// Every second chain, so that the tests below run beside each other.
fn chains(name: &str, first: usize) {
    if !rustix::process::geteuid().is_root() {
        skips::skip(name, "needs root").expect("the skip is listed");
        return;
    }
    let asked = std::env::var("FLOE_TORTURE").ok();
    let count = asked.and_then(|text| text.parse().ok()).unwrap_or(CHAINS);
    let trackers = floe().trackers().expect("`floe check` answers");
    let began = Instant::now();
    for seed in (first..count).step_by(2) {
        if let Err(error) = chain(seed, &trackers) {
            panic!("chain {seed}: {error:#}");
        }
        println!("chain {seed} of {count}: {:.0?}", began.elapsed());
    }
}

#[test]
fn every_page_of_an_even_chain_is_that_of_a_full_dump() {
    chains("every_page_of_an_even_chain_is_that_of_a_full_dump", 0);
}

#[test]
fn every_page_of_an_odd_chain_is_that_of_a_full_dump() {
    chains("every_page_of_an_odd_chain_is_that_of_a_full_dump", 1);
}
