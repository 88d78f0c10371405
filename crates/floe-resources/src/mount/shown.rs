//! Which pid namespace a `proc` shows: that of the task that mounted it, which no list of mounts tells.
//!
//! Its process 1 is in that namespace, whoever looks; and who is not seen from there finds no `self`.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};

use floe_image::messages::{Fstype, MntEntry, RegFileEntry};
use floe_kernel::namespace::{NsIdentity, NsKind};
use floe_plan::Handle;
use rustix::fs::AtFlags;

use super::collect::Typed;
use super::model::{below, kernel_device};
use super::plan::find_mount;
use super::tree::{MountTree, Origin, image_name};
use super::uncover::pristine;
use crate::collect::{CollectError, Collector, Obstacle};
use crate::namespace::{TreeNamespace, nested};
use crate::restore::{PlanError, TreeImages};

/// Stands for a namespace around that of the tree.
const OUTSIDE: u32 = 0;

/// What each `proc` shows, by device, as its entries have it.
#[derive(Default)]
struct Shown(HashMap<u32, Option<u32>>);

/// Completes the entries of every `proc` in a namespace whose mounts are `all`.
pub fn note(
    entries: &mut [MntEntry],
    (all, namespace): (&[MntEntry], &TreeNamespace),
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let is_proc = |entry: &&mut MntEntry| entry.fstype() == Some(Fstype::Proc);
    for entry in entries.iter().filter(|entry| entry.root == "/") {
        let known = collector.cache(Shown::default);
        if entry.fstype() != Some(Fstype::Proc)
            || entry.ext_key.is_some()
            || known.0.contains_key(&entry.root_dev)
        {
            continue;
        }
        let found = find(entry, (all, namespace), collector);
        if let Some(found) = collector.note(found)? {
            let known = collector.cache(Shown::default);
            known.0.insert(entry.root_dev, found);
        }
    }
    let known = collector.cache(Shown::default);
    for entry in entries.iter_mut().filter(is_proc) {
        entry.floe_pid_ns = known.0.get(&entry.root_dev).copied().flatten();
    }
    Ok(())
}

/// What an entry says of its `proc`; `None` where it shows the namespace of the root task.
fn find(
    entry: &MntEntry,
    (all, namespace): (&[MntEntry], &TreeNamespace),
    collector: &Collector<'_>,
) -> Result<Option<u32>, CollectError> {
    let namespaces = collector.namespaces();
    let home = namespaces.home().proc();
    let copy;
    let proc = match is_of_device(home, entry.root_dev) {
        true => home,
        // In place, or what hides it would be seen.
        false => {
            copy = pristine(entry, all, namespace, collector)?;
            copy.as_fd()
        }
    };
    let first = of_first(proc);
    if first.is_some() && first == namespaces.root_identity(NsKind::Pid) {
        return Ok(None);
    }
    let known = first.and_then(|first| namespaces.find(NsKind::Pid, first));
    if let Some(known) = known {
        return Ok(Some(known.id));
    }
    if rustix::fs::readlinkat(proc, "self", Vec::new()).is_ok() {
        return Ok(Some(OUTSIDE));
    }
    Err(CollectError::Unsupported(Obstacle {
        pid: namespace.member,
        object: format!(
            "the mount {} (proc, of a pid namespace that is not the tree's)",
            entry.mountpoint
        ),
        remedy: "unmount it, or dump a tree that has the first process of that namespace".into(),
    }))
}

fn is_of_device(file: BorrowedFd<'_>, device: u32) -> bool {
    let numbers = |dev| kernel_device(rustix::fs::major(dev), rustix::fs::minor(dev));
    rustix::fs::fstat(file).is_ok_and(|stat| numbers(stat.st_dev) == device)
}

/// The namespace of process 1.
fn of_first(proc: BorrowedFd<'_>) -> Option<NsIdentity> {
    let stat = rustix::fs::statat(proc, "1/ns/pid", AtFlags::empty()).ok()?;
    Some(NsIdentity {
        device: stat.st_dev,
        inode: stat.st_ino,
    })
}

/// Whether a `proc` shows a namespace of the tree's own; `own` is whether that of the root task is one.
pub fn is_of_tree(entry: &MntEntry, own: bool) -> bool {
    entry.floe_pid_ns.map_or(own, |shown| shown != OUTSIDE)
}

/// The namespace below the root's that a `proc` shows.
pub fn below_root(entry: &MntEntry) -> Option<u32> {
    entry.floe_pid_ns.filter(|shown| *shown != OUTSIDE)
}

/// A process as the names in a `proc` have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamedProcess {
    /// Its number in the namespace that the `proc` shows.
    pub pid: u32,
    /// That namespace, where it is one below the root's.
    pub namespace: Option<u32>,
}

impl NamedProcess {
    /// The process that has a file of this name, on a mount as this entry says.
    pub fn of(entry: Option<&MntEntry>, name: &str) -> Option<NamedProcess> {
        let rest = match entry {
            None => name.strip_prefix("/proc/")?,
            Some(proc) if proc.fstype() == Some(Fstype::Proc) && proc.root == "/" => {
                below(name, &proc.mountpoint)?
            }
            Some(_) => return None,
        };
        Some(NamedProcess {
            pid: rest.split('/').next()?.parse().ok()?,
            namespace: entry.and_then(below_root),
        })
    }

    /// As [`NamedProcess::of`], of a file of the images.
    pub fn of_file(images: &TreeImages, file: &RegFileEntry) -> Option<NamedProcess> {
        let mount = file.mnt_id.and_then(|number| find_mount(images, number));
        Self::of(mount.map(|(_, entry)| entry), &file.name)
    }
}

/// What must exist before every `proc` of the tree can be mounted.
pub fn needs(images: &TreeImages, tree: &MountTree) -> Result<Vec<Handle>, PlanError> {
    let mut needs = Vec::new();
    for mount in &tree.mounts {
        let Origin::New(fs) = &tree.sources[mount.source].origin else {
            continue;
        };
        if let Some(shown) = below_root(&fs.entry) {
            let begun = nested::begun(images, shown).ok_or_else(|| {
                let what = format!("pid namespace {shown}, which {} shows", fs.entry.mountpoint);
                PlanError::damaged(image_name(mount.namespace), what)
            })?;
            needs.push(begun);
        }
    }
    needs.sort();
    needs.dedup();
    Ok(needs)
}

/// The task that mounts a file system which shows the namespaces of whoever does.
pub fn mounter(images: &TreeImages, entry: &MntEntry) -> u32 {
    let first = below_root(entry).and_then(|shown| images.nested.first_of(shown));
    first.unwrap_or(images.root().pid())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proc(point: &str, root: &str, shown: Option<u32>) -> MntEntry {
        MntEntry {
            fstype: Fstype::Proc as u32,
            mountpoint: point.into(),
            root: root.into(),
            floe_pid_ns: shown,
            ..MntEntry::default()
        }
    }

    #[test]
    fn names_are_of_the_process_that_their_proc_shows() {
        let named = |entry: Option<&MntEntry>, name| {
            NamedProcess::of(entry, name).map(|process| (process.pid, process.namespace))
        };
        let (own, inner) = (proc("/proc", "/", None), proc("/mnt/p", "/", Some(12)));
        assert_eq!(named(None, "/proc/7/status"), Some((7, None)));
        assert_eq!(named(Some(&own), "/proc/7"), Some((7, None)));
        assert_eq!(named(Some(&inner), "/mnt/p/7/fd"), Some((7, Some(12))));
        assert_eq!(named(Some(&inner), "/proc/7/fd"), None);
        assert_eq!(named(Some(&own), "/proc/sys"), None);
        assert_eq!(named(Some(&proc("/proc/7", "/7", None)), "/proc/7"), None);
        let memory = MntEntry {
            fstype: Fstype::Tmpfs as u32,
            ..proc("/proc/7", "/", None)
        };
        assert_eq!(named(Some(&memory), "/proc/7/8"), None);
    }

    #[test]
    fn only_what_shows_the_tree_waits_for_its_tasks() {
        let is_of_tree = |shown, own| is_of_tree(&proc("/proc", "/", shown), own);
        assert!(is_of_tree(None, true) && is_of_tree(Some(12), false));
        assert!(!is_of_tree(None, false) && !is_of_tree(Some(OUTSIDE), true));
    }
}
