//! Sets of pages as runs in address order that do not overlap.

use floe_kernel::ids::PAGE_SIZE;

use crate::select::PageRun;

/// Appends a run to a set, joined with the last one where they touch; what the set has already is left
/// out.
pub fn push_run(runs: &mut Vec<PageRun>, start: u64, end: u64) {
    let start = runs.last().map_or(start, |last| start.max(last.end()));
    if start >= end {
        return;
    }
    match runs.last_mut() {
        Some(last) if last.end() == start => last.pages += (end - start) / PAGE_SIZE,
        _ => runs.push(PageRun {
            start,
            pages: (end - start) / PAGE_SIZE,
        }),
    }
}

/// The pages that are in both sets.
pub fn intersection(left: &[PageRun], right: &[PageRun]) -> Vec<PageRun> {
    let mut both = Vec::new();
    let (mut i, mut j) = (0, 0);
    while let (Some(one), Some(other)) = (left.get(i), right.get(j)) {
        let (start, end) = (one.start.max(other.start), one.end().min(other.end()));
        if start < end {
            push_run(&mut both, start, end);
        }
        if one.end() <= other.end() {
            i += 1;
        } else {
            j += 1;
        }
    }
    both
}

/// The pages of `from` that are not in `without`.
pub fn difference(from: &[PageRun], without: &[PageRun]) -> Vec<PageRun> {
    let mut left = Vec::new();
    let mut j = 0;
    for run in from {
        let mut start = run.start;
        while without.get(j).is_some_and(|hole| hole.end() <= start) {
            j += 1;
        }
        let mut at = j;
        while let Some(hole) = without.get(at).filter(|hole| hole.start < run.end()) {
            if start < hole.start {
                push_run(&mut left, start, hole.start);
            }
            start = start.max(hole.end());
            at += 1;
        }
        if start < run.end() {
            push_run(&mut left, start, run.end());
        }
    }
    left
}

/// Brings runs that may overlap into the form of a set.
pub fn normalised(mut runs: Vec<PageRun>) -> Vec<PageRun> {
    runs.sort_unstable_by_key(|run| run.start);
    let mut set: Vec<PageRun> = Vec::with_capacity(runs.len());
    for run in runs {
        let covered = set.last().map_or(0, PageRun::end);
        if run.end() > covered {
            push_run(&mut set, run.start.max(covered), run.end());
        }
    }
    set
}

/// Number of pages in a set.
pub fn page_count(runs: &[PageRun]) -> u64 {
    runs.iter().map(|run| run.pages).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A set from page numbers.
    fn set(pages: &[u64]) -> Vec<PageRun> {
        let mut runs = Vec::new();
        for page in pages {
            push_run(&mut runs, page * PAGE_SIZE, (page + 1) * PAGE_SIZE);
        }
        runs
    }

    fn pages(bits: u32) -> Vec<u64> {
        (0..16).filter(|page| bits >> page & 1 == 1).collect()
    }

    #[test]
    fn sets_behave_as_bits_do() {
        // A linear congruential generator: any spread of bits will do.
        let mut state = 12345u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        for _ in 0..2000 {
            let (a, b) = (next() & 0xffff, next() & 0xffff);
            let (left, right) = (set(&pages(a)), set(&pages(b)));
            assert_eq!(intersection(&left, &right), set(&pages(a & b)));
            assert_eq!(difference(&left, &right), set(&pages(a & !b)));
            let both = [left.clone(), right.clone()].concat();
            assert_eq!(normalised(both), set(&pages(a | b)));
            assert_eq!(page_count(&left), u64::from(a.count_ones()));
        }
    }
}
