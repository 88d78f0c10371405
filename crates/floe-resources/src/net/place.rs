//! Where sockets are made at restore: a socket belongs for good to the namespace of the thread that made it.

use floe_kernel::namespace::{NsKind, VISITED};
use floe_plan::Handle;

use crate::namespace::{filled, ids, of_root};
use crate::restore::{ExecuteError, Planner, World};

/// The network namespace of a socket that is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketPlace {
    number: Option<u32>,
    stay: Stay,
    needs: [Option<Handle>; 1],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stay {
    /// Where steps are done anyway: with the root task.
    Root,
    /// The coordinator's own, while the root task has another.
    Home,
    /// One of other tasks.
    Other(u32),
}

impl SocketPlace {
    /// Where a socket with this number in its entry belongs; older images have none.
    pub fn new(planner: &Planner<'_>, saved: Option<u32>) -> Self {
        let host = planner.images.inventory.root_ids.as_ref();
        let host = host.and_then(|host| ids::get(host, NsKind::Net));
        let root = of_root(planner.images).into_iter();
        let root = root.into_iter().find(|(kind, _)| *kind == NsKind::Net);
        let root = root.map(|(_, number)| number).or(host);
        let number = saved.filter(|number| *number != 0).or(root);
        let stay = match number {
            Some(number) if Some(number) == root => Stay::Root,
            Some(number) if host.is_some_and(|host| host != number) => Stay::Other(number),
            // Without a host there is but one namespace for all.
            Some(_) if host.is_some() => Stay::Home,
            _ => Stay::Root,
        };
        let other = match stay {
            Stay::Other(number) => Some(filled(number)),
            Stay::Root | Stay::Home => None,
        };
        SocketPlace {
            number: number.filter(|number| host.is_some_and(|host| host != *number)),
            stay,
            needs: [other],
        }
    }

    /// What must be there before.
    pub fn needs(&self) -> Vec<Handle> {
        self.needs.into_iter().flatten().collect()
    }

    /// The number of the namespace in the images, unless it is the coordinator's own.
    pub fn number(&self) -> Option<u32> {
        self.number
    }

    /// Does `work` while the coordinator is there.
    pub fn visit<'i, T>(
        &self,
        world: &mut World<'i>,
        work: impl FnOnce(&mut World<'i>) -> Result<T, ExecuteError>,
    ) -> Result<T, ExecuteError> {
        match self.stay {
            Stay::Root => work(world),
            Stay::Home => {
                world.go_home();
                work(world)
            }
            Stay::Other(number) => {
                let root = of_root(world.images).into_iter();
                let root = root.filter(|(kind, _)| *kind != NsKind::Net && VISITED.contains(kind));
                let mut places: Vec<u32> = root.map(|(_, number)| number).collect();
                places.push(number);
                world.in_namespaces(&places, work)
            }
        }
    }
}
