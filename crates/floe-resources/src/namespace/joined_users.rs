//! A user namespace that is there already, in place of the root's: `--join-ns user:PID|FILE[,UID,GID]`.
//!
//! Saved:    nothing.
//! Rebuilt:  ids and owners of the images are those of the given namespace, also of files. What belonged to the
//!           root's user namespace belongs to it; what belonged to the caller's stays outside. User namespaces
//!           below keep their names inside. Needs: to be made before the others.
//! Not kept: UID and GID, which only must be there: tasks have those of the images.

use floe_kernel::namespace::{Namespace, NsKind};
use floe_kernel::placeholder::Placeholder;
use floe_kernel::proc::ProcDir;
use floe_options::{JoinNamespace, RestoreOptions};

use super::OwnerMap;
use super::given::open_joined;
use super::users::UserNamespace;
use crate::restore::{PlanError, TreeImages};

/// Puts the user namespace that the options name in place of the root's.
pub fn join_users(images: &mut TreeImages, options: &RestoreOptions) -> Result<(), PlanError> {
    let joins = |join: &&JoinNamespace| join.kind == NsKind::User.name();
    let Some(join) = options.join_ns.iter().find(joins) else {
        return Ok(());
    };
    let joined = look(&join.target)?;
    let mut users = images.users.clone();
    match joined {
        None => users.leave_root(images)?,
        Some(joined) => users.join(images, joined)?,
    }
    images.owners = users.of_root();
    images.users = users;
    check_names(images, join)
}

/// What the given namespace is like; `None` where it is our own.
fn look(target: &str) -> Result<Option<UserNamespace>, PlanError> {
    let failed = |remedy| PlanError::Unsupported {
        object: format!("A tree that is to join the user namespace of `{target}`"),
        remedy,
    };
    let given = open_joined(NsKind::User, target).map_err(|_| {
        failed("there is no such task or file; name a task's pid, or a file of /proc/PID/ns")
    })?;
    let own = Namespace::own(NsKind::User);
    if own.is_ok_and(|own| own.identity() == given.identity()) {
        return Ok(None);
    }
    // Its maps as we see them are shown by whoever is in it.
    let visitor = Placeholder::start_inside(&given, &[]).map_err(|_| {
        failed("we have no rights there; run Floe as root in a user namespace around it")
    })?;
    let unreadable = |_| failed("its maps cannot be read; is /proc mounted?");
    let inside = ProcDir::open(visitor.pid()).map_err(unreadable)?;
    let setgroups = inside.read("setgroups").map_err(unreadable)?;
    Ok(Some(UserNamespace {
        parent: None,
        map: OwnerMap::of_task(&inside).map_err(unreadable)?,
        denies_groups: setgroups.trim_ascii() == b"deny",
        owner: None,
    }))
}

/// Refuses ids for which the given namespace has no names.
fn check_names(images: &TreeImages, join: &JoinNamespace) -> Result<(), PlanError> {
    let root = images.users.of_task(images.root().pid());
    if let Some((uid, gid)) = join.ids
        && !images.owners.names(&[uid], &[gid])
    {
        return Err(PlanError::Unsupported {
            object: format!("A tree as user {uid} and group {gid} of the joined user namespace"),
            remedy: "it has no such user or group; see its uid_map and gid_map, or leave both out",
        });
    }
    for task in &images.tasks {
        if images.users.of_task(task.pid()) != root {
            continue;
        }
        for core in std::iter::once(&task.core).chain(task.threads.values()) {
            let creds = core
                .thread_core
                .as_ref()
                .and_then(|thread| thread.creds.as_ref());
            let Some(creds) = creds.filter(|creds| creds.floe_outside.is_empty()) else {
                continue;
            };
            let uids = [creds.uid, creds.euid, creds.suid, creds.fsuid];
            let single = [creds.gid, creds.egid, creds.sgid, creds.fsgid];
            if !images
                .owners
                .names(&uids, &[&single[..], &creds.groups].concat())
            {
                return Err(PlanError::Unsupported {
                    object: format!(
                        "Task {}, with ids that the joined user namespace has no names for,",
                        task.pid()
                    ),
                    remedy: "join one whose uid_map and gid_map have them",
                });
            }
        }
    }
    Ok(())
}
