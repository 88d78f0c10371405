//! Which network a `sysfs` shows, and which IPC namespace an `mqueue`: those of the task that mounted it, which no
//! list of mounts tells.
//!
//! Such a file system is there once for each namespace, so who mounts it again there finds the same device.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::rc::Rc;

use floe_image::messages::MntEntry;
use floe_kernel::mount::new_mount;
use floe_kernel::namespace::{Namespace, NsKind};

use super::execute::Places;
use super::model::kernel_device;
use crate::collect::{CollectError, Collector};
use crate::namespace::TreeNamespace;

/// Stands for the namespace of the dumping process, where the root task has one of its own.
const OUTSIDE: u32 = 0;

/// The kind of namespace that a file system of this name shows.
fn kind_of(name: &str) -> Option<NsKind> {
    match name {
        "sysfs" => Some(NsKind::Net),
        "mqueue" => Some(NsKind::Ipc),
        _ => None,
    }
}

/// What is shown on a device; `None` for the namespace of the root task.
#[derive(Default)]
struct Devices(BTreeMap<NsKind, BTreeMap<u32, Option<u32>>>);

/// Completes the entries of a mount namespace.
pub fn note(entries: &mut [MntEntry], collector: &mut Collector<'_>) -> Result<(), CollectError> {
    for entry in entries.iter_mut().filter(|entry| entry.ext_key.is_none()) {
        let Some(name) = super::fs_name(entry) else {
            continue;
        };
        if let Some(kind) = kind_of(&name) {
            let devices = collector.try_cache(|_| Ok(Devices::default()))?;
            if !devices.0.contains_key(&kind) {
                let found = devices_of(kind, &name, collector)?;
                collector.cache(Devices::default).0.insert(kind, found);
            }
            let devices = &collector.cache(Devices::default).0[&kind];
            entry.floe_shown_ns = devices.get(&entry.root_dev).copied().flatten();
        }
    }
    Ok(())
}

/// The devices of such a file system in all namespaces of the tree and in ours; none where there is nothing to
/// be told apart.
fn devices_of(
    kind: NsKind,
    name: &str,
    collector: &Collector<'_>,
) -> Result<BTreeMap<u32, Option<u32>>, CollectError> {
    let all = collector.namespaces().all().iter();
    let of_kind: Vec<&Rc<TreeNamespace>> = all.filter(|known| known.kind() == kind).collect();
    let mut devices = BTreeMap::new();
    if of_kind.is_empty() {
        return Ok(devices);
    }
    let root_is_at_home = collector.namespaces().of_root(kind).is_none();
    let outside = (!root_is_at_home).then_some(OUTSIDE);
    devices.extend(device_of(name).map(|device| (device, outside)));
    for known in of_kind {
        let _visit = collector.namespaces().visit(&[known])?;
        let shown = (!known.of_root).then_some(known.id);
        devices.extend(device_of(name).map(|device| (device, shown)));
    }
    Ok(devices)
}

/// The device of what the calling thread would mount; `None` where it may not.
fn device_of(name: &str) -> Option<u32> {
    let mounted = new_mount(name, &[]).ok()?;
    let device = rustix::fs::fstat(mounted.as_fd()).ok()?.st_dev;
    Some(kernel_device(
        rustix::fs::major(device),
        rustix::fs::minor(device),
    ))
}

/// The namespace of the tree that a file system shows, where the images say so.
pub fn needed(entry: &MntEntry) -> Option<u32> {
    entry.floe_shown_ns.filter(|shown| *shown != OUTSIDE)
}

/// From which namespaces a file system is mounted, where that is not from the root's.
pub fn other_place(entry: &MntEntry, places: &Places) -> Option<Vec<Rc<Namespace>>> {
    entry.floe_shown_ns?;
    let shown = needed(entry).and_then(|id| places.others.get(&id));
    let kind = super::fs_name(entry).and_then(|name| kind_of(&name));
    let shown = shown.filter(|shown| Some(shown.kind()) == kind);
    Some(shown.cloned().into_iter().collect())
}
