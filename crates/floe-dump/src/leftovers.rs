//! What a dump in rounds that fails takes with it.

use std::path::Path;

use floe_kernel::ids::HostPid;

use crate::generations::Generations;
use crate::track;

/// What was there before a dump in rounds: all else of its kind goes if that fails.
#[derive(Debug)]
pub struct Leftovers {
    root: HostPid,
    was_tracked: bool,
    pub(crate) generations: Generations,
}

impl Leftovers {
    /// Before the tree under `root` is dumped into `images`.
    pub fn before(root: HostPid, images: &Path) -> Self {
        Leftovers {
            root,
            was_tracked: track::may_be_tracked(root),
            generations: Generations::begin(images),
        }
    }

    /// The dump has failed, or whoever made it was killed: removes its rounds, and the keeper, unless whole images
    /// build on them. Says whether it did.
    pub fn remove(&self) -> bool {
        if self.generations.are_used() {
            return false;
        }
        self.generations.remove();
        self.end_tracking();
        true
    }

    /// Ends the keeper, unless there was one before.
    pub(crate) fn end_tracking(&self) {
        if !self.was_tracked
            && let Err(error) = track::stop(self.root)
        {
            tracing::warn!(%error, "the tree is tracked still");
        }
    }
}
