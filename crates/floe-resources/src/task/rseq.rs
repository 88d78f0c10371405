//! Restartable sequences (`rseq(2)`).
//!
//! Saved:    the registration; a thread that is inside a sequence goes on at its abort handler.
//! Rebuilt:  registered by the thread; the pointer to a sequence that signals do not abort is written
//!           back after its last program. Needs: memory.
//! Not kept: nothing.

use std::io;

use floe_image::messages::{RseqEntry, ThreadCoreEntry};
use floe_inject::{Arg, Program};
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

/// Registers the area of a thread, as the puppet has none.
pub fn plan(thread: &ThreadCoreEntry, program: &mut Program) {
    let Some(rseq) = thread
        .rseq_entry
        .as_ref()
        .filter(|it| it.rseq_abi_pointer != 0)
    else {
        return;
    };
    let args = [
        Arg::from(rseq.rseq_abi_pointer),
        Arg::from(rseq.rseq_abi_size),
        Arg::from(0),
        Arg::from(rseq.signature),
    ];
    program.call("rseq(register)", libc::SYS_rseq, &args);
}

/// Where a thread that stood at `ip` must go on, given its memory.
///
/// Dumps store the abort handler already, so this changes only what others left inside a sequence.
/// Call it before the registration: that, and every return to the program, clears the pointer.
pub fn fix_ip(
    rseq: &RseqEntry,
    ip: u64,
    read: impl Fn(TaskAddr, &mut [u8]) -> io::Result<()>,
) -> io::Result<u64> {
    if rseq.rseq_abi_pointer == 0 {
        return Ok(ip);
    }
    let mut pointer = [0; 8];
    match rseq.rseq_cs_pointer {
        Some(saved) if saved != 0 => pointer = saved.to_le_bytes(),
        _ => read(
            TaskAddr(rseq.rseq_abi_pointer + SEQUENCE_OFFSET),
            &mut pointer,
        )?,
    }
    let at = u64::from_le_bytes(pointer);
    if at == 0 {
        return Ok(ip);
    }
    let mut descriptor = [0; 32];
    read(TaskAddr(at), &mut descriptor)?;
    let word =
        |at: usize| u64::from_le_bytes(descriptor[at..at + 8].try_into().expect("eight bytes"));
    let (version, flags) = (word(0) as u32, (word(0) >> 32) as u32);
    let (start, length, abort) = (word(8), word(16), word(24));
    let inside = ip.wrapping_sub(start) < length;
    // Versions unknown to the kernel end in SIGSEGV there; that is its business.
    let aborts = inside && version == 0 && flags & NO_RESTART_ON_SIGNAL == 0;
    Ok(if aborts { abort } else { ip })
}

/// Where to write which pointer after the thread's last program, for a sequence that it goes on in.
pub fn pointer_to_write(rseq: &RseqEntry) -> Option<(TaskAddr, u64)> {
    let sequence = rseq.rseq_cs_pointer.filter(|pointer| *pointer != 0)?;
    let registered = rseq.rseq_abi_pointer != 0;
    registered.then_some((TaskAddr(rseq.rseq_abi_pointer + SEQUENCE_OFFSET), sequence))
}

#[cfg(test)]
mod tests {
    use super::*;

    const AREA: u64 = 0x1000;
    const DESCRIPTOR: u64 = 0x2000;

    fn resumed_at(ip: u64, flags: u32) -> u64 {
        let rseq = RseqEntry {
            rseq_abi_pointer: AREA,
            rseq_abi_size: 32,
            signature: 7,
            rseq_cs_pointer: None,
        };
        let words = [u64::from(flags) << 32, 0x5000, 0x20, 0x6000];
        let descriptor = words.map(u64::to_le_bytes).concat();
        fix_ip(&rseq, ip, |at, buffer| {
            match at.0 {
                0x1008 => buffer.copy_from_slice(&DESCRIPTOR.to_le_bytes()),
                DESCRIPTOR => buffer.copy_from_slice(&descriptor),
                other => panic!("read of {other:#x}"),
            }
            Ok(())
        })
        .expect("memory is there")
    }

    #[test]
    fn only_a_thread_inside_a_sequence_is_sent_to_its_abort_handler() {
        assert_eq!(resumed_at(0x5000, 0), 0x6000);
        assert_eq!(resumed_at(0x501f, 0), 0x6000);
        assert_eq!(resumed_at(0x5020, 0), 0x5020);
        assert_eq!(resumed_at(0x4fff, 0), 0x4fff);
        assert_eq!(resumed_at(0x5010, NO_RESTART_ON_SIGNAL), 0x5010);
    }
}
