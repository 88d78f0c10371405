//! Cgroup namespaces of the tree's own (`cgroup_namespaces(7)`).
//!
//! One is nothing but a group in each hierarchy, from which its tasks see paths; it begins where the task
//! is that makes it, and belongs to the user namespace of that task. So a process of ours goes there first.
//!
//! Saved:    the group in each hierarchy, where that is not the dumping process's own.
//! Rebuilt:  by a process in these groups. Needs: the groups. The root enters with its groups, other tasks
//!           when the tree is born.
//! Not kept: nothing.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd};

use floe_inject::{Arg, Program};
use floe_kernel::namespace::{self, Namespace, NsKind};
use floe_kernel::placeholder::Placeholder;
use floe_kernel::proc::{CgroupMembership, ProcDir, parse_cgroup};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::execute::{Groups, Place};
use super::plan::{groups_made, namespace_begin};
use crate::collect::CollectError;
use crate::namespace::{filled, made};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, World};

/// The namespace's root in each hierarchy as we see it, by the hierarchy's name; empty for `/`.
pub fn prefixes(task: &ProcDir) -> Result<HashMap<String, String>, CollectError> {
    let outside = groups(task)?;
    let inside = std::thread::scope(|scope| {
        // The kernel shows paths as the reading thread's namespace has them.
        let reader = scope.spawn(|| {
            let namespace = std::fs::File::open(format!("/proc/{}/ns/cgroup", task.pid()))?;
            let kind = Some(LinkNameSpaceType::ControlGroup);
            move_into_link_name_space(namespace.as_fd(), kind)?;
            Ok(groups(task))
        });
        reader.join().expect("it does not panic")
    });
    let inside = inside.map_err(|source| CollectError::Task {
        pid: task.pid(),
        action: "Entering the cgroup namespace",
        source,
    })??;
    let views = outside.into_iter().zip(inside);
    Ok(views
        .map(|(outside, inside)| (outside.controllers, root(&outside.path, &inside.path)))
        .collect())
}

fn groups(task: &ProcDir) -> Result<Vec<CgroupMembership>, CollectError> {
    let text = task.read("cgroup")?;
    parse_cgroup(&text).map_err(|error| task.bad(error).into())
}

/// Where a path that is `inside` begins, when it is `outside` seen from here.
fn root(outside: &str, inside: &str) -> String {
    let inside = if inside == "/" { "" } else { inside };
    let root = outside.strip_suffix(inside).unwrap_or("");
    root.trim_end_matches('/').to_string()
}

/// A namespace at the dump.
#[derive(Debug)]
pub struct View {
    /// Its number in the images.
    pub id: u32,
    pub of_root: bool,
    /// A task that is in it.
    pub member: ProcDir,
}

/// The groups in which a namespace begins, but for those that are `own`.
pub(super) fn roots(
    prefixes: &HashMap<String, String>,
    own: &[CgroupMembership],
) -> Vec<CgroupMembership> {
    let root = |own: &CgroupMembership| {
        let prefix = prefixes.get(&own.controllers)?;
        let path = match prefix.as_str() {
            "" => "/",
            prefix => prefix,
        };
        (path != own.path).then(|| CgroupMembership {
            path: path.to_string(),
            ..own.clone()
        })
    };
    own.iter().filter_map(root).collect()
}

/// Adds the step that makes a namespace.
pub fn plan(id: u32, planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let to = namespace_begin(planner, id)?;
    let mut needs = Vec::new();
    needs.extend(planner.images.users.owner_of(id).map(made));
    needs.extend(groups_made(planner)?);
    let makes = [made(id), filled(id)];
    let name = format!("make cgroup namespace {id}");
    planner.step_at_home(name, (&needs, &makes), move |world| {
        make(world, id, &Place { from: None, to })
    });
    Ok(())
}

fn make(world: &mut World<'_>, id: u32, place: &Place) -> Result<(), ExecuteError> {
    let what = || format!("cgroup namespace {id}");
    let user = match world.images.users.owner_of(id) {
        Some(user) => Some(world.namespaces().get(user)?),
        None => None,
    };
    let begin = || {
        user.as_deref().map_or(Ok(()), namespace::enter)?;
        namespace::unshare(NsKind::Cgroup.flag())
    };
    let waiting = Placeholder::start_before(begin).during("Making", what)?;
    Groups::enter(world, waiting.pid(), place)?;
    let maker = waiting.go().during("Making", what)?;
    let made = Namespace::of_task(maker.pid(), NsKind::Cgroup).during("Opening the new", what)?;
    world.namespaces().keep(id, made);
    Ok(())
}

/// Has a task enter a namespace.
pub fn enter(world: &mut World<'_>, pid: u32, id: u32) -> Result<(), ExecuteError> {
    let namespace = world.namespaces().get(id)?;
    let there = world.hand_over(pid, namespace.as_fd().as_raw_fd())?;
    let mut program = Program::new();
    let args = [Arg::from(there), Arg::from(NsKind::Cgroup.flag())];
    let label = format!("setns to cgroup namespace {id}");
    program.call(label, libc::SYS_setns, &args);
    program.call("close", libc::SYS_close, &[Arg::from(there)]);
    world.run(pid, &program).map(drop)
}

#[cfg(test)]
mod tests {
    use super::root;

    #[test]
    fn the_root_is_what_the_inner_view_lacks() {
        assert_eq!(root("/a/b", "/b"), "/a");
        assert_eq!(root("/a/b", "/"), "/a/b");
        assert_eq!(root("/", "/"), "");
        assert_eq!(root("/a", "/../x"), "");
    }
}
