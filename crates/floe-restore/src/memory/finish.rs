//! What must wait until memory has its content: contexts of asynchronous I/O, locks, guard regions,
//! read-only huge pages.

use floe_inject::Arg;

use super::error::MemoryError;
use super::map::{Puppet, Steps};
use super::plan::MemoryPlan;
use super::ring;

/// `MADV_GUARD_INSTALL` of Linux 6.13.
const MADV_GUARD_INSTALL: u64 = 102;

/// Completes a filled address space. Where none of that is needed it does nothing.
pub fn finish(plan: &MemoryPlan, puppet: &mut Puppet<'_>) -> Result<(), MemoryError> {
    ring::restore(plan, puppet)?;
    let mut steps = Steps::new(puppet);
    for region in &plan.regions {
        let (start, len) = (region.range.start, region.len());
        if plan.first_protection(region) != region.prot {
            let label = format!("mprotect of {start:#x} to its final protection");
            let args = [start, len, u64::from(region.prot)].map(Arg::from);
            steps.program(0)?.call(label, libc::SYS_mprotect, &args);
        }
        if region.locked {
            let label = format!("mlock of {start:#x}");
            let args = [start, len].map(Arg::from);
            steps.program(0)?.call(label, libc::SYS_mlock, &args);
        }
    }
    for guard in &plan.guards {
        let label = format!("madvise(MADV_GUARD_INSTALL) of {:#x}", guard.start);
        let args = [guard.start, guard.end - guard.start, MADV_GUARD_INSTALL].map(Arg::from);
        steps.program(0)?.call(label, libc::SYS_madvise, &args);
    }
    steps.run()
}
