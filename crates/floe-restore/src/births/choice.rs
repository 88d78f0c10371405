//! Numbers that a task may not choose for its children and threads: those in pid namespaces over which the user
//! namespace that it is in has no rights (`clone3(2)`, `set_tid`).
//!
//! Such a number is set as the namespace's next one by the coordinator, just before the call. Others may be
//! quicker, so the outcome is looked at.

use std::rc::Rc;

use floe_kernel::ids::HostPid;
use floe_kernel::namespace::{Namespace, NsKind};
use floe_kernel::placeholder::set_next_number;
use floe_kernel::proc::{ProcDir, parse_status};
use floe_resources::namespace::own_of_root;
use floe_resources::restore::{Attempt, ExecuteError, TreeImages, World};

/// How often a number may be lost to somebody else.
pub const TRIES: usize = 200;

/// The numbers of a new task or thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Innermost first, as `set_tid` takes them.
    pub chosen: Vec<u32>,
    /// Further out: those that are left to chance and good luck, innermost first.
    rest: Vec<u32>,
    /// The pid namespaces of the rest, where they are not the root's.
    below: Vec<Option<u32>>,
}

impl Choice {
    /// For who is born, with these numbers, in pid namespace `place` by somebody in user namespace `user`.
    pub fn new(
        images: &TreeImages,
        user: Option<u32>,
        (numbers, place): (&[u32], Option<u32>),
    ) -> Self {
        let line = images.nested.line(place);
        let root = own_of_root(images, NsKind::Pid);
        let users = &images.users;
        let may = |namespace: &Option<u32>| match namespace.or(root) {
            Some(namespace) => users.reaches(user, users.owner_of(namespace)),
            None => user.is_none(),
        };
        let chosen = line.iter().take_while(|namespace| may(namespace)).count();
        let (chosen, rest) = numbers.split_at(chosen.min(numbers.len()));
        Choice {
            below: line[chosen.len()..].to_vec(),
            chosen: chosen.to_vec(),
            rest: rest.to_vec(),
        }
    }

    /// Whether nothing is left to chance.
    pub fn is_free(&self) -> bool {
        self.rest.is_empty()
    }

    /// Makes the numbers of the rest the next ones.
    pub fn prepare(&self, world: &mut World<'_>) -> Result<(), ExecuteError> {
        for (number, namespace) in self.rest.iter().zip(&self.below) {
            let namespace = find(world, *namespace)?;
            set_next_number(namespace.as_deref(), *number)
                .during("Choosing the next number:", || number.to_string())?;
        }
        Ok(())
    }

    /// Whether a task or thread, found by `proc` and its file there, has got them.
    pub fn is_met(&self, proc: &ProcDir, status: &str) -> Result<bool, ExecuteError> {
        let text = proc.read_record(status);
        let numbers = text.and_then(|text| parse_status(&text).map_err(|error| proc.bad(error)));
        let numbers = numbers
            .map_err(std::io::Error::other)
            .during("Reading the numbers in", || {
                format!("/proc/{}/{status}", proc.pid())
            })?;
        let inner = numbers.ns_pids.iter().rev();
        let found = inner
            .map(|number| number.0.cast_unsigned())
            .skip(self.chosen.len());
        Ok(found.take(self.rest.len()).eq(self.rest.iter().copied()))
    }
}

/// A pid namespace, or that of the root; `None` for the coordinator's.
fn find(
    world: &mut World<'_>,
    namespace: Option<u32>,
) -> Result<Option<Rc<Namespace>>, ExecuteError> {
    if let Some(namespace) = namespace {
        return world.namespaces().get(namespace).map(Some);
    }
    let images = world.images;
    if own_of_root(images, NsKind::Pid).is_none() {
        return Ok(None);
    }
    let root: HostPid = world.puppet(images.root().pid())?.pid();
    let found = Namespace::of_task(root, NsKind::Pid);
    let found = found.during("Opening", || "the pid namespace of the tree".to_string())?;
    Ok(Some(Rc::new(found)))
}
