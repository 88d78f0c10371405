//! The namespaces of a tree that is dumped.

use std::rc::Rc;

use floe_kernel::ids::HostPid;
use floe_kernel::namespace::{Home, Namespace, NsKind, Visit};

use crate::collect::CollectError;

/// A namespace that tasks of the tree are in, and the coordinator is not.
#[derive(Debug)]
pub struct TreeNamespace {
    /// Its number in the images.
    pub id: u32,
    /// A handle on it.
    pub namespace: Namespace,
    /// A task that is in it.
    pub member: HostPid,
}

impl TreeNamespace {
    /// What kind it is.
    pub fn kind(&self) -> NsKind {
        self.namespace.kind()
    }
}

/// The namespaces of a tree, and the way to them.
#[derive(Clone, Debug)]
pub struct TreeNamespaces {
    home: Rc<Home>,
    known: Vec<Rc<TreeNamespace>>,
}

impl TreeNamespaces {
    /// Begins with none; the calling thread is the one that visits.
    pub fn new() -> Result<Self, CollectError> {
        let home = Home::here().map_err(|source| CollectError::System {
            action: "Opening our own namespaces".to_string(),
            source,
        })?;
        Ok(TreeNamespaces {
            home: Rc::new(home),
            known: Vec::new(),
        })
    }

    /// Our own place.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// All of them, in the order of their numbers.
    pub fn all(&self) -> &[Rc<TreeNamespace>] {
        &self.known
    }

    /// Goes into some of them until the visit is dropped.
    pub fn visit(&self, namespaces: &[&TreeNamespace]) -> Result<Visit<'_>, CollectError> {
        let inside = namespaces.iter().map(|visited| &visited.namespace);
        self.home.visit(inside).map_err(|source| {
            let names: Vec<String> = namespaces.iter().map(|ns| ns.kind().to_string()).collect();
            CollectError::System {
                action: format!("Entering the {} namespace", names.join(" and ")),
                source,
            }
        })
    }
}
