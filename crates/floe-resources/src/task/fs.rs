//! Working directory, root directory and umask.
//!
//! Saved:    both directories as regular file entries, the umask (`/proc/<pid>/status`).
//! Rebuilt:  set by the task. Needs: the directories.
//! Not kept: nothing.

use floe_image::messages::FsEntry;
use floe_kernel::proc::{ProcDir, Status};
use rustix::fs::OFlags;

use crate::collect::{CollectError, Collector, PathFile};

/// Collects them of a stopped task.
pub fn collect_fs(
    proc: &ProcDir,
    status: &Status,
    collector: &mut Collector<'_>,
) -> Result<FsEntry, CollectError> {
    let mut directory = |name, role| {
        let file = PathFile::new(proc.pid(), role, proc.open_file(name, OFlags::PATH)?)?;
        file.collect(collector)
    };
    let cwd = directory("cwd", "the working directory")?;
    let root = directory("root", "the root directory")?;
    Ok(FsEntry {
        cwd_id: cwd.0,
        root_id: root.0,
        umask: status.umask,
    })
}
