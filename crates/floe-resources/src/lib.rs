//! One module per kind of kernel object: how it is collected, how it is rebuilt.
//!
//! [`fd`] has the kinds of descriptors, [`task`] the state of tasks and threads, [`vma`] mappings.
//! [`collect`] is what all of them share while a dump collects.
#![forbid(unsafe_code)]

pub mod cgroup;
pub mod collect;
pub mod cpu;
pub mod fd;
pub mod file_lock;
pub mod ipc;
pub mod mount;
pub mod namespace;
pub mod net;
pub mod netlock;
pub mod restore;
pub mod task;
pub mod vma;

pub use collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
