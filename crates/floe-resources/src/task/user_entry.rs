//! The way of a task into its user namespace (`user_namespaces(7)`), and its ids on the way.
//!
//! Saved:    with the credentials, ids as the dumping process sees them, where the root's user namespace has no
//!           names for all of them.
//! Rebuilt:  set outside, where every id has a name and `setgroups` is not denied; who goes in keeps them and
//!           gets all rights inside, for the rest of its state. Needs: that nothing else is to be done outside.
//! Not kept: nothing.

use floe_image::messages::CredsEntry;
use floe_inject::{Arg, Program};
use floe_kernel::namespace::NsKind;
use floe_kernel::proc::Status;

use super::credentials::{Credentials, keep_capabilities};
use crate::namespace::OwnerMap;
use crate::restore::PlanError;

/// Users and groups before the supplementary ones in the list of the images.
const SINGLE: usize = 8;

/// All ids of a thread for the images, where `owners` lacks one of them; else none.
pub fn outside_of(status: &Status, owners: &OwnerMap) -> Vec<u32> {
    let (uids, gids) = (&status.uids, &status.gids);
    let mut groups = gids.iter().chain(&status.groups);
    let named = uids.iter().all(|uid| owners.has_uid(*uid).is_some())
        && groups.all(|gid| owners.has_gid(*gid).is_some());
    match named {
        true => Vec::new(),
        false => [&uids[..], gids, &status.groups].concat(),
    }
}

/// The ids of a thread as the coordinator sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    /// Real, effective, saved, file system.
    uids: [u32; 4],
    gids: [u32; 4],
    groups: Vec<u32>,
}

impl Ids {
    /// From an image; `owners` are those that images name.
    pub fn of(entry: &CredsEntry, owners: &OwnerMap) -> Self {
        if let Some((single, groups)) = entry.floe_outside.split_first_chunk::<SINGLE>() {
            let [a, b, c, d, e, f, g, h] = *single;
            return Ids {
                uids: [a, b, c, d],
                gids: [e, f, g, h],
                groups: groups.to_vec(),
            };
        }
        let uids = [entry.uid, entry.euid, entry.suid, entry.fsuid];
        let gids = [entry.gid, entry.egid, entry.sgid, entry.fsgid];
        Ids {
            uids: uids.map(|uid| owners.uid_outside(uid)),
            gids: gids.map(|gid| owners.gid_outside(gid)),
            groups: (entry.groups.iter())
                .map(|gid| owners.gid_outside(*gid))
                .collect(),
        }
    }

    /// Whether a namespace has names for all of them.
    pub fn are_named(&self, map: &OwnerMap) -> bool {
        let mut gids = self.gids.iter().chain(&self.groups);
        self.uids.iter().all(|uid| map.has_uid(*uid).is_some())
            && gids.all(|gid| map.has_gid(*gid).is_some())
    }

    /// The credentials of who has these ids and comes into a namespace.
    pub fn inside(&self, map: &OwnerMap) -> Credentials {
        Credentials {
            uids: self.uids.map(|uid| map.uid_inside(uid)),
            gids: self.gids.map(|gid| map.gid_inside(gid)),
            groups: self.groups.iter().map(|gid| map.gid_inside(*gid)).collect(),
            ..Credentials::default()
        }
        .with_all_rights()
    }
}

/// A user namespace from which a task goes into one of its own.
#[derive(Clone, Copy, Debug)]
pub struct From<'a> {
    pub map: &'a OwnerMap,
    pub denies_groups: bool,
    /// What the task has there.
    pub born: &'a Credentials,
}

/// Takes the ids of a task, and the task into the user namespace that `file` is.
pub fn plan_entry(
    (tid, ids): (u32, &Ids),
    from: From<'_>,
    file: i32,
    program: &mut Program,
) -> Result<(), PlanError> {
    let unsupported = |what: &str, remedy| {
        Err(PlanError::Unsupported {
            object: format!("{what} of task {tid} in its user namespace"),
            remedy,
        })
    };
    let mut wanted = ids.inside(from.map);
    wanted.groups.sort_unstable();
    let changes = wanted.groups != from.born.groups;
    if changes && from.denies_groups {
        return unsupported(
            "The groups",
            "the user namespace around it denies setgroups; restore it with its groups unchanged",
        );
    }
    let differs = changes || wanted.uids != from.born.uids || wanted.gids != from.born.gids;
    if differs && !ids.are_named(from.map) {
        return unsupported(
            "The ids",
            "the user namespace around it has no names for them; dump the tree of a task further out",
        );
    }
    keep_capabilities(&wanted, from.born, program);
    enter(file, program);
    Ok(())
}

/// Takes whoever runs the program into the user namespace that `file` is.
pub fn enter(file: i32, program: &mut Program) {
    let args = [Arg::from(file), Arg::from(NsKind::User.flag())];
    program.call("setns to the user namespace", libc::SYS_setns, &args);
}

#[cfg(test)]
mod tests {
    use super::*;
    use floe_image::messages::{UidGidExtent, UsernsEntry};

    #[test]
    fn ids_without_a_name_are_kept_as_they_are_outside() {
        let map = vec![UidGidExtent {
            first: 0,
            lower_first: 1000,
            count: 1,
        }];
        let owners = OwnerMap::from_image(Some(UsernsEntry {
            uid_map: map.clone(),
            gid_map: map,
            ..UsernsEntry::default()
        }));
        let mut status = Status {
            uids: [1000; 4],
            gids: [1000; 4],
            ..Status::default()
        };
        assert!(outside_of(&status, &owners).is_empty());
        status.groups = vec![27];
        let mut entry = CredsEntry {
            floe_outside: outside_of(&status, &owners),
            ..CredsEntry::default()
        };
        let ids = Ids::of(&entry, &owners);
        assert_eq!((ids.uids, &ids.groups[..]), ([1000; 4], &[27][..]));
        assert!(!ids.are_named(&owners));
        assert_eq!(ids.inside(&owners).groups, [65534]);
        entry.floe_outside.clear();
        assert_eq!(Ids::of(&entry, &owners).gids, [1000; 4]);
    }
}
