//! Groups of this machine that are not as a restore needs them. The images are in order.

use floe_image::messages::{CgControllerEntry, CgroupDirEntry};
use floe_options::ManageCgroups;

use super::hierarchy::Hierarchy;
use super::plan::saved;
use crate::restore::{PlanError, Planner};

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GroupFault {
    #[error("control group {group} is not here")]
    Missing { group: String },
    #[error("control group {group} is here already")]
    InTheWay { group: String },
}

impl GroupFault {
    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            GroupFault::Missing { .. } => {
                "make it, or let the restore make it: --manage-cgroups=soft"
            }
            GroupFault::InTheWay { .. } => {
                "remove it (rmdir), or let the restore use it: --manage-cgroups=soft"
            }
        }
    }

    /// What is wrong with a group that is here or is not, where `mode` says what a restore may do.
    pub(super) fn of(group: &str, is_here: bool, mode: ManageCgroups) -> Option<GroupFault> {
        let group = group.to_string();
        match mode {
            ManageCgroups::None | ManageCgroups::Props if !is_here => {
                Some(GroupFault::Missing { group })
            }
            ManageCgroups::Strict if is_here => Some(GroupFault::InTheWay { group }),
            _ => None,
        }
    }
}

/// Looks for every group of the images.
pub fn look_at_groups(planner: &Planner<'_>) -> Result<Vec<GroupFault>, PlanError> {
    let options = &planner.options.cgroups;
    let mode = options.manage;
    let strict = matches!(
        mode,
        ManageCgroups::None | ManageCgroups::Props | ManageCgroups::Strict
    );
    let Some(entry) = saved(planner)?.filter(|_| strict) else {
        return Ok(Vec::new());
    };
    let mut faults = Vec::new();
    for CgControllerEntry { cnames, dirs, .. } in entry.controllers {
        // Without its hierarchy a restore says more than that a group is missing.
        let Ok(hierarchy) = Hierarchy::open(&cnames.join(","), options.yard.as_deref()) else {
            continue;
        };
        let is_here = |group: &str| hierarchy.path(group).exists();
        for dir in &dirs {
            walk(("", dir), &mut |group| {
                faults.extend(GroupFault::of(group, is_here(group), mode));
            });
        }
    }
    Ok(faults)
}

fn walk((parent, dir): (&str, &CgroupDirEntry), look: &mut impl FnMut(&str)) {
    let group = path_of(parent, dir);
    if !group.is_empty() {
        look(&group);
    }
    for child in &dir.children {
        walk((&group, child), look);
    }
}

/// The path of a group; nothing for the root.
pub(super) fn path_of(parent: &str, dir: &CgroupDirEntry) -> String {
    let group = format!("{parent}/{}", dir.dir_name.trim_matches('/'));
    group.trim_end_matches('/').to_string()
}
