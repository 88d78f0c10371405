//! Files in memory that a dump will copy while the tree stands still, looked for while it runs.
//!
//! What is mounted in the mount namespace of the caller, too, is not the tree's own: it goes along all the same,
//! as with CRIU, unless it is declared to come from outside.

use std::collections::BTreeSet;

use floe_kernel::ids::HostPid;
use floe_kernel::proc::{Mount, ProcDir, ProcError, parse_mountinfo};
use floe_options::{DumpOptions, External};
use rustix::fs::{OFlags, fstat, fstatfs, makedev};

use super::external::external_value;

/// A file system in memory, in the mount namespace of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InMemory {
    /// Where it is mounted.
    pub point: String,
    /// What its files take.
    pub bytes: u64,
    /// Whether our mount namespace has it, too.
    pub is_callers: bool,
}

/// Those that a dump of these tasks copies, the root task being the first. One that cannot be seen is left out.
pub fn in_memory(tasks: &[ProcDir], options: &DumpOptions) -> Vec<InMemory> {
    let own = ProcDir::open(HostPid(std::process::id().cast_signed()));
    let Ok((own, own_mounts)) = own.and_then(|own| Ok((place(&own)?, mounts(&own)?))) else {
        return Vec::new();
    };
    let devices: BTreeSet<(u32, u32)> = own_mounts.iter().map(device).collect();
    let mut places = BTreeSet::from([own]);
    let root_is_at_home = tasks.first().and_then(|root| place(root).ok()) == Some(own);
    let (mut seen, mut found) = (BTreeSet::new(), Vec::new());
    for (index, task) in tasks.iter().enumerate() {
        if !place(task).is_ok_and(|place| places.insert(place)) {
            continue;
        }
        for mount in mounts(task).unwrap_or_default() {
            if mount.fs_type != b"tmpfs" || mount.root != b"/" || !seen.insert(device(&mount)) {
                continue;
            }
            let is_callers = devices.contains(&device(&mount));
            let point = String::from_utf8_lossy(&mount.point).into_owned();
            let is_given = is_callers && root_is_at_home;
            if is_given || comes_from_outside(&point, (index == 0, is_callers), options) {
                continue;
            }
            found.extend(used(task, &mount).map(|bytes| InMemory {
                point,
                bytes,
                is_callers,
            }));
        }
    }
    found
}

fn place(task: &ProcDir) -> Result<u64, ProcError> {
    Ok(task.stat("ns/mnt")?.st_ino)
}

fn mounts(task: &ProcDir) -> Result<Vec<Mount>, ProcError> {
    parse_mountinfo(&task.read("mountinfo")?).map_err(|error| task.bad(error))
}

fn device(mount: &Mount) -> (u32, u32) {
    (mount.dev_major, mount.dev_minor)
}

/// Whether it is not saved: the options name it, or have those of ours found.
fn comes_from_outside(
    point: &str,
    (of_root, is_callers): (bool, bool),
    options: &DumpOptions,
) -> bool {
    let (mounts, external) = (&options.mounts, &options.external);
    let auto = || {
        let all = external.iter();
        mounts.ext_mount_auto
            || all
                .into_iter()
                .any(|one| matches!(one, External::MountAuto { .. }))
    };
    point == "/"
        || (of_root && external_value(point, mounts, external).is_some())
        || mounts
            .skip
            .iter()
            .any(|skipped| skipped.as_os_str() == point)
        || (is_callers && auto())
}

/// What its files take, where it is not hidden below another mount.
fn used(task: &ProcDir, mount: &Mount) -> Option<u64> {
    let point = std::str::from_utf8(&mount.point).ok()?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let opened = task.open_file(&format!("root{point}"), flags).ok()?;
    if fstat(&opened).ok()?.st_dev != makedev(mount.dev_major, mount.dev_minor) {
        return None;
    }
    let stat = fstatfs(&opened).ok()?;
    let blocks = stat.f_blocks.saturating_sub(stat.f_bfree);
    Some(blocks.saturating_mul(u64::try_from(stat.f_bsize).ok()?))
}
