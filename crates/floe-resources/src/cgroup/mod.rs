//! Control groups: membership of tasks and threads, directories, properties, of both versions.
//!
//! Saved:    the groups of each thread, as numbered sets (`cgroup.img`); the directories below those
//!           of the tasks, with permissions and properties; the roots of cgroup namespaces.
//! Rebuilt:  missing directories, what must be set while they are empty; then tasks and threads enter,
//!           then all other properties. Needs: nothing; files in groups are opened afterwards.
//! Not kept: a frozen state, accounting.

mod collect;
mod execute;
mod fault;
pub mod freezer;
mod hierarchy;
mod namespace;
mod plan;
mod properties;

pub use collect::CgroupSets;
pub use fault::{GroupFault, look_at_groups};
pub use namespace::{View as CgroupView, plan as plan_namespace};
pub use plan::{entered, groups_made, own_begun, plan_groups};
