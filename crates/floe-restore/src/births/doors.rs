//! Children that are born in a pid namespace that another task has begun.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::{AsFd, AsRawFd};

use floe_inject::{Arg, Program};
use floe_kernel::namespace::{Namespace, NsKind};
use floe_resources::namespace::nested;
use floe_resources::restore::{Attempt, ExecuteError, World};

use crate::tree::Place;

/// Descriptors in a task by which it sends children into pid namespaces that others have begun.
#[derive(Default)]
pub struct Doors {
    home: Option<i32>,
    others: BTreeMap<u32, i32>,
    /// Where children are born now.
    at: Option<u32>,
}

impl Doors {
    /// Makes ready for a child that is born there.
    pub fn open(
        &mut self,
        world: &mut World<'_>,
        pid: u32,
        place: Place,
    ) -> Result<(), ExecuteError> {
        let Place::Other(namespace) = place else {
            return Ok(());
        };
        if self.home.is_none() {
            let host = world.puppet(pid)?.pid();
            let what = || format!("the pid namespace of task {pid}");
            let home = Namespace::of_task(host, NsKind::Pid).during("Opening", what)?;
            self.home = Some(world.hand_over(pid, home.as_fd().as_raw_fd())?);
        }
        if let Entry::Vacant(free) = self.others.entry(namespace) {
            let file = world.namespaces().get(namespace)?;
            free.insert(world.hand_over(pid, file.as_fd().as_raw_fd())?);
        }
        Ok(())
    }

    /// Has the next child born where it belongs.
    pub fn go(&mut self, program: &mut Program, place: Place) {
        let wanted = match place {
            Place::Other(namespace) => Some(namespace),
            _ => None,
        };
        if wanted == self.at {
            return;
        }
        let door = match wanted {
            Some(namespace) => self.others.get(&namespace).copied(),
            None => self.home,
        };
        if let Some(door) = door {
            nested::set_for_children(program, door, wanted.unwrap_or(0));
        }
        self.at = wanted;
    }

    /// Has further children born where the task is.
    pub fn leave(mut self, program: &mut Program) {
        self.go(program, Place::OfParent);
        for file in self.home.into_iter().chain(self.others.into_values()) {
            program.call("close", libc::SYS_close, &[Arg::from(file)]);
        }
    }
}
