//! Membership in control groups.
//!
//! Saved:    the groups of each thread, as numbered sets (`cgroup.img`), and their hierarchies.
//! Rebuilt:  tasks are put into their groups. Needs: the groups.
//! Not kept: properties of the groups, so far.

use std::collections::HashMap;

use floe_image::messages::{CgControllerEntry, CgMemberEntry, CgSetEntry, CgroupEntry};
use floe_kernel::proc::{CgroupMembership, ProcDir, parse_cgroup};

use crate::collect::CollectError;

/// Sets of groups, numbered from 1.
#[derive(Debug, Default)]
pub struct CgroupSets {
    sets: Vec<Vec<CgroupMembership>>,
    known: HashMap<Vec<u8>, u32>,
}

impl CgroupSets {
    /// The number of the set that a thread (or process) is in.
    pub fn of(&mut self, proc: &ProcDir, name: &str) -> Result<u32, CollectError> {
        let text = proc.read(name)?;
        if let Some(number) = self.known.get(&text) {
            return Ok(*number);
        }
        let mut set = parse_cgroup(&text).map_err(|error| proc.bad(error))?;
        // The kernel prints hierarchies newest first; the images have them by name.
        set.sort();
        self.sets.push(set);
        let number = self.sets.len() as u32;
        self.known.insert(text, number);
        Ok(number)
    }

    /// The content of `cgroup.img`, or `None` when all tasks are in the coordinator's own groups, which
    /// restore takes from its caller.
    pub fn into_entry(self) -> Option<CgroupEntry> {
        if self.sets.len() < 2 {
            return None;
        }
        let controllers = self.sets[0].iter().map(|member| CgControllerEntry {
            cnames: member.controllers.split(',').map(str::to_string).collect(),
            dirs: Vec::new(),
            is_threaded: None,
        });
        let controllers = controllers.collect();
        let sets = self
            .sets
            .into_iter()
            .zip(1..)
            .map(|(members, id)| CgSetEntry {
                id,
                ctls: members
                    .into_iter()
                    .map(|member| CgMemberEntry {
                        name: member.controllers,
                        path: member.path,
                        cgns_prefix: None,
                    })
                    .collect(),
            });
        Some(CgroupEntry {
            sets: sets.collect(),
            controllers,
        })
    }
}
