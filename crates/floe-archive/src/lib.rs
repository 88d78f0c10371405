//! Checkpoints as wholes: checking them, describing them, packing chains into archives.
//!
//! Works on images alone; no task is looked at or made.
#![forbid(unsafe_code)]

pub mod archive;
mod chain;
pub mod check;
pub mod compress;
pub mod direct;
mod early;
mod frame_stream;
mod front;
mod held;
pub mod merged;
pub mod pack;
mod recorder;
pub mod rounds;
mod scanned;
pub mod squash;
pub mod stream;
pub mod summary;
mod tar_reader;
pub mod unpack;

pub use chain::{Chain, ChainError, Generation};
