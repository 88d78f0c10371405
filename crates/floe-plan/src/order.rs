//! Ordering and verification of steps.

use std::collections::{BTreeSet, HashMap};

use crate::{Handle, Step};

/// Why a plan cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanFault {
    #[error("`{step}` needs {handle:?}, which nothing makes")]
    Missing { step: String, handle: Handle },
    #[error("{handle:?} is made by `{first}` and again by `{second}`")]
    MadeTwice {
        handle: Handle,
        first: String,
        second: String,
    },
    /// Each step waits for the one after it, the last one for the first.
    #[error("These steps wait for each other in a circle: {}", .steps.join(", which waits for "))]
    Cycle { steps: Vec<String> },
}

/// Indices of `steps` in the order of execution (Kahn's algorithm, lowest index first).
pub(crate) fn order<Op>(steps: &[Step<Op>]) -> Result<Vec<usize>, Vec<PlanFault>> {
    let makers = makers(steps)?;
    let mut waiting = vec![0usize; steps.len()];
    let mut followers: Vec<Vec<usize>> = vec![Vec::new(); steps.len()];
    let mut faults = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        for handle in &step.needs {
            match makers.get(handle) {
                Some(&maker) => {
                    waiting[index] += 1;
                    followers[maker].push(index);
                }
                None => faults.push(PlanFault::Missing {
                    step: step.to_string(),
                    handle: *handle,
                }),
            }
        }
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    let mut free: BTreeSet<usize> = (0..steps.len())
        .filter(|&index| waiting[index] == 0)
        .collect();
    let mut sorted = Vec::with_capacity(steps.len());
    while let Some(index) = free.pop_first() {
        sorted.push(index);
        for &follower in &followers[index] {
            waiting[follower] -= 1;
            if waiting[follower] == 0 {
                free.insert(follower);
            }
        }
    }
    if sorted.len() < steps.len() {
        let circle = circle(steps, &makers, &waiting);
        return Err(vec![PlanFault::Cycle {
            steps: circle.map(|index| steps[index].to_string()).collect(),
        }]);
    }
    Ok(sorted)
}

/// One circle among the steps that still wait: from any of them, one always comes to a step seen before.
fn circle<Op>(
    steps: &[Step<Op>],
    makers: &HashMap<Handle, usize>,
    waiting: &[usize],
) -> impl Iterator<Item = usize> {
    let waits_for = |index: usize| {
        let mut needed = steps[index].needs.iter().map(|handle| makers[handle]);
        needed.find(|&maker| waiting[maker] > 0)
    };
    let mut path: Vec<usize> = Vec::new();
    let mut next = waiting.iter().position(|&left| left > 0);
    while let Some(index) = next {
        if let Some(first) = path.iter().position(|&seen| seen == index) {
            path.drain(..first);
            break;
        }
        path.push(index);
        next = waits_for(index);
    }
    path.into_iter()
}

fn makers<Op>(steps: &[Step<Op>]) -> Result<HashMap<Handle, usize>, Vec<PlanFault>> {
    let mut makers: HashMap<Handle, usize> = HashMap::new();
    let mut faults = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        for handle in &step.makes {
            if let Some(first) = makers.insert(*handle, index) {
                let (first, second) = (steps[first].to_string(), step.to_string());
                faults.push(PlanFault::MadeTwice {
                    handle: *handle,
                    first,
                    second,
                });
            }
        }
    }
    if faults.is_empty() {
        Ok(makers)
    } else {
        Err(faults)
    }
}

#[cfg(test)]
mod tests {
    use crate::{Actor, Handle, PlanBuilder, PlanFault, Step};

    fn step(name: &'static str, needs: &[Handle], makes: &[Handle]) -> Step<()> {
        Step {
            name: name.into(),
            actor: Actor::Coordinator,
            needs: needs.to_vec(),
            makes: makes.to_vec(),
            op: (),
        }
    }

    fn ordered(steps: Vec<Step<()>>) -> Result<Vec<String>, Vec<PlanFault>> {
        let mut builder = PlanBuilder::default();
        steps.into_iter().for_each(|step| builder.add(step));
        Ok(builder
            .finish()?
            .steps()
            .iter()
            .map(|step| step.name.to_string())
            .collect())
    }

    #[test]
    fn a_handle_is_made_before_it_is_needed() {
        let (file, born) = (Handle::File(1), Handle::Born(7));
        let order = ordered(vec![
            step("fds", &[file, born], &[]),
            step("open", &[], &[file]),
            step("clone", &[file], &[born]),
        ]);
        assert_eq!(order.unwrap(), ["open", "clone", "fds"]);
    }

    #[test]
    fn what_comes_after_is_found_in_any_order_of_planning() {
        let (file, watch, born) = (Handle::File(1), Handle::File(2), Handle::Born(7));
        let mut builder = PlanBuilder::default();
        builder.add(step("watch", &[file], &[watch]));
        builder.add(step("open", &[born], &[file]));
        builder.add(step("clone", &[], &[born, Handle::File(3)]));
        let after = builder.made_after(|handle| *handle == born);
        assert_eq!(after, [file, watch].into());
    }

    #[test]
    fn faults_name_the_steps() {
        let (a, b) = (Handle::File(1), Handle::File(2));
        assert!(matches!(
            ordered(vec![step("x", &[a], &[])]).unwrap_err()[0],
            PlanFault::Missing { .. }
        ));
        assert!(matches!(
            ordered(vec![step("x", &[], &[a]), step("y", &[], &[a])]).unwrap_err()[0],
            PlanFault::MadeTwice { .. }
        ));
        let follower = step("z", &[a], &[]);
        let circle = vec![follower, step("x", &[a], &[b]), step("y", &[b], &[a])];
        let PlanFault::Cycle { steps } = &ordered(circle).unwrap_err()[0] else {
            panic!("no circle was found");
        };
        assert_eq!(steps.len(), 2, "only those of the circle: {steps:?}");
    }
}
