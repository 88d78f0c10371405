//! Memory of tasks: which pages to save, and moving them in bulk.
//!
//! Pages flow from a [`PageSource`] to a [`PageSink`] through [`PagePump`], which knows neither tasks
//! nor image files; [`PagemapBuilder`] keeps the index of what was sent.
#![forbid(unsafe_code)]

mod copy_out;
mod dedup;
mod index;
mod pump;
mod resolve;
mod runs;
mod select;
mod source;
mod tracker;

pub use copy_out::{CopyOutError, copy_segment};
pub use dedup::{DedupError, punch_chain, punch_replaced};
pub use index::{PagemapBuilder, PagemapStats, PresentPages};
pub use pump::{Copied, CopyError, PagePump, PageSink, PageStore};
pub use resolve::{IndexError, PageIndex, StoredRun};
pub use runs::{difference, intersection, normalised, page_count, push_run};
pub use select::{PageRun, PageScanner, ScanError, Selection, data_runs};
pub use source::{FilePages, ForcedTaskPages, LivePages, PageSource, TaskPages};
pub use tracker::{
    Area, ContentTracker, DirtyTracker, MappedPages, Maps, NoTracker, SoftDirtyTracker, TrackError,
    TrackerKind, UffdTracker,
};
