//! The namespaces of a tree that is being restored.

use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use floe_kernel::namespace::{Home, Namespace, Visit};

use super::{Attempt, ExecuteError};

/// Namespaces made so far, by their number in the images, and our own.
#[derive(Debug, Default)]
pub struct Namespaces {
    home: Option<Rc<Home>>,
    made: BTreeMap<u32, Rc<Namespace>>,
    /// Those of the root task that the coordinator opens files in.
    of_root: Vec<u32>,
    visit: Option<Visit>,
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

    /// Notes which of them the root task is in, now that they have their content.
    pub fn set_root(&mut self, ids: Vec<u32>) {
        self.of_root = ids;
    }

    /// Takes the coordinator into those of the root task, where it is not there already.
    pub(super) fn go_inside(&mut self) -> Result<(), ExecuteError> {
        if self.visit.is_some() || self.of_root.is_empty() {
            return Ok(());
        }
        let (home, inside) = self.way_to(&self.of_root.clone())?;
        let visit = home.visit(inside.iter().map(|namespace| &**namespace));
        self.visit = Some(visit.during("Entering", || "the namespaces of the tree".to_string())?);
        Ok(())
    }

    /// Brings the coordinator back.
    pub(super) fn go_home(&mut self) {
        self.visit = None;
    }

    /// The way to where the coordinator is now; `None` at home.
    pub(super) fn road_back(&mut self) -> Option<(Rc<Home>, Vec<Rc<Namespace>>)> {
        self.visit.as_ref()?;
        self.way_to(&self.of_root.clone()).ok()
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
