//! System call filters (`seccomp(2)`).
//!
//! Saved:    mode of each thread; filters once each, as chains (`seccomp.img`).
//! Rebuilt:  installed by each thread, oldest first, at the very end. Needs: all the rest.
//! Not kept: listeners (`SECCOMP_FILTER_FLAG_NEW_LISTENER`).

use std::collections::HashMap;

use floe_image::messages::{SeccompEntry, SeccompFilter, SeccompMode, ThreadCoreEntry};
use floe_kernel::ids::HostPid;
use floe_kernel::proc::Status;
use floe_kernel::ptrace;

use crate::collect::CollectError;

const TSYNC: u32 = 1;

/// The filters of all threads. Threads with the same chain share its entries, so that restore can tell
/// inherited filters from equal ones of their own.
#[derive(Debug, Default)]
pub struct SeccompFilters {
    entry: SeccompEntry,
    known: HashMap<(Vec<u8>, Option<u32>, u32), u32>,
}

/// A thread's filters, newest first.
type Chain = Vec<(Vec<u8>, u32)>;

impl SeccompFilters {
    /// Collects the filters of all threads of one task, the leader first, and fills in their cores.
    pub fn collect(
        &mut self,
        threads: &mut [(HostPid, &Status, &mut ThreadCoreEntry)],
    ) -> Result<(), CollectError> {
        let mut chains = Vec::with_capacity(threads.len());
        for (tid, status, core) in threads.iter_mut() {
            let mode = match status.seccomp {
                0 => None,
                1 => Some(SeccompMode::Strict),
                _ => Some(SeccompMode::Filter),
            };
            core.seccomp_mode = mode.map(|mode| mode as i32);
            chains.push(if mode == Some(SeccompMode::Filter) {
                read_chain(*tid)?
            } else {
                Chain::new()
            });
        }
        let synced = chains.len() > 1
            && !chains[0].is_empty()
            && chains.iter().all(|chain| *chain == chains[0]);
        if synced {
            // One call by the leader installs them in all threads.
            chains
                .iter_mut()
                .flatten()
                .for_each(|(_, flags)| *flags |= TSYNC);
        }
        for ((_, _, core), chain) in threads.iter_mut().zip(&chains) {
            core.seccomp_filter = self.add(chain);
        }
        Ok(())
    }

    /// The number of a chain's newest filter.
    fn add(&mut self, chain: &Chain) -> Option<u32> {
        let mut prev = None;
        for (program, flags) in chain.iter().rev() {
            let next = self.entry.seccomp_filters.len() as u32;
            let number = *self
                .known
                .entry((program.clone(), prev, *flags))
                .or_insert(next);
            if number == next {
                let filter = SeccompFilter {
                    filter: program.clone(),
                    prev,
                    flags: Some(*flags),
                };
                self.entry.seccomp_filters.push(filter);
            }
            prev = Some(number);
        }
        prev
    }

    /// The content of `seccomp.img`.
    pub fn into_entry(self) -> SeccompEntry {
        self.entry
    }
}

fn read_chain(tid: HostPid) -> Result<Chain, CollectError> {
    let failed = |source| CollectError::Task {
        pid: tid,
        action: "Reading the seccomp filters",
        source,
    };
    let mut chain = Vec::new();
    while let Some(program) = ptrace::seccomp_filter(tid, chain.len() as u64).map_err(failed)? {
        let flags = ptrace::seccomp_filter_flags(tid, chain.len() as u64).map_err(failed)?;
        chain.push((program, flags as u32));
    }
    Ok(chain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_chains_share_entries_and_longer_ones_build_on_them() {
        let mut filters = SeccompFilters::default();
        let (old, new) = ((vec![1; 8], 0), (vec![2; 8], 0));
        assert_eq!(filters.add(&vec![old.clone()]), Some(0));
        assert_eq!(filters.add(&vec![new.clone(), old.clone()]), Some(1));
        assert_eq!(filters.add(&vec![old]), Some(0));
        assert_eq!(filters.add(&Chain::new()), None);
        let entry = filters.into_entry();
        assert_eq!(
            (entry.seccomp_filters.len(), entry.seccomp_filters[1].prev),
            (2, Some(0))
        );
    }
}
