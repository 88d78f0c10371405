//! Checkpoints as wholes: checking them, describing them, packing chains into archives.
//!
//! Works on images alone; no task is looked at or made.
#![forbid(unsafe_code)]

mod chain;
pub mod check;

pub use chain::{Chain, ChainError, Generation};
