//! Holding rounds back to a rate (`--max-rate`), so that they leave the disk or the network to others.

use std::time::{Duration, Instant};

use floe_kernel::ids::PAGE_SIZE;
use floe_memory::PageRun;

/// Waits are about this long: short enough to be even, long enough to be right.
const STEP: Duration = Duration::from_millis(50);

/// Sends pages no faster than a rate.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Bytes in a second, at least a page.
    rate: u64,
    /// When what was sent so far may be followed by more.
    due: Instant,
}

impl Pace {
    /// Begins now; `rate` is in bytes a second.
    pub fn new(rate: u64) -> Pace {
        Pace {
            rate: rate.max(PAGE_SIZE),
            due: Instant::now(),
        }
    }

    /// Bytes that are sent at once.
    fn portion(&self) -> u64 {
        (self.rate / (1000 / STEP.as_millis() as u64)).max(PAGE_SIZE) / PAGE_SIZE * PAGE_SIZE
    }

    /// Gives `runs` to `send` bit by bit, and waits in between.
    pub fn send<E>(
        &mut self,
        runs: &[PageRun],
        mut send: impl FnMut(&[PageRun]) -> Result<(), E>,
    ) -> Result<(), E> {
        let most = self.portion() / PAGE_SIZE;
        let mut batch = Vec::new();
        let mut pages = 0;
        for run in runs {
            let (mut start, mut left) = (run.start, run.pages);
            while left > 0 {
                let taken = left.min(most - pages);
                batch.push(PageRun {
                    start,
                    pages: taken,
                });
                start += taken * PAGE_SIZE;
                left -= taken;
                pages += taken;
                if pages == most {
                    self.pass(&mut batch, pages, &mut send)?;
                    pages = 0;
                }
            }
        }
        self.pass(&mut batch, pages, &mut send)
    }

    fn pass<E>(
        &mut self,
        batch: &mut Vec<PageRun>,
        pages: u64,
        send: &mut impl FnMut(&[PageRun]) -> Result<(), E>,
    ) -> Result<(), E> {
        if pages == 0 {
            return Ok(());
        }
        let now = Instant::now();
        std::thread::sleep(self.due.saturating_duration_since(now));
        // Time that nothing was sent in is not made up for.
        let from = self.due.max(now);
        let micros = u128::from(pages * PAGE_SIZE) * 1_000_000 / u128::from(self.rate);
        self.due = from + Duration::from_micros(micros as u64);
        send(batch)?;
        batch.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_sent_in_order_and_not_faster() {
        let mut pace = Pace::new(100 * PAGE_SIZE);
        let runs = [(0, 7), (0x10_0000, 5)].map(|(start, pages)| PageRun { start, pages });
        let mut sent = Vec::new();
        let began = Instant::now();
        let result: Result<(), ()> = pace.send(&runs, |batch| {
            assert!(batch.iter().map(|run| run.pages).sum::<u64>() <= 5);
            for run in batch {
                sent.extend((0..run.pages).map(|page| run.start + page * PAGE_SIZE));
            }
            Ok(())
        });
        assert_eq!(result, Ok(()));
        let expected: Vec<u64> = (0..7)
            .map(|page| page * PAGE_SIZE)
            .chain((0..5).map(|page| 0x10_0000 + page * PAGE_SIZE))
            .collect();
        assert_eq!(sent, expected);
        assert!(began.elapsed() >= Duration::from_millis(100));
    }
}
