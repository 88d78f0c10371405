//! Saving the mounts of a namespace.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::rc::Rc;

use floe_image::ImageKind;
use floe_image::messages::{Fstype, MntEntry};
use floe_kernel::ids::HostPid;
use floe_kernel::namespace::NsKind;
use floe_kernel::proc::{Mount, parse_mountinfo};
use floe_options::External;
use rustix::fs::{Dir, Mode, OFlags};
use rustix::io::Errno;

use super::content;
use super::external::Outside;
use super::formats;
use super::groups::plan_groups;
use super::model::{Content, EXTERNAL_DEVICE, FsKind, entry_of, kernel_device, shows_most};
use super::overlay;
use super::overlay_layers;
use super::owner;
use super::seen;
use super::shown;
use super::tree::{Request, plan_tree};
use super::uncover::pristine;
use crate::collect::{CollectError, Collector, Obstacle};
use crate::namespace::TreeNamespace;
use crate::restore::PlanError;

/// The mounts of the tree's namespaces.
#[derive(Default)]
pub struct KnownMounts {
    namespaces: BTreeMap<u32, Vec<MntEntry>>,
    /// The namespace of a mount.
    places: HashMap<u32, u32>,
    /// Devices of file systems whose content is saved, or need not be.
    saved: BTreeSet<u32>,
}

impl KnownMounts {
    /// The namespace that a mount is in.
    pub fn place_of(&self, mount: u32) -> Option<u32> {
        self.places.get(&mount).copied()
    }

    /// The mount of this number.
    pub fn find(&self, mount: u32) -> Option<&MntEntry> {
        let mut all = self.namespaces.values().flatten();
        all.find(|entry| entry.mnt_id == mount)
    }

    /// The mounts of a file system, each with its namespace; `device` as the kernel keeps it.
    pub fn of_device(&self, device: u32) -> impl Iterator<Item = (u32, &MntEntry)> {
        let all = self.namespaces.iter();
        let all = all.flat_map(|(id, entries)| entries.iter().map(|entry| (*id, entry)));
        all.filter(move |(_, entry)| entry.root_dev == device)
    }

    /// Whether the tree has mount namespaces of its own.
    pub fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
    }
}

/// Writes the mounts of a namespace, and the content of the file systems that only it has.
pub fn collect(
    namespace: &TreeNamespace,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let own = own_mounts(collector)?;
    let mut mounts = read_mounts(namespace, collector)?;
    let outside = Outside::of_tree(&own, collector);
    outside.leave_out_hidden(&mut mounts, namespace, collector)?;
    let mut entries = Vec::with_capacity(mounts.len());
    let of_root = collector.namespaces().of_root(NsKind::Mnt).map(|ns| ns.id);
    let known = &collector.cache(KnownMounts::default).namespaces;
    let of_root = of_root.and_then(|id| known.get(&id)).into_iter().flatten();
    let there: BTreeSet<u32> = of_root.map(|entry| entry.root_dev).collect();
    for mount in &mounts {
        // What the root's namespace has mounted too is copied from there.
        if let Ok(entry) = entry_of(mount)
            && there.contains(&entry.root_dev)
        {
            entries.push(entry);
            continue;
        }
        let entry = describe(mount, namespace, &outside, collector);
        entries.extend(collector.note(entry)?);
    }
    if namespace.of_root && collector.options.mounts.root.is_none() {
        note_own_root(&mut entries, &outside);
    }
    let all: Vec<MntEntry> = mounts.iter().flat_map(entry_of).collect();
    shown::note(&mut entries, (&all, namespace), collector)?;
    seen::note(&mut entries, collector)?;
    owner::note(&mut entries, namespace, collector)?;
    // What is refused already would only be missed by others.
    let all_are_known = entries.len() == mounts.len();
    if all_are_known && collector.cache(KnownMounts::default).is_empty() {
        let pid = namespace.member;
        collector.defer(move |collector| check_whole(pid, collector));
    }
    skip(&mut entries, collector);
    let known = collector.cache(KnownMounts::default);
    known
        .places
        .extend(entries.iter().map(|entry| (entry.mnt_id, namespace.id)));
    known.namespaces.insert(namespace.id, entries.clone());
    for entry in given_content(&entries, namespace.of_root) {
        collector.cache(KnownMounts::default).saved.insert(entry);
    }
    // Files may still get names until all tasks and all that they defer are collected.
    let (id, all) = (namespace.id, entries.clone());
    collector.defer(move |collector| {
        collector.defer(move |collector| save_contents(id, &all, collector));
        Ok(())
    });
    // Last mounted first, as others write and read them.
    let stream = collector.side(ImageKind::Mnts, u64::from(namespace.id))?;
    for entry in entries.iter().rev() {
        stream.append(entry)?;
    }
    Ok(())
}

/// A sandbox may have made its root in memory: nobody could supply that at the restore.
fn note_own_root(entries: &mut [MntEntry], outside: &Outside<'_>) {
    let ids: BTreeSet<u32> = entries.iter().map(|entry| entry.mnt_id).collect();
    let root = entries
        .iter_mut()
        .find(|entry| !ids.contains(&entry.parent_mnt_id));
    if let Some(root) = root.filter(|root| !outside.has_device(root.root_dev)) {
        let kind = FsKind::of_entry(root);
        let is_in_memory = kind.is_some_and(|kind| kind.content == Content::Files);
        root.floe_own_root = is_in_memory.then_some(true);
    }
}

/// Our own mounts, as they are when the dump begins.
struct OwnMounts(Rc<Vec<Mount>>);

pub(crate) fn own_mounts(collector: &mut Collector<'_>) -> Result<Rc<Vec<Mount>>, CollectError> {
    let own = collector
        .try_cache(|collector| Ok(OwnMounts(Rc::new(mountinfo_of_this_thread(collector)?))))?;
    Ok(Rc::clone(&own.0))
}

pub(super) fn mountinfo_of_this_thread(
    collector: &Collector<'_>,
) -> Result<Vec<Mount>, CollectError> {
    let system = |source| CollectError::System {
        action: "Reading the list of mounts".to_string(),
        source,
    };
    let home = collector.namespaces().home();
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(home.proc(), "thread-self/mountinfo", flags, Mode::empty())
        .map_err(|errno| system(errno.into()))?;
    let mut text = Vec::new();
    std::fs::File::from(opened)
        .read_to_end(&mut text)
        .map_err(system)?;
    parse_mountinfo(&text)
        .map_err(|error| system(std::io::Error::new(std::io::ErrorKind::InvalidData, error)))
}

fn read_mounts(
    namespace: &TreeNamespace,
    collector: &Collector<'_>,
) -> Result<Vec<Mount>, CollectError> {
    let _visit = collector.namespaces().visit(&[namespace])?;
    mountinfo_of_this_thread(collector)
}

/// The entry of a mount; `Unsupported` where it cannot be mounted again.
fn describe(
    mount: &Mount,
    namespace: &TreeNamespace,
    outside: &Outside<'_>,
    collector: &Collector<'_>,
) -> Result<MntEntry, CollectError> {
    let point = String::from_utf8_lossy(&mount.point).into_owned();
    let fs_type = String::from_utf8_lossy(&mount.fs_type).into_owned();
    let refuse = |what: &str, remedy: String| {
        Err(CollectError::Unsupported(Obstacle {
            pid: namespace.member,
            object: format!("the mount {point} ({fs_type}{what})"),
            remedy,
        }))
    };
    let mut entry = match entry_of(mount) {
        Ok(entry) => entry,
        Err(what) => return refuse("", format!("mount it elsewhere: {what} is not UTF-8")),
    };
    if mount
        .options
        .split(|b| *b == b',')
        .any(|word| word == b"idmapped")
    {
        return refuse(
            ", with mapped ids",
            "unmount it: its mapping cannot be read".into(),
        );
    }
    if outside.find(&mut entry, namespace, collector)
        || (entry.mountpoint == "/" && namespace.of_root)
    {
        return Ok(entry);
    }
    match entry.fstype() {
        Some(Fstype::Unsupported) if fs_type == "autofs" => {
            return refuse(
                "",
                "unmount it: automounters cannot be moved, stop this one".into(),
            );
        }
        Some(Fstype::Unsupported) if is_enabled(&fs_type, collector) => {
            entry.fstype = Fstype::Auto as u32;
            entry.fsname = Some(fs_type);
        }
        Some(Fstype::Unsupported) if is_device(mount, collector).is_some() => {
            let name = is_device(mount, collector).unwrap_or_default();
            entry.fstype = Fstype::Auto as u32;
            entry.fsname = Some(fs_type);
            entry.ext_key = Some(EXTERNAL_DEVICE.to_string());
            entry.source = format!("dev[{name}]");
        }
        Some(Fstype::Unsupported) if entry.root == "/" => {
            let remedy = format!("use --external mnt[{point}]:NAME, and supply it at the restore");
            return refuse(", which cannot be mounted anew", remedy);
        }
        Some(Fstype::Overlayfs) => {
            if let Some(layer) = find_layers(&mut entry, namespace, collector)? {
                let remedy = format!(
                    "bring {layer} back, or use --external mnt[{point}]:NAME and supply it at the restore"
                );
                return refuse(", one of whose layers is not at its old place", remedy);
            }
        }
        Some(Fstype::Devpts) if !outside.has_device(entry.root_dev) => {
            add_option(&mut entry, "newinstance")
        }
        _ => {}
    }
    Ok(entry)
}

/// Looks for the directories of an overlay, of which the kernel tells the first names only, and puts the names
/// that they have now into the options. Returns one that the tree does not find.
fn find_layers(
    entry: &mut MntEntry,
    namespace: &TreeNamespace,
    collector: &Collector<'_>,
) -> Result<Option<String>, CollectError> {
    let _visit = collector.namespaces().visit(&[namespace])?;
    let is_there = |layer: &str| layer.starts_with('/') && Path::new(layer).is_dir();
    let mut layers = overlay::directories(&entry.options).into_iter();
    let Some(missing) = layers.find(|layer| !is_there(layer)) else {
        return Ok(None);
    };
    let mounts = mountinfo_of_this_thread(collector)?;
    let Some(found) = overlay_layers::locate(&entry.options, &entry.mountpoint, &mounts) else {
        return Ok(Some(missing));
    };
    tracing::warn!(
        "the overlay at {} will be mounted with its layers where they are now: {found}",
        entry.mountpoint
    );
    entry.options = found;
    Ok(None)
}

pub(super) trait Typed {
    fn fstype(&self) -> Option<Fstype>;
}

impl Typed for MntEntry {
    fn fstype(&self) -> Option<Fstype> {
        Fstype::try_from(self.fstype.cast_signed()).ok()
    }
}

fn add_option(entry: &mut MntEntry, word: &str) {
    if !entry.options.is_empty() {
        entry.options.push(',');
    }
    entry.options.push_str(word);
}

fn is_enabled(fs_type: &str, collector: &Collector<'_>) -> bool {
    let enabled = &collector.options.mounts.enable_fs;
    enabled.iter().any(|name| name == fs_type || name == "all")
}

/// The name that `--external dev[MAJOR/MINOR]:NAME` gives the device of a mount.
fn is_device(mount: &Mount, collector: &Collector<'_>) -> Option<String> {
    let wanted = format!("{}/{}", mount.dev_major, mount.dev_minor);
    collector
        .options
        .external
        .iter()
        .find_map(|external| match external {
            External::Device { key, value } if *key == wanted => Some(value.clone()),
            _ => None,
        })
}

/// Leaves out the mounts of `--skip-mnt`, and what is mounted on them.
fn skip(entries: &mut Vec<MntEntry>, collector: &Collector<'_>) {
    let mut gone = BTreeSet::new();
    loop {
        let before = gone.len();
        for entry in entries.iter() {
            let point = std::path::Path::new(&entry.mountpoint);
            if collector
                .options
                .mounts
                .skip
                .iter()
                .any(|path| path == point)
                || gone.contains(&entry.parent_mnt_id)
            {
                gone.insert(entry.mnt_id);
            }
        }
        if gone.len() == before {
            break;
        }
    }
    entries.retain(|entry| !gone.contains(&entry.mnt_id));
}

/// Devices of file systems that come from outside, so that their content does as well. A part of one that
/// the tree has mounted itself may be given from outside too: engines hide files behind a device of the
/// container's own `/dev`.
fn given_content(entries: &[MntEntry], of_root: bool) -> Vec<u32> {
    let ids: BTreeSet<u32> = entries.iter().map(|entry| entry.mnt_id).collect();
    let is_root = |entry: &MntEntry| {
        of_root && !ids.contains(&entry.parent_mnt_id) && entry.floe_own_root != Some(true)
    };
    let own: BTreeSet<u32> = entries
        .iter()
        .filter(|entry| entry.root == "/" && entry.ext_key.is_none() && !is_root(entry))
        .map(|entry| entry.root_dev)
        .collect();
    let is_given = |entry: &&MntEntry| {
        let part_of_own = entry.root != "/" && own.contains(&entry.root_dev);
        is_root(entry) || (entry.ext_key.is_some() && !part_of_own)
    };
    let given = entries.iter().filter(is_given);
    given.map(|entry| entry.root_dev).collect()
}

/// Saves the formats of a file system of the tree's own.
fn save_formats(
    entry: &MntEntry,
    all: &[MntEntry],
    namespace: &TreeNamespace,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let own = own_mounts(collector)?;
    let is_ours = own
        .iter()
        .any(|mount| kernel_device(mount.dev_major, mount.dev_minor) == entry.root_dev);
    let known = collector.cache(KnownMounts::default);
    if is_ours || entry.root != "/" || !known.saved.insert(entry.root_dev) {
        return Ok(());
    }
    let copy = pristine(entry, all, namespace, collector)?;
    for format in formats::collect(copy.as_fd(), &entry.mountpoint)? {
        collector.append_side(ImageKind::BinfmtMisc, &format)?;
    }
    Ok(())
}

fn save_contents(
    id: u32,
    entries: &[MntEntry],
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let all = collector.namespaces().all();
    let Some(namespace) = all.iter().find(|namespace| namespace.id == id).cloned() else {
        return Ok(());
    };
    for entry in entries {
        let saved = save_content(entry, entries, &namespace, collector);
        collector.note(saved)?;
    }
    Ok(())
}

/// Saves the content of a mount's file system, where it is the first mount that shows all of it.
fn save_content(
    entry: &MntEntry,
    all: &[MntEntry],
    namespace: &TreeNamespace,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    if entry.fstype() == Some(Fstype::BinfmtMisc) {
        return save_formats(entry, all, namespace, collector);
    }
    let Some(kind) = FsKind::of_entry(entry).filter(|kind| kind.content != Content::Given) else {
        return Ok(());
    };
    let known = collector.cache(KnownMounts::default);
    let is_whole = entry.root == "/" || shows_most(entry, known.namespaces.values().flatten());
    if !is_whole || !known.saved.insert(entry.root_dev) {
        return Ok(());
    }
    let copy = pristine(entry, all, namespace, collector)?;
    match kind.content {
        Content::Files => {
            let device = u64::from(entry.root_dev);
            let point = entry.mountpoint.clone();
            collector.after_preflight(move |collector| {
                let image = collector.writer().create_raw(ImageKind::TmpfsDev, device)?;
                content::pack(copy.as_fd(), image).map_err(|error| CollectError::System {
                    action: format!(
                        "Saving the files of {point}: {} {}",
                        error.action, error.path
                    ),
                    source: error.source,
                })
            });
            Ok(())
        }
        Content::Nothing => refuse_content(entry, kind, copy.as_fd(), namespace.member),
        Content::Given => Ok(()),
    }
}

fn refuse_content(
    entry: &MntEntry,
    kind: FsKind,
    root: BorrowedFd<'_>,
    pid: HostPid,
) -> Result<(), CollectError> {
    let system = |errno: Errno| CollectError::System {
        action: format!("Listing {}", entry.mountpoint),
        source: errno.into(),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(root, ".", flags, Mode::empty()).map_err(system)?;
    for name in Dir::new(opened).map_err(system)? {
        let name = name.map_err(system)?;
        let name = name.file_name().to_string_lossy().into_owned();
        if !matches!(name.as_str(), "." | "..") {
            return Err(CollectError::Unsupported(Obstacle {
                pid,
                object: format!(
                    "{name} in the {} file system at {}",
                    kind.name, entry.mountpoint
                ),
                remedy: "remove it first: what is in such a file system is not saved".to_string(),
            }));
        }
    }
    Ok(())
}

/// Plans the restore of all mounts, to find now what would be in its way then.
fn check_whole(pid: HostPid, collector: &mut Collector<'_>) -> Result<(), CollectError> {
    let of_root = collector.namespaces().of_root(NsKind::Mnt);
    let root_namespace = of_root.map(|root| root.id);
    // What names a device now is its key then.
    let devices = collector.options.external.iter();
    let devices = devices.filter_map(|one| match one {
        External::Device { value, .. } => Some(External::Device {
            key: value.clone(),
            value: "/dev/null".into(),
        }),
        _ => None,
    });
    let devices: Vec<External> = devices.collect();
    let known = collector.cache(KnownMounts::default);
    let keys = known
        .namespaces
        .values()
        .flatten()
        .filter_map(|entry| entry.ext_key.clone());
    let mut external: Vec<External> = keys
        .map(|key| External::Mount {
            key,
            value: "/".into(),
        })
        .collect();
    external.extend(devices);
    external.push(External::MountAuto {
        masters: true,
        sharing: true,
    });
    let planned = plan_tree(&Request {
        namespaces: &known.namespaces,
        root_namespace,
        own_pids: true,
        own_cgroups: true,
        own_users: true,
        options: &floe_options::MountOptions::default(),
        external: &external,
    });
    let (object, remedy) = match planned.and_then(|tree| plan_groups(&tree)) {
        Ok(_) => return Ok(()),
        Err(PlanError::Unsupported { object, remedy }) => {
            (object, remedy.replace("dump again with", "use"))
        }
        Err(PlanError::NotExternal {
            object,
            point,
            otherwise,
        }) => (
            object,
            format!(
                "use --external 'mnt[{point}]:NAME' and, at the restore, --external 'mnt[NAME]:PATH'{otherwise}"
            ),
        ),
        Err(error) => (
            format!("its mounts ({error})"),
            "unmount them, or declare them by --external 'mnt[MOUNTPOINT]:NAME'".to_string(),
        ),
    };
    collector.obstacle(Obstacle {
        pid,
        object,
        remedy,
    });
    Ok(())
}
