//! The content of a mount namespace: mounts (`mount_namespaces(7)`).
//!
//! Saved:    nothing yet.
//! Rebuilt:  nothing yet.
//! Not kept: everything; a tree with a mount namespace of its own is refused.

pub mod content;
pub mod groups;
pub mod model;
pub mod tree;

use floe_kernel::namespace::NsKind;

use crate::collect::{CollectError, Collector, Obstacle};
use crate::namespace::TreeNamespace;
use crate::restore::{PlanError, Planner};

/// Writes the images of a namespace; see [`crate::namespace`].
pub fn collect(namespace: &TreeNamespace, _: &mut Collector<'_>) -> Result<(), CollectError> {
    Err(CollectError::Unsupported(Obstacle {
        pid: namespace.member,
        object: format!("a {} namespace of its own", NsKind::Mnt),
        remedy: "mount namespaces are not supported yet".to_string(),
    }))
}

/// Adds the steps that fill a namespace; see [`crate::namespace`].
pub fn plan(id: u32, _: &mut Planner<'_>) -> Result<(), PlanError> {
    Err(PlanError::Unsupported {
        object: format!("The {} namespace {id}", NsKind::Mnt),
        remedy: "mount namespaces are not supported yet; restore it with CRIU",
    })
}
