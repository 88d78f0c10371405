//! Where sockets are made at restore: a socket belongs for good to the namespace of the thread that made it.

use floe_plan::Handle;

use crate::namespace::filled;
use crate::restore::{ExecuteError, Planner, World};

/// The network namespace of a socket that is to be made.
#[derive(Clone, Copy, Debug)]
pub struct SocketPlace {
    /// One of the tree's, or `None` for the coordinator's own.
    network: Option<(u32, [Handle; 1])>,
}

impl SocketPlace {
    /// Where a socket with this number in its entry belongs; older images have none.
    pub fn new(planner: &Planner<'_>, saved: Option<u32>) -> Self {
        let images = planner.images;
        let host = images.inventory.root_ids.as_ref();
        let host = host.and_then(|ids| ids.net_ns_id);
        let of_root = || images.root().ids.as_ref().and_then(|ids| ids.net_ns_id);
        let number = saved.filter(|number| *number != 0).or_else(of_root);
        let number = number.filter(|number| *number != 0);
        let tree = number.filter(|number| host.is_some_and(|host| host != *number));
        SocketPlace {
            network: tree.map(|number| (number, [filled(number)])),
        }
    }

    /// What must be there before.
    pub fn needs(&self) -> &[Handle] {
        self.network.as_ref().map_or(&[], |(_, needs)| needs)
    }

    /// The number of the namespace in the images, unless it is the coordinator's own.
    pub fn number(&self) -> Option<u32> {
        self.network.map(|(number, _)| number)
    }

    /// Does `work` while the coordinator is there.
    pub fn visit<'i, T>(
        &self,
        world: &mut World<'i>,
        work: impl FnOnce(&mut World<'i>) -> Result<T, ExecuteError>,
    ) -> Result<T, ExecuteError> {
        match self.network {
            None => work(world),
            Some((number, _)) => world.in_namespace(number, work),
        }
    }
}
