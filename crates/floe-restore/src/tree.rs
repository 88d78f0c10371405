//! Who forks whom, and when: pure.
//!
//! A task is born in the session that its birth parent has at that moment, and leaves it only by
//! becoming a leader. So a child of an older session is forked before its parent calls `setsid`.
//! Where no living task can give a child its session, because the leader died and the child was
//! adopted, a helper takes the leader's place: it forks the orphans and exits, and they are adopted
//! by their real parent, which is a subreaper for that time.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use floe_resources::restore::{PlanError, TaskState, TreeImages};

pub use nested::{EarlyGroup, Place};

/// How one task comes to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Birth {
    /// The task, or a helper.
    pub pid: u32,
    /// Who forks it; `None` for the root.
    pub parent: Option<u32>,
    /// Forked before `parent` calls `setsid`.
    pub before_session: bool,
    /// Calls `setsid` itself.
    pub leads_session: bool,
    /// The group to join, where it is not that of the session's leader.
    pub group: Option<u32>,
    /// Exists only to give others their session or group.
    pub helper: bool,
    /// Of a helper: the task that must adopt its orphans, a subreaper for that time.
    pub adopter: Option<u32>,
    /// The pid in all namespaces down to its own, innermost first, as `set_tid` takes them.
    pub numbers: Vec<u32>,
    /// In which pid namespace it is born.
    pub place: Place,
    /// Which one that is; `None` for the root's.
    pub namespace: Option<u32>,
    /// A group that it is in before it has children itself.
    pub early_group: Option<EarlyGroup>,
}

/// The births of a tree, parents before children.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    /// In the order of the plan.
    pub births: Vec<Birth>,
}

/// One task of the tree in progress.
#[derive(Clone, Copy, Debug)]
struct Node {
    parent: Option<u32>,
    sid: u32,
    pgid: u32,
    helper: bool,
    adopter: Option<u32>,
}

/// The highest number of a task, thread, group or session.
pub fn highest_id(images: &TreeImages) -> u32 {
    let ids = images.tasks.iter().flat_map(|task| {
        let entry = &task.entry;
        let threads = entry.threads.iter().copied();
        threads.chain([entry.pid, entry.pgid, entry.sid])
    });
    ids.max().unwrap_or(0)
}

impl Tree {
    /// Plans the births; `outside` is the session of a root that does not lead its own.
    pub fn new(images: &TreeImages) -> Result<Tree, PlanError> {
        let mut nodes: BTreeMap<u32, Node> = BTreeMap::new();
        let mut order = Vec::new();
        let outside = outside_ids(images);
        for (index, task) in images.tasks.iter().enumerate() {
            let entry = &task.entry;
            let parent = (index > 0).then_some(entry.ppid);
            let mut node = Node {
                parent,
                sid: entry.sid,
                pgid: entry.pgid,
                helper: false,
                adopter: None,
            };
            let above = parent.and_then(|parent| nodes.get(&parent));
            if let Some(above) = above.filter(|above| above.sid != node.sid)
                && matches!(task.state(), Ok(TaskState::Dead))
                && outside.contains(&node.sid)
            {
                // It came from outside, died, and waits to be reaped: nobody can use its session any more.
                (node.sid, node.pgid) = (above.sid, above.pgid);
            }
            nodes.insert(entry.pid, node);
            order.push(entry.pid);
        }
        // From here on no number is that of a task, thread, group or session.
        let unused = highest_id(images) + 1;
        add_session_helpers(&mut nodes, &mut order, unused, &outside)?;
        add_group_helpers(&mut nodes, &mut order, &outside)?;
        let mut births = births(&nodes, &order, &outside);
        nested::settle(&mut births, (&nodes, &outside), images)?;
        let places = outcome(&births);
        for task in &images.tasks[1..] {
            let (pid, parent, sid) = (task.pid(), task.entry.ppid, task.entry.sid);
            let inherits = outside.contains(&sid);
            let found = places.get(&pid).copied();
            if !inherits && found != Some(Family { parent, sid }) {
                return Err(PlanError::Unsupported {
                    object: format!("task {pid}, adopted by {parent} from session {sid},"),
                    remedy: "no order of births leads there; end that task before the dump",
                });
            }
        }
        Ok(Tree { births })
    }

    /// The user namespace that a task, or a helper, is born in.
    pub fn birth_users(&self, images: &TreeImages, pid: u32) -> Option<u32> {
        let mut at = pid;
        // A helper is born where its parent is.
        while images.task(at).is_none() {
            at = self.births.iter().find(|birth| birth.pid == at)?.parent?;
        }
        images.users.birth_of(at)
    }

    /// Every pid and tid that must be free.
    pub fn ids<'a>(&'a self, images: &'a TreeImages) -> impl Iterator<Item = u32> + 'a {
        let helpers = self
            .births
            .iter()
            .filter(|birth| birth.helper)
            .map(|birth| birth.pid);
        let tasks = images
            .tasks
            .iter()
            .flat_map(|task| std::iter::once(task.pid()).chain(task.threads.keys().copied()));
        tasks.chain(helpers)
    }
}

/// Sessions and groups that the tree had from outside: those of a root that leads neither.
fn outside_ids(images: &TreeImages) -> BTreeSet<u32> {
    let root = &images.root().entry;
    let mut outside = BTreeSet::from([0]);
    if root.sid != root.pid {
        outside.insert(root.sid);
        if root.pgid != root.pid {
            outside.insert(root.pgid);
        }
    }
    outside
}

/// The session that a task must be born in; `None` where any will do.
fn wanted_session(pid: u32, node: &Node, early: &BTreeMap<u32, u32>) -> Option<u32> {
    if node.sid == pid {
        early.get(&pid).copied()
    } else {
        Some(node.sid)
    }
}

/// For each leader with children of an older session: that session, in which it must be born itself.
fn early_sessions(nodes: &BTreeMap<u32, Node>, order: &[u32]) -> BTreeMap<u32, u32> {
    let mut early = BTreeMap::new();
    let mut asked: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    // Children come behind their parents, so all that ask a task have done so when it is its turn.
    for pid in order.iter().rev() {
        let node = &nodes[pid];
        let of_children = asked.remove(pid).unwrap_or_default().into_iter();
        if let Some(nearest) = of_children.min_by_key(|session| height(nodes, *pid, *session)) {
            early.insert(*pid, nearest);
        }
        let (Some(parent), Some(wanted)) = (node.parent, wanted_session(*pid, node, &early)) else {
            continue;
        };
        // The root is born in our own session, which none of the tree's is.
        let is_root = nodes[&parent].parent.is_none();
        // A leader cannot be born in a session that began below it: that child was adopted.
        let adopted = is_below(nodes, wanted, parent);
        if nodes[&parent].sid == parent && !adopted && !is_root {
            asked.entry(parent).or_default().push(wanted);
        }
    }
    early
}

/// How many generations above `pid` somebody is in this session.
fn height(nodes: &BTreeMap<u32, Node>, pid: u32, session: u32) -> usize {
    let parent = |pid: &u32| nodes.get(pid).and_then(|node| node.parent);
    let mut ancestors = std::iter::successors(parent(&pid), parent);
    let found = ancestors.position(|pid| nodes.get(&pid).is_some_and(|node| node.sid == session));
    found.unwrap_or(usize::MAX)
}

fn add_session_helpers(
    nodes: &mut BTreeMap<u32, Node>,
    order: &mut Vec<u32>,
    mut unused: u32,
    outside: &BTreeSet<u32>,
) -> Result<(), PlanError> {
    // Children of leaders that died: one for each session and task that adopted its orphans.
    let mut dead: BTreeMap<(u32, u32), u32> = BTreeMap::new();
    loop {
        let early = early_sessions(nodes, order);
        let stray = order.iter().copied().find_map(|pid| {
            let node = nodes[&pid];
            let parent = node.parent?;
            let wanted = wanted_session(pid, &node, &early)?;
            let available = nodes[&parent].sid == wanted || early.get(&parent) == Some(&wanted);
            (!available).then_some((pid, parent, wanted))
        });
        let Some((pid, parent, session)) = stray else {
            return Ok(());
        };
        let leader = nodes.get(&session).copied();
        if outside.contains(&session) || is_below(nodes, session, pid) {
            let what = format!(
                "task {pid} is in session {session}, which it cannot have inherited from its parent {parent}"
            );
            return Err(PlanError::damaged("pstree.img", what));
        }
        if let Some(leader) = leader
            && !is_below(nodes, session, parent)
            && below_adopter(nodes, order, (session, leader), (parent, unused))
        {
            unused += 1;
        }
        // A dead leader's place is taken by a helper. Where there is a leader, or that helper has orphans
        // for another task already, a helper is the child of the leader that died.
        let (helper, helpers_parent) = match leader {
            None => (session, parent),
            Some(leader) if leader.adopter == Some(parent) => (session, parent),
            Some(_) => {
                let next = dead.entry((session, parent)).or_insert(unused);
                unused = unused.max(*next + 1);
                (*next, session)
            }
        };
        if let Entry::Vacant(place) = nodes.entry(helper) {
            place.insert(Node {
                parent: Some(helpers_parent),
                sid: session,
                pgid: session,
                helper: true,
                adopter: Some(parent),
            });
            let found = order.iter().position(|other| *other == helpers_parent);
            order.insert(found.map_or(order.len(), |at| at + 1), helper);
        }
        nodes.get_mut(&pid).expect("it was found there").parent = Some(helper);
        sort_parents_first(nodes, order)?;
    }
}

/// Has a leader be born below a task that adopts members of its session; whether that took a helper. A leader
/// that lives is born by a helper, and goes to its own parent when that ends, after its members have gone.
fn below_adopter(
    nodes: &mut BTreeMap<u32, Node>,
    order: &mut Vec<u32>,
    (session, leader): (u32, Node),
    (adopter, unused): (u32, u32),
) -> bool {
    let goes_to = leader.parent.filter(|at| is_below(nodes, adopter, *at));
    if goes_to.is_none() || is_below(nodes, adopter, session) {
        return false; // What comes of it is found at the end.
    }
    let mut birth_parent = adopter;
    if !leader.helper {
        let Node { sid, pgid, .. } = nodes[&adopter];
        let helper = Node {
            parent: Some(adopter),
            sid,
            pgid,
            helper: true,
            adopter: goes_to,
        };
        nodes.insert(unused, helper);
        order.push(unused);
        birth_parent = unused;
    }
    let leader = nodes.get_mut(&session).expect("it is the leader");
    leader.parent = Some(birth_parent);
    !leader.helper
}

/// Whether `pid` descends from `ancestor`, or is it.
fn is_below(nodes: &BTreeMap<u32, Node>, pid: u32, ancestor: u32) -> bool {
    let mut at = Some(pid);
    while let Some(pid) = at.filter(|pid| *pid != ancestor) {
        at = nodes.get(&pid).and_then(|node| node.parent);
    }
    at.is_some()
}

fn add_group_helpers(
    nodes: &mut BTreeMap<u32, Node>,
    order: &mut Vec<u32>,
    outside: &BTreeSet<u32>,
) -> Result<(), PlanError> {
    for pid in order.clone() {
        let node = nodes[&pid];
        if nodes.contains_key(&node.pgid) || outside.contains(&node.pgid) {
            continue;
        }
        // A sibling in the same session, or a child of the leader itself.
        let parent = if node.sid == pid { None } else { node.parent };
        let Some(parent) = parent else {
            let what = format!("task {pid} leads its session but is in group {}", node.pgid);
            return Err(PlanError::damaged("pstree.img", what));
        };
        nodes.insert(
            node.pgid,
            Node {
                parent: Some(parent),
                sid: node.sid,
                pgid: node.pgid,
                helper: true,
                adopter: None,
            },
        );
        order.push(node.pgid);
    }
    Ok(())
}

/// Fails where helpers that the sessions need would descend from each other.
fn sort_parents_first(nodes: &BTreeMap<u32, Node>, order: &mut Vec<u32>) -> Result<(), PlanError> {
    let mut sorted = Vec::with_capacity(order.len());
    let mut done = BTreeSet::new();
    while sorted.len() < order.len() {
        let before = sorted.len();
        for pid in order.iter() {
            if !done.contains(pid)
                && nodes[pid]
                    .parent
                    .is_none_or(|parent| done.contains(&parent))
            {
                done.insert(*pid);
                sorted.push(*pid);
            }
        }
        if sorted.len() == before {
            let left = order.iter().find(|pid| !done.contains(pid));
            let left = left.copied().unwrap_or_default();
            let what = format!("no parent of task {left} can have given it its session");
            return Err(PlanError::damaged("pstree.img", what));
        }
    }
    *order = sorted;
    Ok(())
}

/// Where a task ends up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Family {
    parent: u32,
    sid: u32,
}

/// What the kernel makes of the births, when all helpers have ended.
fn outcome(births: &[Birth]) -> BTreeMap<u32, Family> {
    let mut places: BTreeMap<u32, Family> = BTreeMap::new();
    let mut born_in: BTreeMap<u32, u32> = BTreeMap::new();
    for birth in births {
        let parent = birth.parent.unwrap_or(0);
        let inherited = match places.get(&parent) {
            Some(_) if birth.before_session => born_in[&parent],
            Some(place) => place.sid,
            None => 0,
        };
        born_in.insert(birth.pid, inherited);
        let sid = if birth.leads_session {
            birth.pid
        } else {
            inherited
        };
        places.insert(birth.pid, Family { parent, sid });
    }
    let root = births.first().map_or(0, |birth| birth.pid);
    for helper in births.iter().rev().filter(|birth| birth.helper) {
        let mut heir = places
            .remove(&helper.pid)
            .map_or(root, |place| place.parent);
        while heir != root && helper.adopter != Some(heir) {
            heir = places.get(&heir).map_or(root, |place| place.parent);
        }
        let orphans = places
            .values_mut()
            .filter(|place| place.parent == helper.pid);
        orphans.for_each(|place| place.parent = heir);
    }
    places
}

fn births(nodes: &BTreeMap<u32, Node>, order: &[u32], outside: &BTreeSet<u32>) -> Vec<Birth> {
    let early = early_sessions(nodes, order);
    let births = order.iter().map(|pid| birth(*pid, nodes, &early, outside));
    births.collect()
}

fn birth(
    pid: u32,
    nodes: &BTreeMap<u32, Node>,
    early: &BTreeMap<u32, u32>,
    outside: &BTreeSet<u32>,
) -> Birth {
    let node = &nodes[&pid];
    let before_session = match (node.parent, wanted_session(pid, node, early)) {
        (Some(parent), Some(wanted)) => early.get(&parent) == Some(&wanted),
        _ => false,
    };
    // Nobody calls setpgid before the whole tree exists, so all are in the group of their session.
    let inherited = node.pgid == node.sid || outside.contains(&node.pgid);
    Birth {
        pid,
        parent: node.parent,
        before_session,
        leads_session: node.sid == pid,
        group: (node.sid != pid && !inherited).then_some(node.pgid),
        helper: node.helper,
        adopter: node.adopter,
        numbers: vec![pid],
        place: Place::OfParent,
        namespace: None,
        early_group: None,
    }
}

/// Whether a task is a zombie in the images.
pub fn is_zombie(images: &TreeImages, pid: u32) -> bool {
    images
        .task(pid)
        .is_some_and(|task| matches!(task.state(), Ok(TaskState::Dead)))
}

#[cfg(test)]
mod history;
mod nested;
