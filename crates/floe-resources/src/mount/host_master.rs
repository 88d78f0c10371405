//! Which mount of the caller's a slave in the tree received from.
//!
//! A part of a file system may be mounted onto itself, with a sharing group of its own: what the file system's
//! root is mounted by does not have that group then. `ip netns` does so with its directory of names.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use floe_kernel::proc::{Mount, parse_mountinfo};

use super::groups::Group;
use super::tree::MountTree;
use super::uncover::{mount_id, open_mount};

/// The caller's mounts.
pub struct HostMounts(Vec<Mount>);

impl HostMounts {
    /// Those of this thread's namespace; none where they cannot be read.
    pub fn read() -> Self {
        let text = std::fs::read("/proc/thread-self/mountinfo").unwrap_or_default();
        HostMounts(parse_mountinfo(&text).unwrap_or_default())
    }

    /// What the carrier of a group that receives from the caller is a copy of: what is mounted at `path` where that is
    /// in a group, or the mount of the caller's that shows the same as one of the members. `None` if none is in a group.
    pub fn master_of(&self, group: &Group, tree: &MountTree, path: &Path) -> Option<PathBuf> {
        let source = self.mounted_at(path).filter(|source| !is_in_group(source));
        let Some(source) = source else {
            return Some(path.to_path_buf());
        };
        let entries = || {
            group
                .members
                .iter()
                .map(|member| &tree.mounts[*member].entry)
        };
        let shows = |mount: &&Mount| {
            let same_device =
                (mount.dev_major, mount.dev_minor) == (source.dev_major, source.dev_minor);
            let same_root = |root: &str| root.as_bytes() == mount.root;
            is_in_group(mount) && same_device && entries().all(|entry| same_root(&entry.root))
        };
        let candidates: Vec<&Mount> = self.0.iter().filter(shows).collect();
        let is_there =
            |mount: &&&Mount| entries().any(|entry| entry.mountpoint.as_bytes() == mount.point);
        let found = candidates.iter().rfind(is_there).or(candidates.last())?;
        Some(PathBuf::from(OsStr::from_bytes(&found.point)))
    }

    fn mounted_at(&self, path: &Path) -> Option<&Mount> {
        let id = mount_id(open_mount(path.to_str()?).ok()?.as_fd()).ok()?;
        self.0
            .iter()
            .find(|mount| u64::try_from(mount.id) == Ok(id))
    }
}

fn is_in_group(mount: &Mount) -> bool {
    mount.shared.is_some() || mount.master.is_some()
}
