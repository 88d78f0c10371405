//! Namespaces of the tree (`namespaces(7)`).
//!
//! Saved:    which task is in which (`ids-<pid>.img`), and what is in each, by its kind.
//! Rebuilt:  made before the first task, filled by their kinds, entered by the tasks as they are born.
//! Not kept: numbers of inodes; namespaces that nothing of the tree refers to.
//!
//! A kind with much inside is a module of its own ([`crate::mount`], [`crate::net`], [`crate::ipc`])
//! with two functions:
//!
//! - `collect(namespace, collector)` writes the images of one [`TreeNamespace`]. It is called before
//!   anything is collected of the tasks. It looks inside by `collector.namespaces().visit(..)`, or
//!   through `/proc/<member>`.
//! - `plan(id, planner)` adds the steps that fill namespace `id` at restore. They need [`made`], one
//!   of them makes [`filled`], for which all files wait that are opened before the first task. A step
//!   looks inside by `world.in_namespace(id, |world| ..)`: the coordinator itself is in there for the
//!   time of the closure, and its own files are out of its reach but for the descriptors that it
//!   holds ([`floe_kernel::namespace::Home::proc`]). What only a task of the tree can do (mounting
//!   the proc of a new pid namespace) is a step that needs the root's `Handle::Born` and uses
//!   `world.run` and `world.fetch`.

mod collect;
mod given;
pub mod ids;
mod joined_users;
pub mod nested;
mod owners;
mod pids;
mod plan;
mod split;
pub mod time;
mod tree;
pub mod user_births;
pub mod users;
mod uts;

pub use collect::{check_task, collect_namespaces};
pub use joined_users::join_users;
pub use owners::OwnerMap;
pub use pids::PidView;
pub use plan::{READY, has_own_pids, of_root, own_of_root, plan_namespaces};
pub use split::entered;
pub(crate) use split::make_beside;
pub use tree::{TreeNamespace, TreeNamespaces};

use floe_plan::Handle;
use ids::host_number;

/// The namespace exists, empty.
pub fn made(id: u32) -> Handle {
    Handle::Object("namespace", u64::from(id))
}

/// All of the namespace's content is there.
pub fn filled(id: u32) -> Handle {
    Handle::Object("content of namespace", u64::from(id))
}
