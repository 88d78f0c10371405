//! Driving foreign tasks: typed ptrace states, the executor, remote system calls.
//!
//! The executor is some tens of instructions that run a [`Program`]: an array of system calls whose
//! arguments are literals, buffers or earlier results. See `arch/`.

mod arch;
mod arena;
mod call;
mod error;
mod program;
mod supervisor;
mod tracee;

pub use arch::TASK_SIZE;
pub use arena::{ARENA_BYTES, Arena, QuietSignal, RootSpawn, puppet_options, spawn_root};
pub use call::{find_gate, remote_call};
pub use error::InjectError;
pub use program::{Arg, BufferId, CallId, Outcome, Program};
pub use supervisor::{EngineEnd, Journal, RepairNote, Split, Supervisor, Watch, split};
pub use tracee::{Saved, Seized, Stopped};
