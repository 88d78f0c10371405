//! System call filters (`seccomp(2)`).
//!
//! Saved:    mode of each thread; filters once each, as chains (`seccomp.img`).
//! Rebuilt:  installed by each thread, oldest first, at the very end; by the leader for all threads where
//!           the image says that they share them. Needs: all the rest.
//! Not kept: listeners (`SECCOMP_FILTER_FLAG_NEW_LISTENER`).

use std::collections::HashMap;

use floe_image::messages::{CoreEntry, SeccompEntry, SeccompFilter, SeccompMode, ThreadCoreEntry};
use floe_inject::{Arg, Program};
use floe_kernel::ids::HostPid;
use floe_kernel::proc::Status;
use floe_kernel::ptrace;

use super::credentials::{CAP_SYS_ADMIN, Credentials};
use super::rebuild::{TaskContext, thread_core};
use crate::collect::CollectError;
use crate::restore::PlanError;

/// Installs in all threads (`SECCOMP_FILTER_FLAG_TSYNC`).
const TSYNC: u32 = 1;

/// The filters of all threads. Threads with the same chain share its entries, so that restore can tell
/// inherited filters from equal ones of their own.
#[derive(Debug, Default)]
pub struct SeccompFilters {
    entry: SeccompEntry,
    known: HashMap<(Vec<u8>, Option<u32>, u32), u32>,
}

/// A thread's filters, oldest first.
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
            // One call by the leader installs them in all threads, whose cores then say nothing.
            chains[0].iter_mut().for_each(|(_, flags)| *flags |= TSYNC);
            chains[1..].iter_mut().for_each(Vec::clear);
            for (_, _, core) in &mut threads[1..] {
                core.seccomp_mode = None;
            }
        }
        for ((_, _, core), chain) in threads.iter_mut().zip(&chains) {
            core.seccomp_filter = self.add(chain);
        }
        Ok(())
    }

    /// The number of a chain's oldest filter. In the images each one's `prev` names the next newer: it
    /// is the one before it in CRIU's list.
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

const SET_MODE_FILTER: u32 = 1;
const NEW_LISTENER: u32 = 1 << 3;
/// A failed TSYNC answers ESRCH and not the id of a thread, which would look like success.
const TSYNC_ESRCH: u32 = 1 << 4;
/// Bytes of a `struct sock_filter`.
const INSTRUCTION: usize = 8;
/// Most instructions of a filter (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;

/// Puts the thread into its mode.
pub fn plan(
    core: &CoreEntry,
    (credentials, context): (&Credentials, &TaskContext<'_>),
    program: &mut Program,
) -> Result<(), PlanError> {
    let thread = thread_core(core, context)?;
    let mode = thread.seccomp_mode.unwrap_or(0);
    if mode != 0 && !context.birth.suspends_filters {
        let remedy = "run Floe as root and under no filter itself (in a container: --security-opt \
                      seccomp=unconfined), so that it can suspend the filter while it works in the task";
        return Err(context.unsupported("the system call filter", remedy));
    }
    match SeccompMode::try_from(mode) {
        Ok(SeccompMode::Disabled) => return Ok(()),
        Ok(SeccompMode::Strict) => {
            let args = [libc::PR_SET_SECCOMP, 1].map(Arg::from);
            program.call("prctl(PR_SET_SECCOMP)", libc::SYS_prctl, &args);
            return Ok(());
        }
        Ok(SeccompMode::Filter) => {}
        Err(_) => return Err(context.damaged(format!("seccomp mode {mode} is none that we know"))),
    }
    let chain = chain(thread.seccomp_filter.unwrap_or(0), context.seccomp)?;
    let flags = |filter: &SeccompFilter| filter.flags.unwrap_or(0);
    // The leader comes last, and takes along the other threads.
    let leader = core.tc.is_some();
    if !leader && chain.iter().all(|filter| flags(filter) & TSYNC != 0) {
        return Ok(());
    }
    if !context.birth.credentials.has(CAP_SYS_ADMIN) && credentials.no_new_privs {
        super::credentials::plan_no_new_privs(program);
    }
    for filter in chain {
        let mut flags = flags(filter);
        if flags & NEW_LISTENER != 0 {
            let remedy = "stop its supervisor before the checkpoint";
            return Err(context.unsupported("the seccomp listener", remedy));
        }
        match flags & TSYNC != 0 && leader {
            true => flags |= TSYNC_ESRCH,
            false => flags &= !TSYNC,
        }
        install(filter, flags, program)?;
    }
    Ok(())
}

/// A thread's filters, oldest first.
fn chain(oldest: u32, filters: &[SeccompFilter]) -> Result<Vec<&SeccompFilter>, PlanError> {
    let damaged = |what: String| PlanError::damaged("seccomp.img", what);
    let mut chain = Vec::new();
    let mut next = Some(oldest);
    while let Some(index) = next {
        let filter = filters.get(index as usize);
        let filter = filter.ok_or_else(|| damaged(format!("filter {index} is missing")))?;
        if chain.len() == filters.len() {
            return Err(damaged(format!("the chain of filter {oldest} has no end")));
        }
        chain.push(filter);
        next = filter.prev;
    }
    Ok(chain)
}

fn install(filter: &SeccompFilter, flags: u32, program: &mut Program) -> Result<(), PlanError> {
    let code = &filter.filter;
    let count = code.len() / INSTRUCTION;
    if !code.len().is_multiple_of(INSTRUCTION) || !(1..=MAX_INSTRUCTIONS).contains(&count) {
        let what = format!("a filter has {} bytes", code.len());
        return Err(PlanError::damaged("seccomp.img", what));
    }
    let code = program.buffer(code);
    // struct sock_fprog: count, padding, pointer.
    let filter = program.buffer(&[count as u64, 0].map(u64::to_le_bytes).concat());
    program.point(filter, 8, code);
    let args = [
        Arg::from(SET_MODE_FILTER),
        Arg::from(flags),
        Arg::from(filter),
    ];
    let label = format!("seccomp(filter of {count} instructions)");
    program.call(label, libc::SYS_seccomp, &args);
    Ok(())
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

    fn filter(prev: Option<u32>) -> SeccompFilter {
        SeccompFilter {
            filter: vec![0; 8],
            prev,
            flags: None,
        }
    }

    #[test]
    fn chains_are_followed_and_loops_found() {
        let filters = [
            filter(None),
            filter(Some(0)),
            filter(Some(3)),
            filter(Some(2)),
        ];
        assert_eq!(chain(1, &filters).expect("whole").len(), 2);
        assert!(chain(2, &filters).is_err());
        assert!(chain(9, &filters).is_err());
    }
}
