//! In which pid namespace each task is born, and which group it has from there: pure.
//!
//! A task inside can neither name a group nor a session of the outside: it has them by its birth. So a
//! child that begins a namespace, or is sent into one, is put into its group by its parent, before it has
//! children itself.

use std::collections::{BTreeMap, BTreeSet};

use floe_resources::restore::{PlanError, TreeImages};

use super::{Birth, Node};

/// The pid namespace of a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// That of its parent.
    OfParent,
    /// A new one, of which it is the first task.
    New(u32),
    /// One that another task has begun, below that of its parent.
    Other(u32),
}

/// How a task comes into a group before it has children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EarlyGroup {
    /// It leads the group.
    Leads,
    /// Its parent puts it there.
    ByParent(u32),
}

/// Works out numbers, places and groups, where the tree has pid namespaces below the root's.
pub(super) fn settle(
    births: &mut [Birth],
    (nodes, outside): (&BTreeMap<u32, Node>, &BTreeSet<u32>),
    images: &TreeImages,
) -> Result<(), PlanError> {
    if images.nested.is_empty() {
        return Ok(());
    }
    place(births, images)?;
    let mut leaders = BTreeSet::new();
    loop {
        let found = settle_groups(births, (nodes, outside), &leaders)?;
        let before = leaders.len();
        leaders.extend(found);
        // With all of them leading early, others may inherit their groups.
        if leaders.len() == before {
            return Ok(());
        }
    }
}

fn place(births: &mut [Birth], images: &TreeImages) -> Result<(), PlanError> {
    let nested = &images.nested;
    let mut unused = nested.highest() + 1;
    let mut known: BTreeMap<u32, (usize, Option<u32>)> = BTreeMap::new();
    for birth in births {
        let pid = birth.pid;
        let above = birth.parent.and_then(|parent| known.get(&parent).copied());
        let (depth, around) = above.unwrap_or_default();
        birth.numbers = nested.numbers(pid);
        let mut own = nested.namespace_of(pid);
        let is_new = images.task(pid).is_none() && !is_known(images, pid);
        if is_new {
            // Nobody was ever asked for its number.
            birth.numbers = vec![unused; depth];
            birth.numbers.push(pid);
            unused += 1;
            own = around;
        } else if birth.helper {
            own = nested.namespace_of_id(pid, &images.tasks);
        }
        let below = birth.numbers.len() - 1;
        birth.place = match own {
            same if same == around && below == depth => Place::OfParent,
            Some(new) if nested.first_of(new) == Some(pid) && below == depth + 1 => Place::New(new),
            // What a dead one leaves would be adopted within that namespace.
            Some(other)
                if below > depth && nested.first_of(other) != Some(pid) && !birth.helper =>
            {
                Place::Other(other)
            }
            _ => {
                return Err(unsupported(
                    format!("Task {pid} in a pid namespace of its own"),
                    "no order of births leads there; end that task before the dump",
                ));
            }
        };
        birth.namespace = own;
        known.insert(pid, (below, own));
    }
    Ok(())
}

/// Whether the images have this number for something.
fn is_known(images: &TreeImages, id: u32) -> bool {
    let mut tasks = images.tasks.iter().map(|task| &task.entry);
    tasks.any(|entry| entry.sid == id || entry.pgid == id)
}

/// The groups that tasks are in when they fork.
#[derive(Clone, Copy)]
struct Groups {
    /// Before it calls `setsid`.
    first: u32,
    then: u32,
}

/// Decides how everybody comes into their group; answers who must lead one before it has children.
fn settle_groups(
    births: &mut [Birth],
    (nodes, outside): (&BTreeMap<u32, Node>, &BTreeSet<u32>),
    leaders: &BTreeSet<u32>,
) -> Result<BTreeSet<u32>, PlanError> {
    let mut wanted_leaders = BTreeSet::new();
    let mut known: BTreeMap<u32, Groups> = BTreeMap::new();
    let depths: BTreeMap<u32, usize> = births
        .iter()
        .map(|birth| (birth.pid, birth.numbers.len()))
        .collect();
    for birth in births {
        let (pid, group) = (birth.pid, nodes[&birth.pid].pgid);
        let first = match birth.parent.and_then(|parent| known.get(&parent)) {
            Some(groups) if birth.before_session => groups.first,
            Some(groups) => groups.then,
            None => 0,
        };
        (birth.group, birth.early_group) = (None, None);
        let depth = birth.numbers.len();
        let visible = depths.get(&group).is_some_and(|leader| *leader >= depth);
        let mut then = first;
        if birth.leads_session {
            then = pid;
        } else if group == first || outside.contains(&group) {
            then = group;
        } else if group == pid && leaders.contains(&pid) {
            birth.early_group = Some(EarlyGroup::Leads);
            then = pid;
        } else if visible {
            birth.group = Some(group);
        } else if birth.place != Place::OfParent && !birth.before_session {
            birth.early_group = Some(EarlyGroup::ByParent(group));
            // The leader of a session is in its own group from the beginning.
            if nodes.get(&group).is_some_and(|leader| leader.sid != group) {
                wanted_leaders.insert(group);
            }
            then = group;
        } else {
            return Err(unsupported(
                format!("Task {pid} in group {group}, which is outside of its pid namespace,"),
                "no order of births leads there; end that task before the dump",
            ));
        }
        known.insert(pid, Groups { first, then });
    }
    Ok(wanted_leaders)
}

fn unsupported(object: String, remedy: &'static str) -> PlanError {
    PlanError::Unsupported { object, remedy }
}
