//! Restore: images become running tasks.
//!
//! `plan` changes nothing and is verified before anything is touched; `execute` carries out one step
//! after the other and takes everything down again when one fails.
#![forbid(unsafe_code)]

mod births;
mod descriptors;
mod engine;
mod error;
mod kin;
mod labels;
mod machine;
pub mod memory;
mod midwife;
pub mod new_pids;
mod numbers;
mod release;
mod space;
mod state;
mod tree;

pub use engine::{RestoreReport, dry_run, highest_pid, plan, restore};
pub use error::RestoreError;
pub use machine::{Outlook, PidSpace, check_machine};
