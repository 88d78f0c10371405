//! System call filters (`seccomp(2)`).
//!
//! Saved:    mode of each thread; filters once each, as chains (`seccomp.img`).
//! Rebuilt:  installed by each thread, oldest first, at the very end; by the leader for all threads where
//!           the image says that they share them. Needs: all the rest.
//! Not kept: listeners (`SECCOMP_FILTER_FLAG_NEW_LISTENER`).

use floe_image::messages::{CoreEntry, SeccompFilter, SeccompMode};
use floe_inject::{Arg, Program};

use super::credentials::{CAP_SYS_ADMIN, Credentials};
use super::{TaskContext, thread_core};
use crate::restore::PlanError;

const SET_MODE_FILTER: u32 = 1;
/// Installs in all threads.
const TSYNC: u32 = 1;
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
    let newest = thread.seccomp_filter.unwrap_or(0);
    let chain = chain(newest, context.seccomp)?;
    let flags = |filter: &SeccompFilter| filter.flags.unwrap_or(0);
    let leader = core.tc.is_some();
    // The leader comes last, and takes along those who wait for it.
    if !leader && chain.iter().all(|filter| flags(filter) & TSYNC != 0) {
        return Ok(());
    }
    if !context.birth.credentials.has(CAP_SYS_ADMIN) && credentials.no_new_privs {
        super::credentials::plan_no_new_privs(program);
    }
    for filter in chain.iter().rev() {
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

/// A filter and those that it builds on, newest first.
fn chain(newest: u32, filters: &[SeccompFilter]) -> Result<Vec<&SeccompFilter>, PlanError> {
    let damaged = |what: String| PlanError::damaged("seccomp.img", what);
    let mut chain = Vec::new();
    let mut next = Some(newest);
    while let Some(index) = next {
        let filter = filters.get(index as usize);
        let filter = filter.ok_or_else(|| damaged(format!("filter {index} is missing")))?;
        if chain.len() == filters.len() {
            return Err(damaged(format!("the chain of filter {newest} has no end")));
        }
        chain.push(filter);
        next = filter.prev;
    }
    Ok(chain)
}

fn install(filter: &SeccompFilter, flags: u32, program: &mut Program) -> Result<(), PlanError> {
    let code = &filter.filter;
    let count = code.len() / INSTRUCTION;
    if code.len() % INSTRUCTION != 0 || !(1..=MAX_INSTRUCTIONS).contains(&count) {
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
