//! Where the files of a dumped tree are found by their names.

use std::os::fd::BorrowedFd;
use std::rc::Rc;

use floe_kernel::namespace::{Home, Visit};
use rustix::io::Errno;

use super::collect::KnownMounts;
use super::uncover::mount_id;
use crate::collect::Collector;
use crate::namespace::TreeNamespace;

/// The mount that a file is on, and the way to where its name leads to it.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// Its number in the images; `None` in trees that have our own mounts.
    pub mount: Option<u32>,
    way: Option<(Rc<Home>, Rc<TreeNamespace>)>,
}

/// Why a file has no place.
#[derive(Debug)]
pub enum NoPlace {
    /// It is on a mount that is in no namespace of the tree.
    Outside(u64),
    /// The kernel does not tell.
    Failed(Errno),
}

impl Place {
    /// The place of an open file.
    pub fn of(file: BorrowedFd<'_>, collector: &mut Collector<'_>) -> Result<Place, NoPlace> {
        if collector.cache(KnownMounts::default).is_empty() {
            return Ok(Place::default());
        }
        let mount = mount_id(file).map_err(NoPlace::Failed)?;
        let known = collector.cache(KnownMounts::default);
        let number = u32::try_from(mount).map_err(|_| NoPlace::Outside(mount))?;
        let id = known.place_of(number).ok_or(NoPlace::Outside(mount))?;
        let namespaces = collector.namespaces();
        let namespace = namespaces.all().iter().find(|namespace| namespace.id == id);
        let home = namespaces.home();
        Ok(Place {
            mount: Some(number),
            way: namespace.map(|namespace| (Rc::clone(home), Rc::clone(namespace))),
        })
    }

    /// Goes there until the visit is dropped.
    pub fn visit(&self) -> std::io::Result<Option<Visit>> {
        let Some((home, namespace)) = &self.way else {
            return Ok(None);
        };
        home.visit([&namespace.namespace]).map(Some)
    }
}
