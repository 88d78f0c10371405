//! Restartable sequences (`rseq(2)`).
//!
//! Saved:    the registration; a thread that is inside a sequence goes on at its abort handler.
//! Rebuilt:  registered by the thread; the pointer to a sequence that signals do not abort is written
//!           back after its last program. Needs: memory.
//! Not kept: nothing.

use std::io;

use floe_image::messages::{RseqEntry, ThreadCoreEntry};
use floe_inject::{Arg, Program};
use floe_kernel::ids::TaskAddr;

/// Offset in `struct rseq` of the pointer to the sequence that the thread is in.
const SEQUENCE: u64 = 8;
/// Bit of the sequence's flags: a signal does not abort it.
const NO_RESTART_ON_SIGNAL: u32 = 1 << 1;

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
        _ => read(TaskAddr(rseq.rseq_abi_pointer + SEQUENCE), &mut pointer)?,
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
    registered.then_some((TaskAddr(rseq.rseq_abi_pointer + SEQUENCE), sequence))
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
