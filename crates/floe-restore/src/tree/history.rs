//! Trees with a random past, born again: everybody must have the parent and the session that they had.

use super::*;

/// Marsaglia's xorshift; the same trees in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

const ROOT: u32 = 1;

/// A tree that forked, began sessions, adopted and died.
fn live(dice: &mut Dice, steps: usize) -> BTreeMap<u32, Family> {
    let root = Family {
        parent: 0,
        sid: ROOT,
    };
    let mut tasks = BTreeMap::from([(ROOT, root)]);
    let mut subreapers = BTreeSet::from([ROOT]);
    let mut next = ROOT + 1;
    for _ in 0..steps {
        let index = dice.below(tasks.len());
        let pid = *tasks.keys().nth(index).expect("it is below the length");
        match dice.below(10) {
            kind @ 0..=4 => {
                let forker = tasks[&pid];
                // With CLONE_PARENT its child is a sibling.
                let parent = match kind == 0 && pid != ROOT {
                    true => forker.parent,
                    false => pid,
                };
                let sid = forker.sid;
                tasks.insert(next, Family { parent, sid });
                next += 1;
            }
            5 | 6 => tasks.get_mut(&pid).expect("it lives").sid = pid,
            7 if pid != ROOT && subreapers.contains(&pid) => drop(subreapers.remove(&pid)),
            7 => drop(subreapers.insert(pid)),
            _ if pid != ROOT => {
                let dead = tasks.remove(&pid).expect("it lives");
                orphan(&mut tasks, pid, dead.parent, |at| subreapers.contains(&at));
            }
            _ => {}
        }
    }
    tasks
}

/// Children of `dead` go to the nearest ancestor that adopts.
fn orphan(tasks: &mut BTreeMap<u32, Family>, dead: u32, mut at: u32, adopts: impl Fn(u32) -> bool) {
    while at != ROOT && !adopts(at) {
        at = tasks[&at].parent;
    }
    for task in tasks.values_mut().filter(|task| task.parent == dead) {
        task.parent = at;
    }
}

fn plan(tasks: &BTreeMap<u32, Family>) -> Result<Vec<Birth>, PlanError> {
    let node = |(pid, task): (&u32, &Family)| {
        let node = Node {
            parent: (*pid != ROOT).then_some(task.parent),
            sid: task.sid,
            pgid: task.sid,
            helper: false,
            adopter: None,
        };
        (*pid, node)
    };
    let mut nodes: BTreeMap<u32, Node> = tasks.iter().map(node).collect();
    let mut order: Vec<u32> = tasks.keys().copied().collect();
    sort_parents_first(&nodes, &mut order)?;
    let outside = BTreeSet::from([0]);
    add_session_helpers(&mut nodes, &mut order, 10_000, &outside)?;
    Ok(births(&nodes, &order, &outside))
}

#[test]
fn every_past_leads_to_the_same_tree() {
    let mut dice = Dice(88_172_645_463_325_252);
    let mut lost = 0;
    for round in 0..3000 {
        let tasks = live(&mut dice, 10 + round % 600);
        let births = plan(&tasks).expect("each tree has a past");
        lost += usize::from(outcome(&births) != tasks);
    }
    // Where adoptions of several sessions cross each other; `Tree::new` refuses them.
    assert!(lost <= 12, "{lost} trees");
}
