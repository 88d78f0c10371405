//! The content of a mount namespace: mounts (`mount_namespaces(7)`).
//!
//! Saved:    the mounts with their flags, options and sharing groups; the files of tmpfs.
//! Rebuilt:  each is made on its own and attached when it is done, parents first; then they are put into
//!           their groups. Needs: namespaces whose state a file system shows; a task, for its own `proc`.
//! Not kept: numbers of mounts and groups; what is in file systems that come from outside.

mod collect;
mod content;
mod context;
mod deleted;
mod execute;
mod external;
mod formats;
mod groups;
mod host_master;
mod in_memory;
mod model;
mod new_fs;
mod overlay;
mod overlay_index;
mod overlay_layers;
mod owner;
mod place;
mod plan;
mod remote;
mod seen;
mod shown;
mod sight;
mod tree;
mod uncover;

pub(crate) use collect::own_mounts;
pub use collect::{KnownMounts, collect};
pub use in_memory::{InMemory, in_memory};
pub use model::{comes_from_caller, upgrade_flags};
pub use place::{NoPlace, Place, Wanted};
pub use plan::{Writable, entered, in_place_of, needs_of_file, plan, seen_from, way_to};
pub use shown::NamedProcess;
pub use sight::bring_into_sight;
pub use tree::fs_name;
