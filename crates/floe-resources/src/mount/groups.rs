//! Which mounts propagate to which: pure.
//!
//! Every sharing group is first given to a mount of its own, a carrier, that nothing else sees. Mounts
//! join the group of their carrier when the whole tree stands, so nothing propagates before.

use std::collections::BTreeMap;

use super::model::{below, comes_from_caller};
use super::tree::{MountTree, Origin, Placed, image_name};
use crate::restore::PlanError;

/// A sharing group: the mounts with the same peers and the same master.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub shared: u32,
    pub master: u32,
    pub base: Base,
    /// What its carrier is a copy of.
    pub source: usize,
    /// Its mounts, by their place in the tree's list.
    pub members: Vec<usize>,
}

/// What the carrier of a group is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// A private copy.
    Alone,
    /// A slave of the carrier of another group, which comes before this one.
    SlaveOf(usize),
    /// A slave of the host's mount.
    SlaveOfHost,
    /// A peer of the host's mount.
    PeerOfHost,
}

/// Plans the groups; masters come before their slaves.
pub fn plan_groups(tree: &MountTree) -> Result<Vec<Group>, PlanError> {
    let mut members: BTreeMap<(u32, u32), Vec<usize>> = BTreeMap::new();
    for (index, mount) in tree.mounts.iter().enumerate() {
        let key = key_of(mount);
        if key != (0, 0) {
            members.entry(key).or_default().push(index);
        }
    }
    let mut planner = GroupPlanner {
        tree,
        members,
        done: BTreeMap::new(),
        groups: Vec::new(),
    };
    let keys: Vec<(u32, u32)> = planner.members.keys().copied().collect();
    for key in keys {
        planner.add(key, 0)?;
    }
    Ok(planner.groups)
}

fn key_of(mount: &Placed) -> (u32, u32) {
    let entry = &mount.entry;
    (entry.shared_id.unwrap_or(0), entry.master_id.unwrap_or(0))
}

struct GroupPlanner<'t> {
    tree: &'t MountTree,
    members: BTreeMap<(u32, u32), Vec<usize>>,
    done: BTreeMap<(u32, u32), usize>,
    groups: Vec<Group>,
}

impl GroupPlanner<'_> {
    fn add(&mut self, key: (u32, u32), depth: usize) -> Result<usize, PlanError> {
        if let Some(done) = self.done.get(&key) {
            return Ok(*done);
        }
        let members = self.members[&key].clone();
        let first = &self.tree.mounts[members[0]];
        if depth > self.members.len() {
            let what = format!("group {} is a slave of itself", key.1);
            return Err(PlanError::damaged(image_name(first.namespace), what));
        }
        let base = self.base(key, &members, depth)?;
        let mut parts: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        match self.source(&members) {
            Ok(source) => {
                parts.insert(source, members);
            }
            // Mounts of the host find their master by themselves, each from its own place.
            Err(_) if base == Base::SlaveOfHost && key.0 == 0 => {
                for member in members {
                    let source = self.tree.mounts[member].source;
                    parts.entry(source).or_default().push(member);
                }
            }
            Err(error) => return Err(error),
        }
        let index = self.groups.len();
        for (source, members) in parts {
            self.groups.push(Group {
                shared: key.0,
                master: key.1,
                base,
                source,
                members,
            });
        }
        self.done.insert(key, index);
        Ok(index)
    }

    fn base(
        &mut self,
        (shared, master): (u32, u32),
        members: &[usize],
        depth: usize,
    ) -> Result<Base, PlanError> {
        let mounts = || members.iter().map(|index| &self.tree.mounts[*index]);
        if master == 0 {
            let outside = mounts().any(|mount| {
                comes_from_caller(&mount.entry) && mount.entry.internal_sharing != Some(true)
            });
            return Ok(if outside {
                Base::PeerOfHost
            } else {
                Base::Alone
            });
        }
        let found = self
            .members
            .keys()
            .copied()
            .find(|key| key.0 == master && key.0 != shared);
        if let Some(found) = found {
            let index = self.add(found, depth + 1)?;
            return Ok(Base::SlaveOf(index));
        }
        let of_host =
            mounts().any(|mount| matches!(self.tree.sources[mount.source].origin, Origin::Host(_)));
        if of_host {
            return Ok(Base::SlaveOfHost);
        }
        let first = &self.tree.mounts[members[0]];
        Err(PlanError::NotExternal {
            object: format!(
                "Mount {}, which receives from mounts outside of the tree (group {master}),",
                first.entry.mountpoint
            ),
            point: first.entry.mountpoint.clone(),
            otherwise: ", or --external 'mnt[]:ms', by which all such are found",
        })
    }

    /// The source that has the roots of all members in it.
    fn source(&self, members: &[usize]) -> Result<usize, PlanError> {
        let mounts = || members.iter().map(|index| &self.tree.mounts[*index]);
        let device = |index: usize| self.tree.sources[index].device;
        let all_in = |index: usize| {
            let root = &self.tree.sources[index].root;
            mounts().all(|mount| {
                device(mount.source) == device(index) && below(&mount.entry.root, root).is_some()
            })
        };
        let found = mounts()
            .map(|mount| mount.source)
            .find(|index| all_in(*index));
        found.ok_or_else(|| {
            let points: Vec<&str> = mounts()
                .map(|mount| mount.entry.mountpoint.as_str())
                .collect();
            PlanError::Unsupported {
                object: format!(
                    "Mounts {}, which share but have no root in common,",
                    points.join(", ")
                ),
                remedy: "dump again with the file system's root mounted in the tree",
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::tree::{Request, plan_tree};
    use floe_image::messages::{Fstype, MntEntry};
    use floe_options::MountOptions;

    fn mount(id: u32, (device, root): (u32, &str), (shared, master): (u32, u32)) -> MntEntry {
        MntEntry {
            fstype: Fstype::Tmpfs as u32,
            mnt_id: id,
            parent_mnt_id: u32::from(id > 1),
            mountpoint: if id == 1 {
                "/".into()
            } else {
                format!("/m{id}")
            },
            root_dev: device,
            root: root.into(),
            shared_id: Some(shared),
            master_id: Some(master),
            ..MntEntry::default()
        }
    }

    fn groups(entries: Vec<MntEntry>) -> Result<Vec<Group>, PlanError> {
        let namespaces = BTreeMap::from([(1, entries)]);
        let tree = plan_tree(&Request {
            namespaces: &namespaces,
            root_namespace: Some(1),
            own_pids: false,
            own_cgroups: false,
            own_users: false,
            options: &MountOptions::default(),
            external: &[],
        })?;
        plan_groups(&tree)
    }

    #[test]
    fn slaves_follow_their_masters() {
        let found = groups(vec![
            mount(1, (1, "/"), (0, 0)),
            mount(2, (2, "/"), (3, 4)),
            mount(3, (2, "/"), (4, 0)),
            mount(4, (2, "/"), (0, 3)),
            mount(5, (2, "/"), (4, 0)),
        ])
        .expect("groups");
        let keys: Vec<_> = found.iter().map(|g| (g.shared, g.master, g.base)).collect();
        assert_eq!(
            keys,
            [
                (4, 0, Base::Alone),
                (3, 4, Base::SlaveOf(0)),
                (0, 3, Base::SlaveOf(1)),
            ]
        );
        assert_eq!(found[0].members.len(), 2);
    }

    #[test]
    fn an_unknown_master_is_the_hosts_or_damage() {
        let of_root = groups(vec![mount(1, (1, "/"), (0, 9))]).expect("groups");
        assert_eq!(of_root[0].base, Base::SlaveOfHost);
        let unknown = vec![mount(1, (1, "/"), (0, 0)), mount(2, (2, "/"), (0, 9))];
        assert!(groups(unknown).is_err());
        let circle = vec![
            mount(1, (1, "/"), (0, 0)),
            mount(2, (2, "/"), (3, 4)),
            mount(3, (2, "/"), (4, 3)),
        ];
        assert!(groups(circle).is_err());
    }
}
