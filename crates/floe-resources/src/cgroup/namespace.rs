//! A cgroup namespace of the tree's own (`cgroup_namespaces(7)`).
//!
//! It is nothing but a group in each hierarchy, from which its tasks see paths; it begins where the task
//! is that makes it.

use std::collections::HashMap;
use std::os::fd::AsFd;

use floe_inject::{Arg, Program};
use floe_kernel::proc::{CgroupMembership, ProcDir, parse_cgroup};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::collect::CollectError;
use crate::restore::{ExecuteError, World};

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

/// Lets a task have a namespace that begins in the groups that it is in now.
pub fn begin(world: &mut World<'_>, pid: u32) -> Result<(), ExecuteError> {
    let mut program = Program::new();
    let flag = Arg::from(libc::CLONE_NEWCGROUP);
    program.call("unshare(CLONE_NEWCGROUP)", libc::SYS_unshare, &[flag]);
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
