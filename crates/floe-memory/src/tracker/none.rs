//! No tracking: every page counts as changed.

use super::{Area, DirtyTracker, TrackError, TrackerKind};
use crate::select::PageRun;

/// Finds everything changed.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTracker;

impl DirtyTracker for NoTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::None
    }

    fn arm(&mut self, _areas: &[Area]) -> Result<(), TrackError> {
        Ok(())
    }

    fn arm_fresh(&mut self) -> Result<(), TrackError> {
        Ok(())
    }

    fn survey(&mut self, _areas: &[Area]) -> Result<(), TrackError> {
        Ok(())
    }

    fn unchanged(
        &mut self,
        _area: &Area,
        _present: &[PageRun],
    ) -> Result<Vec<PageRun>, TrackError> {
        Ok(Vec::new())
    }
}
