//! Pending signals.
//!
//! Saved:    the private queue of each thread and the shared one of the process, with siginfo, in order.
//! Rebuilt:  queued again (`rt_sigqueueinfo`). Needs: actions and masks, so that none is delivered early.
//! Not kept: nothing.

use floe_image::messages::{SiginfoEntry, SignalQueueEntry};
use floe_kernel::ids::HostPid;
use floe_kernel::ptrace::{SignalQueue, peek_siginfo};

use crate::collect::CollectError;

/// Copies a queue of a stopped thread; the signals stay pending.
pub fn collect_pending(pid: HostPid, queue: SignalQueue) -> Result<SignalQueueEntry, CollectError> {
    let signals = peek_siginfo(pid, queue).map_err(|source| CollectError::Task {
        pid,
        action: "Reading the pending signals",
        source,
    })?;
    let signals = signals
        .into_iter()
        .map(|info| SiginfoEntry {
            siginfo: info.to_vec(),
        })
        .collect();
    Ok(SignalQueueEntry { signals })
}
