//! What a round leaves with the keeper for the next one.

use std::collections::HashMap;

use floe_kernel::ids::HostPid;
use floe_memory::PageRun;

use crate::keeper::Tracked;

/// The last finished round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoundState {
    /// The id in the inventory of its images.
    pub round: String,
    pub tracker: String,
    /// The tasks that were tracked, with the pages that were not copied for sure.
    tasks: HashMap<Tracked, Vec<PageRun>>,
}

impl RoundState {
    /// The state after a round.
    pub fn new(
        round: &str,
        tracker: &str,
        tasks: &[Tracked],
        unsure: &[(HostPid, Vec<PageRun>)],
    ) -> RoundState {
        let mut state = RoundState {
            round: round.to_string(),
            tracker: tracker.to_string(),
            tasks: tasks.iter().map(|task| (*task, Vec::new())).collect(),
        };
        for (pid, runs) in unsure {
            for (task, pages) in &mut state.tasks {
                if task.0 == pid.0 {
                    pages.extend_from_slice(runs);
                }
            }
        }
        state
    }

    /// The pages of a task that the round was not sure of; `None` when it did not have the task.
    pub fn unsure_of(&self, task: Tracked) -> Option<Vec<PageRun>> {
        self.tasks.get(&task).cloned()
    }

    /// As text of at most `limit` bytes. Tasks that do not fit are left out: they count as new then.
    pub fn text(&self, limit: usize) -> String {
        let mut text = format!("{} {}", self.round, self.tracker);
        for ((pid, start), runs) in &self.tasks {
            let mut line = format!(" {pid}:{start}");
            for run in runs {
                line.push_str(&format!(",{:x}+{:x}", run.start, run.pages));
            }
            if text.len() + line.len() <= limit {
                text.push_str(&line);
            }
        }
        text
    }

    /// Reads [`RoundState::text`]; `None` when there is no last round.
    pub fn parse(text: &str) -> Option<RoundState> {
        let mut words = text.split_ascii_whitespace();
        let (round, tracker) = (words.next()?.to_string(), words.next()?.to_string());
        let mut tasks = HashMap::new();
        for word in words {
            let mut parts = word.split(',');
            let (pid, start) = parts.next()?.split_once(':')?;
            let mut runs = Vec::new();
            for part in parts {
                let (start, pages) = part.split_once('+')?;
                runs.push(PageRun {
                    start: u64::from_str_radix(start, 16).ok()?,
                    pages: u64::from_str_radix(pages, 16).ok()?,
                });
            }
            tasks.insert((pid.parse().ok()?, start.parse().ok()?), runs);
        }
        Some(RoundState {
            round,
            tracker,
            tasks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_what_is_found() {
        let unsure = [(
            HostPid(7),
            vec![PageRun {
                start: 0x7000,
                pages: 3,
            }],
        )];
        let state = RoundState::new("a1-b2", "uffd", &[(7, 100), (8, 200)], &unsure);
        assert_eq!(RoundState::parse(&state.text(1000)), Some(state));
        assert_eq!(RoundState::parse(""), None);
    }

    #[test]
    fn a_task_that_does_not_fit_counts_as_new() {
        let runs = (0..1000).map(|page| PageRun {
            start: page * 8192,
            pages: 1,
        });
        let unsure = [(HostPid(7), runs.collect())];
        let state = RoundState::new("r", "uffd", &[(7, 100), (8, 200)], &unsure);
        let found = RoundState::parse(&state.text(500)).expect("a round");
        assert_eq!(found.unsure_of((7, 100)), None);
        assert_eq!(found.unsure_of((8, 200)), Some(Vec::new()));
    }
}
