//! Memory of tasks: address spaces and shared segments.
//!
//! Saved:    mappings (`mm`), private pages (`pagemap`), pages of shared segments (`pagemap-shmem`).
//! Rebuilt:  mapped by the puppet where it was, with its final protection; filled from outside through
//!           userfaultfd or `/proc/PID/mem`; then advice, locks and guard regions. Needs: mapped files
//!           and segments open in the task. A child is forked from its filled parent when both have
//!           pages of the same mapping, so that equal pages stay shared until one writes.
//! Not kept: page-table state (huge pages inside ordinary mappings, accessed bits), soft-dirty bits.
//!
//! The order is [`MemoryPlan::new`] (pure), [`make_segment`], then for each task [`map`], [`fill`] and
//! [`finish`], all before credentials and limits are lowered.

mod attach;
mod error;
mod fill;
mod finish;
mod map;
mod parents;
mod plan;
mod redirect;
mod region;
mod ring;
mod segment;
mod vdso;
mod work;

pub use error::{MemoryError, PlanError};
pub use fill::{FillOptions, FillStats, fill};
pub use finish::finish;
pub use map::{Puppet, clear, map};
pub use parents::ParentPages;
pub use plan::{HostMemory, HugePages, MemoryPlan, MemoryRequest, choose_arena};
pub use region::Source;
pub use segment::{SegmentPlan, make_segment, plan_segments};
pub use vdso::HostVdso;
