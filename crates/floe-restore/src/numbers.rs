//! Which descriptor numbers hold the files of the images until each task has them where they belong.

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::RawFd;

use floe_resources::restore::{PlanError, TreeImages};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The lowest number that we take: below are our own descriptors.
const LOWEST: u32 = 64;
/// Descriptors beside one for each file: segments, namespaces, directories, the courier's.
const BESIDE_FILES: u32 = 192;

/// Numbers that no task uses, enough for all files.
///
/// Tasks inherit what stands there, and move it to its place one after the other. The numbers are above
/// all that tasks use where the limit leaves room (valgrind keeps files right below it).
pub(crate) fn free_numbers(images: &TreeImages) -> Result<Range<RawFd>, PlanError> {
    let used = images.tasks.iter().flat_map(|task| &task.fds);
    let used: BTreeSet<u32> = used.map(|fd| fd.fd).collect();
    let needed = u32::try_from(images.files.len())
        .unwrap_or(u32::MAX)
        .saturating_add(BESIDE_FILES);
    let limit = raise_limit();
    let found = gap(&used, limit, needed).ok_or_else(|| PlanError::Missing {
        object: format!("{} open files", images.files.len()),
        feature: format!("room below {limit} descriptors (raise the limit: `ulimit -Hn`)"),
    })?;
    Ok(found.start.cast_signed()..found.end.cast_signed())
}

/// The numbers above all used ones, or the widest gap between them, if `needed` fit there.
fn gap(used: &BTreeSet<u32>, limit: u32, needed: u32) -> Option<Range<u32>> {
    let highest = used.last().map_or(0, |highest| highest.saturating_add(1));
    let above = highest.max(LOWEST)..limit;
    if above.len() >= needed as usize {
        return Some(above);
    }
    let starts = std::iter::once(LOWEST).chain(used.iter().map(|number| number.saturating_add(1)));
    let gaps = starts.map(|start| {
        let end = used.range(start..).next().copied().unwrap_or(limit);
        start.max(LOWEST)..end.min(limit)
    });
    let widest = gaps.max_by_key(ExactSizeIterator::len)?;
    (widest.len() >= needed as usize).then_some(widest)
}

/// Raises the soft limit of open files, which is for programs that use `select`; returns what holds.
fn raise_limit() -> u32 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let now = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(error) => {
            tracing::debug!(%error, "the limit of open files stays as it is");
            limit.current
        }
    };
    let largest = i32::MAX.cast_unsigned();
    now.map_or(largest, |now| {
        u32::try_from(now).unwrap_or(largest).min(largest)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(numbers: &[u32]) -> BTreeSet<u32> {
        numbers.iter().copied().collect()
    }

    #[test]
    fn files_wait_above_all_that_tasks_use() {
        assert_eq!(gap(&used(&[0, 1, 2]), 1024, 200), Some(64..1024));
        assert_eq!(gap(&used(&[0, 500]), 1024, 200), Some(501..1024));
    }

    #[test]
    fn files_wait_between_descriptors_when_the_last_stands_below_the_limit() {
        assert_eq!(gap(&used(&[0, 100, 1023]), 1024, 200), Some(101..1023));
        assert_eq!(gap(&used(&[900, u32::MAX]), 1024, 200), Some(64..900));
        assert_eq!(gap(&used(&[300, 600, 900]), 1024, 400), None);
        assert_eq!(gap(&used(&[]), 32, 1), None);
    }
}
