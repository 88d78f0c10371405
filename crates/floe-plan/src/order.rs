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
    #[error("These steps wait for each other: {}", .steps.join("; "))]
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
        let stuck = (0..steps.len()).filter(|&index| waiting[index] > 0);
        return Err(vec![PlanFault::Cycle {
            steps: stuck.map(|index| steps[index].to_string()).collect(),
        }]);
    }
    Ok(sorted)
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
        let cycle = ordered(vec![step("x", &[a], &[b]), step("y", &[b], &[a])]).unwrap_err();
        assert!(
            cycle[0].to_string().contains("x") && cycle[0].to_string().contains("y"),
            "{}",
            cycle[0]
        );
    }
}
