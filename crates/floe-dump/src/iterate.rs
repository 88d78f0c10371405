//! A dump in rounds: pre-dumps until the rest is small, then the final dump.
//!
//! The result is one directory: the final dump's images, and the rounds in `generations/N` inside of it,
//! each linked to the one before. A restore of the directory needs to know nothing of this.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use floe_inject::Watch;
use floe_kernel::features::KernelFeatures;
use floe_kernel::ids::{HostPid, PAGE_SIZE};
use floe_options::{AfterDump, DumpOptions, IterateOptions, Place};
use floe_resources::mount::in_memory;

use crate::error::DumpError;
use crate::generations::Generations;
use crate::leftovers::Leftovers;
use crate::report::DumpReport;
use crate::reserve::running_tasks;
use crate::track::refuse_own_parent;
use crate::{Destination, Seal, predump};

/// A round that writes more than this part of what the one before wrote does not pay, in percent.
const PAYS: u64 = 85;

/// One round.
#[derive(Clone, Copy, Debug)]
pub struct RoundReport {
    /// From 0.
    pub number: u32,
    pub pages_written: u64,
    pub pages_in_parent: u64,
    /// How long the program stood still.
    pub frozen: Duration,
    pub took: Duration,
    /// Bytes that the program changes in a second; `None` in the first round.
    pub dirty_rate: Option<u64>,
    /// How long the final dump would stop the program now; `None` in the first round.
    pub expected_freeze: Option<Duration>,
}

/// Why no further round was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The expected freeze is short enough.
    Converged,
    /// Rounds do not get smaller any more.
    NoGain,
    /// As many as were asked for or allowed.
    Rounds,
    /// The time is up.
    Time,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StopReason::Converged => "the rest is expected to fit the freeze that was asked for",
            StopReason::NoGain => {
                "rounds stopped paying: the program changes memory as fast as it is copied"
            }
            StopReason::Rounds => "as many rounds as were asked for",
            StopReason::Time => "the time for rounds is up",
        })
    }
}

/// The final dump, and why it came when it did.
#[derive(Debug)]
pub struct IterateReport {
    pub dump: DumpReport,
    pub rounds: u32,
    pub reason: StopReason,
}

/// Dumps the tree in rounds as `limits` say; `show` is told of each. The rounds go into the directory, and
/// `seal` may make something else of all of it. What cannot be saved is found before the first round. If it
/// fails, no round and no tracking is left that was not there before.
pub fn dump_in_rounds(
    (options, seal): (&DumpOptions, Option<&Seal<'_>>),
    limits: IterateOptions,
    environment: (&KernelFeatures, Option<&Watch>),
    show: &mut dyn FnMut(&RoundReport),
) -> Result<IterateReport, DumpError> {
    let root = HostPid(options.tree.get());
    refuse_own_parent(&options.place)?;
    let mut before = Leftovers::before(root, &options.place.images_dir);
    let mut copy = || {
        let generations = &mut before.generations;
        let (rounds, reason) = copy_rounds(options, limits, (environment, generations), show)?;
        let last = last_options(options, generations);
        let destination = Destination { store: None, seal };
        let (features, watch) = environment;
        let dump = crate::dump_to(&destination, &last, features, watch)?;
        Ok(IterateReport {
            dump,
            rounds,
            reason,
        })
    };
    let outcome = copy();
    let removed = outcome.is_err() && before.remove();
    // Nobody asked for what a next chain could begin with.
    if outcome.is_ok() && !options.track_mem && options.after != AfterDump::Kill {
        before.end_tracking();
    }
    if !removed && options.place.prev_images_dir.is_none() {
        before.generations.remove_earlier();
    }
    outcome
}

/// Makes rounds until there is a reason not to go on.
fn copy_rounds(
    options: &DumpOptions,
    limits: IterateOptions,
    ((features, watch), generations): ((&KernelFeatures, Option<&Watch>), &mut Generations),
    show: &mut dyn FnMut(&RoundReport),
) -> Result<(u32, StopReason), DumpError> {
    let started = Instant::now();
    let mut progress = Progress::default();
    loop {
        let number = progress.rounds;
        if number >= limits.max_rounds {
            return Ok((number, StopReason::Rounds));
        }
        let last = (number == 0).then(|| last_options(options, generations));
        let round = round_options(options, generations)?;
        let began = Instant::now();
        let report = predump::round(&round, last.as_ref(), (features, watch))?;
        let files = in_memory(&running_tasks(HostPid(options.tree.get())), options);
        let files = files.iter().map(|found| found.bytes).sum();
        let round = progress.note(began, &report, files);
        if watch.is_some_and(Watch::is_cancelled) {
            return Err(DumpError::Cancelled);
        }
        show(&round);
        if let Some(reason) = progress.verdict(&round, limits, started.elapsed()) {
            return Ok((progress.rounds, reason));
        }
    }
}

/// The final dump, after these rounds.
fn last_options(options: &DumpOptions, generations: &Generations) -> DumpOptions {
    let mut last = options.clone();
    if let Some(newest) = generations.newest() {
        last.place.prev_images_dir = Some(newest);
    }
    if last.after == AfterDump::Kill {
        last.track_mem = false;
    }
    last
}

/// The next round.
fn round_options(
    options: &DumpOptions,
    generations: &mut Generations,
) -> Result<DumpOptions, DumpError> {
    let mut round = options.clone();
    round.place = Place::new(generations.make()?);
    round.place.prev_images_dir = match generations.before_newest() {
        Some(before) => Some(before),
        // The chain may go on from another one.
        None => options.place.prev_images_dir.as_ref().map(|previous| {
            if previous.is_absolute() {
                previous.clone()
            } else {
                Path::new("../..").join(previous)
            }
        }),
    };
    Ok(round)
}

/// What earlier rounds tell about the next one.
#[derive(Debug, Default)]
struct Progress {
    rounds: u32,
    /// When the last round armed, and what it wrote.
    last: Option<(Instant, u64)>,
    /// What the last two rounds after the first wrote, in pages.
    written: Vec<u64>,
}

impl Progress {
    /// Of files in memory there are `files` bytes, which no round copies.
    fn note(&mut self, began: Instant, report: &DumpReport, files: u64) -> RoundReport {
        let counts = &report.memory;
        let pages = counts.pages_written + counts.shared_written;
        let took = began.elapsed();
        let rate = self.last.map(|(armed, _)| {
            let micros = (began - armed).as_micros().max(1);
            (u128::from(pages * PAGE_SIZE) * 1_000_000 / micros) as u64
        });
        // What changes while this round copies has to be copied at the speed of this round.
        let expected = rate.map(|rate| {
            let bytes = u128::from(rate) * took.as_micros() / 1_000_000 + u128::from(files);
            let work = report.memory_reading.max(report.memory_writing);
            let copied = u128::from(report.image_bytes.max(1));
            let micros = bytes * work.as_micros().max(1) / copied;
            // Shared memory is compared while the program stands still then.
            report.frozen + report.shared_comparing + Duration::from_micros(micros as u64)
        });
        let round = RoundReport {
            number: self.rounds,
            pages_written: pages,
            pages_in_parent: counts.pages_in_parent + counts.shared_in_parent,
            frozen: report.frozen,
            took,
            dirty_rate: rate,
            expected_freeze: expected,
        };
        if self.rounds > 0 {
            self.written.push(pages);
        }
        self.last = Some((began, pages));
        self.rounds += 1;
        round
    }

    fn verdict(
        &self,
        round: &RoundReport,
        limits: IterateOptions,
        elapsed: Duration,
    ) -> Option<StopReason> {
        if limits.max_time.is_some_and(|limit| elapsed >= limit) {
            return Some(StopReason::Time);
        }
        if limits.fixed {
            return None;
        }
        if round
            .expected_freeze
            .is_some_and(|freeze| freeze <= limits.max_freeze)
        {
            return Some(StopReason::Converged);
        }
        match self.written.as_slice() {
            [.., before, now] if now * 100 > before * PAYS => Some(StopReason::NoGain),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(pages: u64) -> DumpReport {
        let mut report = DumpReport {
            image_bytes: pages * PAGE_SIZE,
            memory_reading: Duration::from_millis(pages / 100),
            frozen: Duration::from_millis(1),
            ..DumpReport::default()
        };
        report.memory.pages_written = pages;
        report
    }

    fn run(rounds: &[u64], limits: IterateOptions) -> Option<StopReason> {
        run_beside(0, rounds, limits)
    }

    fn run_beside(files: u64, rounds: &[u64], limits: IterateOptions) -> Option<StopReason> {
        let mut progress = Progress::default();
        let mut verdict = None;
        for pages in rounds {
            let began = Instant::now();
            std::thread::sleep(Duration::from_millis(5));
            let round = progress.note(began, &report(*pages), files);
            verdict = progress.verdict(&round, limits, Duration::ZERO);
        }
        verdict
    }

    #[test]
    fn files_in_memory_make_the_expected_freeze_longer() {
        let (limits, gib) = (IterateOptions::default(), 1 << 30);
        assert_eq!(run_beside(gib, &[100_000, 10], limits), None);
        let verdict = run_beside(gib, &[100_000, 10, 10], limits);
        assert_eq!(verdict, Some(StopReason::NoGain));
    }

    #[test]
    fn rounds_end_when_the_rest_is_small_or_does_not_shrink() {
        let limits = IterateOptions::default();
        assert_eq!(run(&[100_000], limits), None);
        assert_eq!(run(&[100_000, 10], limits), Some(StopReason::Converged));
        assert_eq!(
            run(&[100_000, 90_000, 89_000], limits),
            Some(StopReason::NoGain)
        );
        let fixed = IterateOptions {
            fixed: true,
            ..limits
        };
        assert_eq!(run(&[100_000, 10], fixed), None);
    }
}
