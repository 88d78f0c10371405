//! In which order mounts are attached, and what each is a copy of: pure.
//!
//! Every mount is made on its own, as a copy of some part of a [`Source`], and attached afterwards.
//! Parents come before children. Among the children of one mount the deeper points come first: a
//! mount that hides another one cannot be in its way then.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use floe_image::messages::{Fstype, MntEntry};
use floe_kernel::namespace::NsKind;
use floe_options::{External, MountOptions, Need};

use super::external::external_value;
use super::formats;
use super::model::{
    EXTERNAL_DEVICE, FsKind, NO_ROOT, PLAIN_DEVICES, below, comes_from_caller, shows_most,
};
use super::shown;
use crate::restore::PlanError;

/// What is to be restored, and how.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The mounts of every namespace.
    pub namespaces: &'a BTreeMap<u32, Vec<MntEntry>>,
    /// The namespace of the root task; `None` where it has the caller's mounts, which what others show of them
    /// comes from.
    pub root_namespace: Option<u32>,
    /// Whether the tree has a pid namespace of its own: `proc` cannot be mounted before its first task.
    pub own_pids: bool,
    /// Whether the tree has a cgroup namespace of its own, below whose root it sees nothing.
    pub own_cgroups: bool,
    /// Whether the tree has a user namespace of its own, which has formats of programs of its own.
    pub own_users: bool,
    pub options: &'a MountOptions,
    pub external: &'a [External],
}

/// Where the mounts of one file system, or of one directory of the host, are copied from.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    pub origin: Origin,
    /// Its root, as a path in its file system.
    pub root: String,
    /// Device number of its file system in the images.
    pub device: u32,
    /// It can be made only when the first task exists.
    pub late: bool,
    /// It can be made only when the mounts are attached that its layers are in.
    pub layered: bool,
}

/// How a source comes to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Origin {
    /// Mounted anew, as this entry says.
    New(Box<NewFs>),
    /// A directory or file of the host.
    Host(PathBuf),
}

/// A file system to be mounted anew.
#[derive(Clone, Debug, PartialEq)]
pub struct NewFs {
    /// The name of its type.
    pub name: String,
    /// One of its mounts.
    pub entry: MntEntry,
}

/// A mount with its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    pub namespace: u32,
    pub entry: MntEntry,
    /// The mount that it is attached to; the root of a namespace has none.
    pub parent: Option<usize>,
    /// Its point in the parent, relative to the parent's root.
    pub point: String,
    pub source: usize,
    /// Its root in the source, relative to the source's root.
    pub part: String,
    /// It is attached when the first task exists.
    pub late: bool,
    /// It is, or lies on, a mount that has its layers in others.
    pub layered: bool,
}

/// All mounts of a tree.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MountTree {
    pub sources: Vec<Source>,
    /// In the order of attaching; the roots of the namespaces are among them.
    pub mounts: Vec<Placed>,
}

/// The image of a namespace's mounts, for messages.
pub fn image_name(namespace: u32) -> String {
    format!("mountpoints-{namespace}.img")
}

/// Plans the mounts of all namespaces.
pub fn plan_tree(request: &Request<'_>) -> Result<MountTree, PlanError> {
    let mut tree = MountTree::default();
    // The namespace of the root task first: the others may have copies of its root.
    let root = request.root_namespace;
    let first = root.and_then(|root| request.namespaces.get_key_value(&root));
    let all = request.namespaces.iter();
    let others = all.filter(|(id, _)| Some(**id) != root);
    for (id, entries) in first.into_iter().chain(others) {
        place(*id, entries, &mut tree.mounts)?;
    }
    let mut sources = Sources {
        request,
        known: Vec::new(),
    };
    sources.add_given(&tree.mounts)?;
    sources.add_new(&tree.mounts)?;
    for index in 0..tree.mounts.len() {
        let mount = &tree.mounts[index];
        let source = sources.of(mount)?;
        let root = entry_root(&mount.entry);
        let part = below(root, &sources.known[source].root).unwrap_or("");
        let part = checked(part, mount, "the root")?;
        let late = sources.known[source].late
            || mount.parent.is_some_and(|parent| tree.mounts[parent].late);
        let layered = sources.known[source].layered
            || mount
                .parent
                .is_some_and(|parent| tree.mounts[parent].layered);
        let mount = &mut tree.mounts[index];
        (mount.source, mount.part) = (source, part);
        (mount.late, mount.layered) = (late, layered && !late);
    }
    tree.sources = sources.known;
    Ok(tree)
}

/// The root of a mount; the oldest images have something else there for external ones.
fn entry_root(entry: &MntEntry) -> &str {
    if entry.root == NO_ROOT {
        "/"
    } else {
        &entry.root
    }
}

/// The mounts of one namespace, in the order of attaching.
pub fn attach_order(namespace: u32, entries: &[MntEntry]) -> Result<Vec<MntEntry>, PlanError> {
    let mut placed = Vec::new();
    place(namespace, entries, &mut placed)?;
    Ok(placed.into_iter().map(|mount| mount.entry).collect())
}

/// Adds the mounts of one namespace, in the order of attaching.
fn place(namespace: u32, entries: &[MntEntry], placed: &mut Vec<Placed>) -> Result<(), PlanError> {
    let damaged = |what: String| PlanError::damaged(image_name(namespace), what);
    let mut ids = BTreeSet::new();
    if let Some(twice) = entries.iter().find(|entry| !ids.insert(entry.mnt_id)) {
        return Err(damaged(format!("mount {} is there twice", twice.mnt_id)));
    }
    let mut children: BTreeMap<u32, Vec<&MntEntry>> = BTreeMap::new();
    let mut roots = Vec::new();
    for entry in entries {
        let parent = entry.parent_mnt_id;
        if parent != entry.mnt_id && ids.contains(&parent) {
            children.entry(parent).or_default().push(entry);
        } else {
            roots.push(entry);
        }
    }
    let [root] = roots[..] else {
        let points: Vec<&str> = roots.iter().map(|root| root.mountpoint.as_str()).collect();
        return Err(damaged(format!(
            "one mount must be the root, but {} have no parent: {}",
            roots.len(),
            points.join(", ")
        )));
    };
    let mut waiting = vec![(root, None)];
    let before = placed.len();
    while let Some((entry, parent)) = waiting.pop() {
        let above = parent.map_or("/", |parent: usize| {
            placed[parent].entry.mountpoint.as_str()
        });
        let point = below(&entry.mountpoint, above).ok_or_else(|| {
            damaged(format!(
                "mount {} at {} is not below its parent at {above}",
                entry.mnt_id, entry.mountpoint
            ))
        })?;
        let mount = Placed {
            namespace,
            entry: entry.clone(),
            parent,
            point: point.to_string(),
            source: 0,
            part: String::new(),
            late: false,
            layered: false,
        };
        let point = checked(&mount.point, &mount, "the point")?;
        placed.push(Placed { point, ..mount });
        let index = placed.len() - 1;
        let mut below = children.remove(&entry.mnt_id).unwrap_or_default();
        // The last one is taken first.
        below.sort_by_key(|child| (depth(&child.mountpoint), std::cmp::Reverse(child.mnt_id)));
        waiting.extend(below.into_iter().map(|child| (child, Some(index))));
    }
    if placed.len() - before != entries.len() {
        return Err(damaged("some mounts are each other's parents".to_string()));
    }
    Ok(())
}

fn depth(path: &str) -> usize {
    path.split('/').filter(|name| !name.is_empty()).count()
}

/// A relative path of plain names.
fn checked(path: &str, mount: &Placed, what: &str) -> Result<String, PlanError> {
    let plain = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('\0');
    if path.is_empty() || path.split('/').all(plain) {
        return Ok(path.to_string());
    }
    let text = format!("{what} of mount {} is {path}", mount.entry.mnt_id);
    Err(PlanError::damaged(image_name(mount.namespace), text))
}

struct Sources<'a> {
    request: &'a Request<'a>,
    known: Vec<Source>,
}

impl Sources<'_> {
    /// Adds what comes from the host: the root of the root's namespace, and external mounts.
    fn add_given(&mut self, mounts: &[Placed]) -> Result<(), PlanError> {
        for mount in mounts {
            let Some(path) = self.host_path(mount)? else {
                continue;
            };
            let source = Source {
                origin: Origin::Host(path),
                root: entry_root(&mount.entry).to_string(),
                device: mount.entry.root_dev,
                late: false,
                layered: false,
            };
            if !self.known.contains(&source) {
                self.known.push(source);
            }
        }
        Ok(())
    }

    fn host_path(&self, mount: &Placed) -> Result<Option<PathBuf>, PlanError> {
        let entry = &mount.entry;
        let options = self.request.options;
        let of_root = self.request.root_namespace;
        if mount.parent.is_none() && Some(mount.namespace) == of_root {
            return Ok(options.root.clone().or_else(|| {
                let is_own = entry.floe_own_root == Some(true);
                (!is_own).then(|| PathBuf::from("/"))
            }));
        }
        if entry.with_plugin == Some(true) {
            return Err(PlanError::NotExternal {
                object: format!("Mount {}, which a plugin of CRIU saved,", entry.mountpoint),
                point: entry.mountpoint.clone(),
                otherwise: "",
            });
        }
        // The oldest images have the name in place of the root.
        let old = (entry.ext_mount == Some(true)).then_some(&entry.root);
        let Some(key) = entry.ext_key.as_ref().or(old) else {
            return Ok(None);
        };
        if key == EXTERNAL_DEVICE {
            return Ok(None);
        }
        let find = |key| external_value(key, options, self.request.external);
        // crun names some by where they are mounted, not by what the dump called them.
        if let Some(path) = find(key).or_else(|| find(&entry.mountpoint)) {
            // Relative ones begin at the root, as CRIU takes them.
            return Ok(Some(PathBuf::from("/").join(path)));
        }
        if comes_from_caller(entry) {
            let mut all = self.request.external.iter();
            let is_asked_for = |one| matches!(one, &External::MountAuto { .. });
            let is_wanted = options.ext_mount_auto || all.any(is_asked_for);
            return match is_wanted || of_root.is_none() {
                true => Ok(Some(PathBuf::from(&entry.source))),
                false => Err(PlanError::NeedsOption {
                    object: format!("Mount {}, found outside at the dump,", entry.mountpoint),
                    need: Need::AutomaticMounts,
                }),
            };
        }
        match PLAIN_DEVICES.contains(&key.as_str()) {
            true => Ok(Some(PathBuf::from(key))),
            false => Err(PlanError::NeedsOption {
                object: format!("External mount {} (`{key}`)", entry.mountpoint),
                need: Need::Mount(key.clone()),
            }),
        }
    }

    /// Adds the file systems that are mounted anew.
    fn add_new(&mut self, mounts: &[Placed]) -> Result<(), PlanError> {
        for mount in mounts {
            let entry = &mount.entry;
            if self.given(mount).is_some() {
                continue;
            }
            let all = mounts.iter().map(|mount| &mount.entry);
            let is_whole = entry.root == "/" || shows_most(entry, all);
            if !is_whole && !is_of_cgroups(entry) {
                continue;
            }
            let Some(name) = fs_name(entry) else {
                return Err(PlanError::NotExternal {
                    object: format!("The file system at {}", entry.mountpoint),
                    point: entry.mountpoint.clone(),
                    otherwise: ", or --enable-fs",
                });
            };
            let known = self.known.iter_mut().find(|source| {
                source.device == entry.root_dev
                    && matches!(source.origin, Origin::New(_))
                    && !is_other_name(source, entry)
            });
            match known {
                Some(source) if source.root.len() > entry.root.len() => {
                    source.root.clone_from(&entry.root);
                }
                Some(_) => {}
                None => {
                    let source = self.new_source(name, entry)?;
                    self.known.push(source);
                }
            }
        }
        Ok(())
    }

    fn new_source(&self, name: String, entry: &MntEntry) -> Result<Source, PlanError> {
        let mut entry = entry.clone();
        if entry.ext_key.as_deref() == Some(EXTERNAL_DEVICE) {
            entry.source = self.device(&entry)?;
        }
        let shared_with_host =
            name == "devpts" && !entry.options.split(',').any(|word| word == "newinstance");
        Ok(Source {
            late: is_late(&entry, |kind| match kind {
                NsKind::Pid => self.request.own_pids,
                NsKind::User => self.request.own_users,
                _ => self.request.own_cgroups,
            }),
            origin: if shared_with_host {
                Origin::Host(PathBuf::from("/dev/pts"))
            } else {
                Origin::New(Box::new(NewFs {
                    name,
                    entry: entry.clone(),
                }))
            },
            // In a cgroup namespace the root of a mount is the namespace's; else all of the hierarchy is
            // mounted, of which the tree may have only a part.
            root: match is_of_cgroups(&entry) && self.request.own_cgroups {
                true => entry.root.clone(),
                false => "/".to_string(),
            },
            device: entry.root_dev,
            layered: entry.fstype == Fstype::Overlayfs as u32,
        })
    }

    /// The device that is here for one that the dump was told about.
    fn device(&self, entry: &MntEntry) -> Result<String, PlanError> {
        let name = entry.source.strip_prefix("dev[");
        let name = name.and_then(|name| name.strip_suffix(']'));
        let given = self
            .request
            .external
            .iter()
            .find_map(|external| match external {
                External::Device { key, value } if Some(key.as_str()) == name => {
                    Some(value.clone())
                }
                _ => None,
            });
        given.ok_or_else(|| PlanError::NeedsOption {
            object: format!("External device {} at {}", entry.source, entry.mountpoint),
            need: Need::Device(name.unwrap_or(&entry.source).to_string()),
        })
    }

    /// The source of a mount that comes from the host, or is part of what does.
    fn given(&self, mount: &Placed) -> Option<usize> {
        let path = self.host_path(mount).ok().flatten();
        let own = self.known.iter().position(|source| {
            source.device == mount.entry.root_dev
                && source.root == entry_root(&mount.entry)
                && path
                    .as_ref()
                    .is_some_and(|path| source.origin == Origin::Host(path.clone()))
        });
        own.or_else(|| self.widest(mount, |source| matches!(source.origin, Origin::Host(_))))
    }

    fn widest(&self, mount: &Placed, wanted: impl Fn(&Source) -> bool) -> Option<usize> {
        let fits = |source: &Source| {
            source.device == mount.entry.root_dev
                && below(entry_root(&mount.entry), &source.root).is_some()
                && wanted(source)
        };
        let found = self
            .known
            .iter()
            .enumerate()
            .filter(|(_, source)| fits(source));
        found
            .min_by_key(|(_, source)| (source.root.len(), is_other_name(source, &mount.entry)))
            .map(|(index, _)| index)
    }

    fn of(&self, mount: &Placed) -> Result<usize, PlanError> {
        let found = self.given(mount).or_else(|| self.widest(mount, |_| true));
        found.ok_or_else(|| PlanError::NotExternal {
            object: format!(
                "Mount {} of {} in a file system whose root is mounted nowhere in the tree",
                mount.entry.mountpoint, mount.entry.root
            ),
            point: mount.entry.mountpoint.clone(),
            otherwise: "",
        })
    }
}

/// Whether only a task of the tree can mount a file system: it shows namespaces of whoever mounts it, which
/// the tree has for its `own`.
pub fn is_late(entry: &MntEntry, own: impl Fn(NsKind) -> bool) -> bool {
    match fs_name(entry).as_deref() {
        Some("proc") => shown::is_of_tree(entry, own(NsKind::Pid)),
        Some("cgroup" | "cgroup2") => own(NsKind::Cgroup),
        Some(formats::NAME) => own(NsKind::User),
        _ => false,
    }
}

/// File systems that are the same one however often they are mounted: each mount may call it differently.
const ONCE: [&str; 8] = [
    "sysfs",
    "devtmpfs",
    "mqueue",
    "cgroup",
    "cgroup2",
    "debugfs",
    "tracefs",
    "securityfs",
];

/// Whether a mount of such a file system calls it by another name than a source does.
fn is_other_name(source: &Source, entry: &MntEntry) -> bool {
    let Origin::New(fs) = &source.origin else {
        return false;
    };
    ONCE.contains(&fs.name.as_str()) && fs.entry.source != entry.source
}

fn is_of_cgroups(entry: &MntEntry) -> bool {
    let kind = Fstype::try_from(entry.fstype.cast_signed());
    matches!(kind, Ok(Fstype::Cgroup | Fstype::Cgroup2))
}

/// The type of a mount's file system, as the kernel calls it; `None` where the images do not tell.
pub fn fs_name(entry: &MntEntry) -> Option<String> {
    let code = Fstype::try_from(entry.fstype.cast_signed()).ok()?;
    if code == Fstype::Auto {
        return entry.fsname.clone();
    }
    FsKind::of_entry(entry).map(|kind| kind.name.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(id: u32, parent: u32, point: &str, device: u32, root: &str) -> MntEntry {
        MntEntry {
            fstype: Fstype::Tmpfs as u32,
            mnt_id: id,
            parent_mnt_id: parent,
            mountpoint: point.to_string(),
            root_dev: device,
            root: root.to_string(),
            ..MntEntry::default()
        }
    }

    fn planned(entries: Vec<MntEntry>, external: &[External]) -> Result<MountTree, PlanError> {
        let namespaces = BTreeMap::from([(7, entries)]);
        plan_tree(&Request {
            namespaces: &namespaces,
            root_namespace: Some(7),
            own_pids: true,
            own_cgroups: false,
            own_users: false,
            options: &MountOptions::default(),
            external,
        })
    }

    #[test]
    fn parents_come_first_and_hidden_points_before_what_hides_them() {
        let entries = vec![
            mount(5, 2, "/a/b", 3, "/"),
            mount(4, 2, "/a", 2, "/"),
            mount(6, 4, "/a/b", 4, "/"),
            mount(2, 1, "/", 1, "/srv/root"),
            mount(3, 2, "/", 5, "/"),
        ];
        let tree = planned(entries, &[]).expect("a tree");
        let order: Vec<u32> = tree.mounts.iter().map(|m| m.entry.mnt_id).collect();
        assert_eq!(order, [2, 5, 4, 6, 3]);
        let points: Vec<&str> = tree.mounts.iter().map(|m| m.point.as_str()).collect();
        assert_eq!(points, ["", "a/b", "a", "b", ""]);
    }

    #[test]
    fn binds_are_parts_of_the_widest_source() {
        let entries = vec![
            mount(2, 1, "/", 1, "/srv/root"),
            mount(3, 2, "/t", 9, "/"),
            mount(4, 2, "/u", 9, "/x/y"),
            mount(5, 2, "/v", 1, "/srv/root/home"),
        ];
        let tree = planned(entries, &[]).expect("a tree");
        assert_eq!(tree.sources.len(), 2);
        let parts: BTreeMap<u32, (usize, &str)> = tree
            .mounts
            .iter()
            .map(|m| (m.entry.mnt_id, (m.source, m.part.as_str())))
            .collect();
        assert_eq!(parts[&4], (1, "x/y"));
        assert_eq!(parts[&5], (0, "home"));
    }

    #[test]
    fn what_lies_on_a_late_mount_is_late() {
        let mut proc = mount(3, 2, "/proc", 9, "/");
        proc.fstype = Fstype::Proc as u32;
        let mut masked = mount(4, 3, "/proc/kcore", 6, "/null");
        masked.ext_key = Some("/srv/mask".into());
        let entries = vec![mount(2, 1, "/", 1, "/"), proc, masked];
        let external = External::Mount {
            key: "/srv/mask".into(),
            value: "/srv/mask".into(),
        };
        let tree = planned(entries.clone(), &[external]).expect("a tree");
        let late: Vec<bool> = tree.mounts.iter().map(|m| m.late).collect();
        assert_eq!(late, [false, true, true]);
        assert!(!tree.sources[tree.mounts[2].source].late);
        assert!(
            planned(entries, &[]).is_err(),
            "the external mount is not named"
        );
    }

    #[test]
    fn impossible_trees_are_damage() {
        let root = || mount(2, 1, "/", 1, "/");
        for bad in [
            vec![],
            vec![root(), root()],
            vec![root(), mount(3, 9, "/a", 2, "/")],
            vec![root(), mount(3, 4, "/a", 2, "/"), mount(4, 3, "/a", 2, "/")],
            vec![root(), mount(3, 2, "/a/../b", 2, "/")],
            vec![root(), mount(3, 2, "/a", 2, "/"), mount(4, 3, "/b", 2, "/")],
            vec![root(), mount(3, 2, "/a", 1, "/x/../../y")],
        ] {
            assert!(planned(bad.clone(), &[]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_part_of_an_unknown_file_system_is_refused() {
        let mut unknown = mount(3, 2, "/a", 8, "/sub");
        unknown.fstype = Fstype::Unsupported as u32;
        assert!(planned(vec![mount(2, 1, "/", 1, "/srv"), unknown], &[]).is_err());
    }
}
