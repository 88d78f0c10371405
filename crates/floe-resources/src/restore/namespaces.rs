//! The namespaces of a tree that is being restored.

use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use floe_kernel::namespace::{Home, Namespace};

use super::{Attempt, ExecuteError};

/// Namespaces made so far, by their number in the images, and our own.
#[derive(Debug, Default)]
pub struct Namespaces {
    home: Option<Rc<Home>>,
    made: BTreeMap<u32, Rc<Namespace>>,
}

impl Namespaces {
    /// Where the coordinator comes back to.
    pub fn home(&mut self) -> Result<Rc<Home>, ExecuteError> {
        if let Some(home) = &self.home {
            return Ok(Rc::clone(home));
        }
        let home = Home::here().during("Opening", || "our own namespaces".to_string())?;
        Ok(Rc::clone(self.home.insert(Rc::new(home))))
    }

    /// Keeps a namespace of the images.
    pub fn keep(&mut self, id: u32, namespace: Namespace) {
        self.made.insert(id, Rc::new(namespace));
    }

    /// A namespace that a step before has made.
    pub fn get(&self, id: u32) -> Result<Rc<Namespace>, ExecuteError> {
        let made = self.made.get(&id).map(Rc::clone);
        made.ok_or_else(|| ExecuteError::Failed {
            action: "Finding namespace",
            object: id.to_string(),
            source: io::Error::from_raw_os_error(libc::EBADF),
        })
    }

    /// What a visit to some of them needs.
    pub fn way_to(&mut self, ids: &[u32]) -> Result<(Rc<Home>, Vec<Rc<Namespace>>), ExecuteError> {
        let inside = ids
            .iter()
            .map(|id| self.get(*id))
            .collect::<Result<_, _>>()?;
        Ok((self.home()?, inside))
    }
}
