//! Mounts that come from outside the tree: what options name, and what the caller has mounted, too.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use floe_image::messages::MntEntry;
use floe_kernel::namespace::NsKind;
use floe_kernel::proc::Mount;
use floe_options::{External, MountOptions};

use super::model::{AUTODETECTED, PLAIN_DEVICES, below, kernel_device};
use super::uncover::{mount_id, open_mount};
use crate::collect::{CollectError, Collector};
use crate::namespace::TreeNamespace;

/// What is mounted outside of a tree.
pub struct Outside<'m> {
    own: &'m [Mount],
    /// Those that names lead to, of a tree whose root is among them: what a task that has left them shows of their
    /// file systems is the caller's there, too, and comes from its place again.
    callers: Option<Vec<&'m Mount>>,
}

impl<'m> Outside<'m> {
    /// Around a tree, whose dumping process has the mounts `own`.
    pub fn of_tree(own: &'m [Mount], collector: &Collector<'_>) -> Outside<'m> {
        let root_is_there = collector.namespaces().of_root(NsKind::Mnt).is_none();
        let visible = || own.iter().filter(|mount| is_visible(mount)).collect();
        let callers = root_is_there.then(visible);
        Outside { own, callers }
    }

    /// Whether a file system is mounted there.
    pub fn has_device(&self, device: u32) -> bool {
        self.own.iter().any(|own| device_of(own) == device)
    }

    /// Marks a mount that comes from outside; whether it does.
    pub fn find(
        &self,
        entry: &mut MntEntry,
        namespace: &TreeNamespace,
        collector: &Collector<'_>,
    ) -> bool {
        let (mounts, external) = (&collector.options.mounts, &collector.options.external);
        let may_be_named = namespace.of_root || self.callers.is_some();
        if may_be_named && let Some(name) = external_value(&entry.mountpoint, mounts, external) {
            entry.ext_key = Some(name.to_string());
            return true;
        }
        let of_caller = self.callers.iter().flatten().copied();
        if entry.deleted != Some(true)
            && let Some(found) = best_match(entry, of_caller)
        {
            mark(entry, found);
            return true;
        }
        // Engines give containers with users of their own the host's devices, and do not say so.
        if may_be_named && is_plain_device(entry) {
            entry.ext_key = Some(entry.mountpoint.clone());
            return true;
        }
        self.callers.is_none() && find_by_itself(entry, self.own, collector)
    }

    /// Leaves out what is hidden by other mounts, in a namespace of the tree as at the caller's: nobody sees it,
    /// and no name leads to the caller's. An automounter's point is, once its file system is mounted on it.
    pub fn leave_out_hidden(
        &self,
        mounts: &mut Vec<Mount>,
        namespace: &TreeNamespace,
        collector: &Collector<'_>,
    ) -> Result<(), CollectError> {
        let Some(callers) = &self.callers else {
            return Ok(());
        };
        let visit = collector.namespaces().visit(&[namespace])?;
        let seen: BTreeSet<i32> = mounts
            .iter()
            .filter(|mount| is_visible(mount))
            .map(|mount| mount.id)
            .collect();
        drop(visit);
        let is_hidden = |mount: &Mount| {
            let device = device_of(mount);
            !seen.contains(&mount.id)
                && self.has_device(device)
                && !callers.iter().any(|own| device_of(own) == device)
        };
        // What is mounted on it takes its place.
        let can_go = |mount: &Mount, all: &[Mount]| {
            let mut above = all.iter().filter(|above| above.parent == mount.id);
            is_hidden(mount) && above.all(|above| above.point == mount.point)
        };
        while let Some(index) = mounts.iter().position(|mount| can_go(mount, mounts)) {
            let gone = mounts.remove(index);
            tracing::warn!(
                "the mount {} ({}) below another one is left out",
                String::from_utf8_lossy(&gone.point),
                String::from_utf8_lossy(&gone.fs_type)
            );
            for above in mounts.iter_mut().filter(|mount| mount.parent == gone.id) {
                above.parent = gone.parent;
            }
        }
        Ok(())
    }
}

/// The value of `--external mnt[KEY]:VALUE` or `--ext-mount-map KEY:VALUE`.
pub fn external_value<'o>(
    key: &str,
    options: &'o MountOptions,
    external: &'o [External],
) -> Option<&'o str> {
    let mapped = options.ext_mount_map.iter().find(|map| map.key == key);
    let named = external.iter().find_map(|external| match external {
        External::Mount { key: name, value } if name == key => Some(value.as_str()),
        _ => None,
    });
    named.or_else(|| mapped.map(|map| map.value.as_str()))
}

/// As `--external mnt[]` asks for.
fn find_by_itself(entry: &mut MntEntry, own: &[Mount], collector: &Collector<'_>) -> bool {
    let mounts = &collector.options.mounts;
    let (mut auto, mut masters, mut sharing) = (
        mounts.ext_mount_auto,
        mounts.external_masters,
        mounts.external_sharing,
    );
    for external in &collector.options.external {
        if let External::MountAuto {
            masters: m,
            sharing: s,
        } = external
        {
            auto = true;
            masters |= m;
            sharing |= s;
        }
    }
    if !auto || entry.mountpoint == "/" {
        return false;
    }
    let Some(found) = best_match(entry, own.iter()) else {
        return false;
    };
    let (shared, master) = (entry.shared_id.unwrap_or(0), entry.master_id.unwrap_or(0));
    let outside = (found.shared.unwrap_or(0), found.master.unwrap_or(0));
    if shared != 0 && !sharing {
        return false;
    }
    if master != 0 && (!masters || (master != outside.0 && master != outside.1)) {
        return false;
    }
    mark(entry, found);
    true
}

/// Notes which mount of ours an entry is a copy of.
fn mark(entry: &mut MntEntry, found: &Mount) {
    let shared = entry.shared_id.unwrap_or(0);
    if shared != 0 && shared != found.shared.unwrap_or(0) {
        entry.internal_sharing = Some(true);
    }
    let inner = below(&entry.root, &String::from_utf8_lossy(&found.root)).unwrap_or("");
    let point = String::from_utf8_lossy(&found.point);
    entry.source = match inner {
        "" => point.into_owned(),
        inner => format!("{}/{inner}", point.trim_end_matches('/')),
    };
    entry.ext_key = Some(AUTODETECTED.to_string());
}

/// Whether a device that every system has is mounted at its own name.
fn is_plain_device(entry: &MntEntry) -> bool {
    let name = entry.mountpoint.strip_prefix("/dev");
    PLAIN_DEVICES.contains(&entry.mountpoint.as_str()) && name == Some(entry.root.as_str())
}

/// Our mount that an external one is a copy of: if possible the one that it shares with, or at the same place.
fn best_match<'m>(
    entry: &MntEntry,
    own: impl DoubleEndedIterator<Item = &'m Mount>,
) -> Option<&'m Mount> {
    let candidates: Vec<&Mount> = own.filter(|mount| shows(mount, entry)).collect();
    let groups = [entry.shared_id, entry.master_id];
    let shares = |mount: &&&Mount| {
        let group = mount.shared.filter(|group| *group != 0);
        group.is_some() && groups.contains(&group)
    };
    let is_there = |mount: &&&Mount| mount.point == entry.mountpoint.as_bytes();
    let all = || candidates.iter();
    let found = all().find(shares).or_else(|| all().rfind(is_there));
    found.or(candidates.last()).copied()
}

/// Whether a mount of ours has all that another one shows.
fn shows(mount: &Mount, entry: &MntEntry) -> bool {
    device_of(mount) == entry.root_dev
        && below(&entry.root, &String::from_utf8_lossy(&mount.root)).is_some()
}

fn device_of(mount: &Mount) -> u32 {
    kernel_device(mount.dev_major, mount.dev_minor)
}

/// Whether the name of its point leads to a mount of ours.
fn is_visible(mount: &Mount) -> bool {
    let point = std::str::from_utf8(&mount.point).ok();
    let seen = point.and_then(|point| open_mount(point).ok());
    seen.is_some_and(|seen| mount_id(seen.as_fd()) == Ok(mount.id as u64))
}
