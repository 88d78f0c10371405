//! What tests, benchmarks and the cross matrix share: programs with known kernel state, engines
//! with CRIU's command line, and waiting with deadlines.
//!
//! Not part of the product. Unsafe code is in `sys` and, for forked children, in
//! `program::tasks`.

pub mod chain;
pub mod cross;
pub mod engine;
pub mod fixture;
pub mod process;
pub mod program;
pub mod real;
pub mod rounds;
pub mod rpc;
pub mod skips;
pub mod sys;

pub use engine::{Engine, Outcome};
pub use fixture::Fixture;
