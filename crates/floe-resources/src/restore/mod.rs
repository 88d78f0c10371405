//! What the kinds share while a tree is restored: the images, the plan, the world.
//!
//! A kind turns each of its image entries into steps ([`Planner`]), which act on what exists so far
//! ([`World`]) when their turn comes.

mod courier;
mod description;
mod error;
mod images;
mod namespaces;
mod planner;
mod world;

pub use description::{file_owner_of, plan_owner, set_flags, set_offset};
pub use error::{Attempt, ExecuteError, PlanError};
pub use images::{Holder, TaskImages, TaskState, TreeImages};
pub use namespaces::Namespaces;
pub use planner::{Op, Planner};
pub use world::{Puppet, Undo, World};
