//! Restartable sequences (`rseq(2)`).
//!
//! Saved:    the registration; a thread that is inside a sequence goes on at its abort handler.
//! Rebuilt:  registered by the thread. Needs: memory.
//! Not kept: nothing.

use floe_image::messages::RseqEntry;
use floe_kernel::ids::{HostPid, TaskAddr};
use floe_kernel::{ptrace, vm};

use super::word;
use crate::collect::{CollectError, Obstacle};

/// Offset of `rseq_cs` and of `flags` in `struct rseq`.
const SEQUENCE_OFFSET: u64 = 8;
const NO_RESTART_ON_SIGNAL: u32 = 2;

/// What a stopped thread has.
#[derive(Clone, Debug, PartialEq)]
pub struct Rseq {
    pub entry: RseqEntry,
    /// Where the thread must go on in place of `ip` (it stands inside a sequence).
    pub abort_ip: Option<u64>,
}

/// Looks at the registration, and at the sequence around `ip` if there is one. To be done before the
/// first remote call: on the way back to the task the kernel clears the pointer to the sequence.
pub fn collect_rseq(tid: HostPid, ip: u64) -> Result<Rseq, CollectError> {
    let failed = |source| CollectError::Task {
        pid: tid,
        action: "Reading the rseq registration",
        source,
    };
    let found = ptrace::rseq_configuration(tid).map_err(failed)?;
    let mut rseq = Rseq {
        entry: RseqEntry {
            rseq_abi_pointer: found.rseq_abi_pointer,
            rseq_abi_size: found.rseq_abi_size,
            signature: found.signature,
            rseq_cs_pointer: None,
        },
        abort_ip: None,
    };
    if found.rseq_abi_pointer == 0 {
        return Ok(rseq);
    }
    let mut area = [0u8; 16];
    vm::read_exact(
        tid,
        TaskAddr(found.rseq_abi_pointer + SEQUENCE_OFFSET),
        &mut area,
    )
    .map_err(failed)?;
    let sequence = word(&area, 0);
    if sequence == 0 {
        return Ok(rseq);
    }
    let mut descriptor = [0u8; 32];
    vm::read_exact(tid, TaskAddr(sequence), &mut descriptor).map_err(failed)?;
    let (version, own_flags) = (
        word(&descriptor, 0) as u32,
        (word(&descriptor, 0) >> 32) as u32,
    );
    let flags = own_flags | word(&area, 8) as u32;
    if version != 0 {
        let object = format!("restartable sequence of version {version}");
        return Err(CollectError::Unsupported(Obstacle {
            pid: tid,
            object,
            remedy: "use a newer Floe".to_string(),
        }));
    }
    let (start, length, abort) = (
        word(&descriptor, 8),
        word(&descriptor, 16),
        word(&descriptor, 24),
    );
    let inside = ip >= start && ip - start < length;
    if flags & NO_RESTART_ON_SIGNAL != 0 {
        rseq.entry.rseq_cs_pointer = Some(sequence);
    } else if inside {
        rseq.abort_ip = Some(abort);
    }
    Ok(rseq)
}
