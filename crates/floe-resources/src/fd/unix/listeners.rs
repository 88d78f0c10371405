//! Whom clients of a listening socket see as its owner (`SO_PEERCRED`).
//!
//! The kernel remembers who called `listen(2)`, and a second call replaces the first. The images do not say
//! who it was: the first task that has the socket, parents before children, calls it once more.

use std::collections::{BTreeMap, HashMap};

use floe_inject::{Arg, Program};

use super::LISTEN;
use super::plan::inherited;
use crate::restore::Planner;

/// Descriptors of listening sockets and the length of their backlogs, by the task that owns them.
pub struct Listeners(BTreeMap<u32, Vec<(u32, u32)>>);

impl Listeners {
    /// Finds the owners.
    pub fn of(planner: &Planner<'_>) -> Self {
        let images = planner.images;
        let sockets = images
            .files
            .values()
            .filter_map(|file| file.usk.as_ref())
            .filter(|socket| socket.state == LISTEN && inherited(planner, socket).is_none());
        let mut unowned: HashMap<u32, u32> =
            sockets.map(|socket| (socket.id, socket.backlog)).collect();
        let mut owners: BTreeMap<u32, Vec<(u32, u32)>> = BTreeMap::new();
        for task in &images.tasks {
            for fd in &task.fds {
                if let Some(backlog) = unowned.remove(&fd.id) {
                    owners.entry(task.pid()).or_default().push((fd.fd, backlog));
                }
            }
        }
        Listeners(owners)
    }

    /// Adds the calls of a task that has its final credentials.
    pub fn plan(&self, pid: u32, program: &mut Program) {
        for &(fd, backlog) in self.0.get(&pid).into_iter().flatten() {
            let args = [Arg::from(u64::from(fd)), Arg::from(u64::from(backlog))];
            program.call(format!("listen on fd {fd}"), libc::SYS_listen, &args);
        }
    }
}
