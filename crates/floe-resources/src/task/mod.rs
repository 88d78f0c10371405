//! State of tasks and threads, one module each kind.
//!
//! What only the task itself can tell is asked with remote calls: a kind adds its calls to the
//! [`Program`](floe_inject::Program) of the task or of the thread (`ask`), and takes the answers out of
//! the [`Outcome`](floe_inject::Outcome) (`read`), so that one stop serves all kinds. What `/proc` and
//! ptrace tell is collected without them. The way back is in [`rebuild`].

pub mod alt_stack;
pub mod attributes;
mod birth;
pub mod credentials;
pub mod fpu;
pub mod fs;
pub mod itimers;
pub mod label;
pub mod memory_map;
pub mod pending;
pub mod posix_timers;
pub mod rebuild;
pub mod registers;
pub mod rlimits;
pub mod rseq;
pub mod scheduling;
pub mod seccomp;
pub mod sigactions;
pub mod syscall_dispatch;
pub mod user_entry;

use floe_inject::Outcome;

/// A little-endian word of an answer.
fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The low half of a call's result, for calls that answer small numbers.
fn small(outcome: &Outcome, call: floe_inject::CallId) -> u32 {
    outcome.result(call) as u32
}
