//! Making the mounts of a tree.
//!
//! All of them are made in a workshop, a mount namespace that nobody else is in, and attached in the
//! tree's namespaces when they are done. What failed half-way goes with the workshop.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use floe_image::dir::ImageDir;
use floe_image::messages::Fstype;
use floe_kernel::mount::{
    self, NewMountError, Propagation, Reach, attach, copy_mount, join_group, set_propagation,
};
use floe_kernel::namespace::{Home, Namespace, NsKind};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::deleted::{Leftover, make_deleted};
use super::formats;
use super::groups::{Base, Group};
use super::host_master::HostMounts;
use super::model::attributes;
use super::new_fs::{self, describe};
use super::owner::Owner;
use super::seen;
use super::sight::Whole;
use super::tree::{MountTree, NewFs, Origin, Placed, Source};
use crate::fd::tty::EarlyMasters;
use crate::fd::unchanged::FileFault;
use crate::restore::{Attempt, ExecuteError, World};

/// The number of the terminal that is mounted on a file.
fn terminal(placed: &Placed) -> Option<u32> {
    let is_devpts = placed.entry.fstype == Fstype::Devpts as u32;
    placed.part.parse().ok().filter(|_| is_devpts)
}

/// A path in a mount: not through links, and not into what is mounted below.
const WITHIN: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_XDEV);

/// Mounts in the making.
#[derive(Debug)]
pub struct Workshop {
    plan: Rc<Plan>,
    home: Rc<Home>,
    /// The mount namespace in which sources and carriers are attached.
    namespace: Namespace,
    /// A file system in memory whose root they are attached below.
    yard: OwnedFd,
    sources: Vec<Option<OwnedFd>>,
    mounts: Vec<Option<OwnedFd>>,
    carriers: Vec<Option<OwnedFd>>,
    /// Names of what was deleted, until the mounts of it are attached.
    leftovers: Vec<Leftover>,
    /// Of terminals that are mounted on files.
    masters: EarlyMasters,
}

/// What is to be made.
#[derive(Clone, Debug)]
pub struct Plan {
    pub tree: MountTree,
    pub groups: Vec<Group>,
    pub images: ImageDir,
}

/// The namespaces that mounts are made in and for.
pub struct Places {
    /// The tree's mount namespaces.
    pub mount: BTreeMap<u32, Rc<Namespace>>,
    /// Its other namespaces that a new file system shows: network, IPC, control groups.
    pub shown: Vec<Rc<Namespace>>,
    /// Those that single file systems show instead of them.
    pub others: BTreeMap<u32, Rc<Namespace>>,
    /// Its user namespaces, which file systems may belong to.
    pub users: BTreeMap<u32, Owner>,
}

impl Workshop {
    /// Makes the mount namespace and copies what comes from the host.
    pub fn open(plan: Rc<Plan>, home: Rc<Home>) -> Result<Self, ExecuteError> {
        let what = || "a mount namespace to work in".to_string();
        let mut visit = home.visit_new(&[NsKind::Mnt]).during("Making", what)?;
        let namespace = Namespace::own(NsKind::Mnt).during("Opening", what)?;
        // Our own root may be a directory below that of the namespace.
        visit.enter(&namespace).during("Entering", what)?;
        let root = open_path(CWD, "/").during("Opening", what)?;
        set_propagation(root.as_fd(), Reach::Tree, Propagation::Private)
            .during("Separating", what)?;
        let yard = mount::new_mount("tmpfs", &[]).map_err(new_mount_error)?;
        attach(yard.as_fd(), root.as_fd()).during("Attaching", what)?;
        drop(visit);
        let (sources, mounts) = (plan.tree.sources.len(), plan.tree.mounts.len());
        let carriers = plan.groups.len();
        let empty = |count: usize| (0..count).map(|_| None).collect();
        Ok(Workshop {
            plan,
            home,
            namespace,
            yard,
            sources: empty(sources),
            mounts: empty(mounts),
            carriers: empty(carriers),
            leftovers: Vec::new(),
            masters: EarlyMasters::default(),
        })
    }

    /// Makes and attaches all that can be made before the first task exists.
    pub fn make_early(&mut self, places: &Places) -> Result<(), ExecuteError> {
        self.copy_from_host()?;
        self.make(places, false)?;
        for (id, namespace) in &places.mount {
            self.enter_root(*id, namespace)?;
        }
        self.attach_all(places, false)?;
        self.make_layered(places)?;
        self.register_formats(places, false)
    }

    fn register_formats(&self, places: &Places, late: bool) -> Result<(), ExecuteError> {
        for placed in &self.plan.tree.mounts {
            let source = &self.plan.tree.sources[placed.source];
            let (Origin::New(fs), Some(root)) = (&source.origin, &self.sources[placed.source])
            else {
                continue;
            };
            if fs.name == formats::NAME && source.late == late {
                let entries = formats::decode(&self.plan.images, fs.entry.root_dev);
                let entries = entries.map_err(ExecuteError::from_plan)?;
                let _visit = self.visit_tree(placed.namespace, places)?;
                formats::register(root, &entries)?;
            }
        }
        Ok(())
    }

    /// File systems that only a task of the tree can mount, by their number.
    pub fn late_sources(&self) -> Vec<(usize, NewFs)> {
        let sources = self.plan.tree.sources.iter().enumerate();
        let late = sources.filter(|(_, source)| source.late);
        late.filter_map(|(index, source)| match &source.origin {
            Origin::New(fs) => Some((index, (**fs).clone())),
            Origin::Host(_) => None,
        })
        .collect()
    }

    /// Makes and attaches the rest, of new mounts of the [`Workshop::late_sources`].
    pub fn make_late(
        &mut self,
        places: &Places,
        mounted: BTreeMap<usize, OwnedFd>,
    ) -> Result<(), ExecuteError> {
        let visit = self.visit(&places.shown)?;
        for (index, mount) in mounted {
            self.keep_source(index, mount)?;
        }
        drop(visit);
        self.make(places, true)?;
        self.attach_all(places, true)?;
        self.register_formats(places, true)
    }

    /// Masters of terminals that are mounted, for whoever makes these.
    pub fn take_masters(&mut self) -> EarlyMasters {
        std::mem::take(&mut self.masters)
    }

    /// Mounts of all that is made so far of each file system.
    pub fn wholes(&self, world: &World<'_>) -> Result<Vec<Whole>, ExecuteError> {
        let mut all = Vec::new();
        for (source, mount) in self.plan.tree.sources.iter().zip(&self.sources) {
            let Some(mount) = mount else { continue };
            let again = mount.try_clone();
            let again = again.during("Duplicating", || source.root.clone())?;
            all.push(Whole {
                device: source.device,
                root: source.root.clone(),
                mount: world.lift(again)?,
            });
        }
        Ok(all)
    }

    /// Lets mounts propagate to each other; none may be attached afterwards.
    pub fn join_groups(&self) -> Result<(), ExecuteError> {
        for (group, carrier) in self.plan.groups.iter().zip(&self.carriers) {
            let Some(carrier) = carrier else { continue };
            for member in &group.members {
                let placed = &self.plan.tree.mounts[*member];
                let what = || format!("the mount {}", placed.entry.mountpoint);
                let mount = self.mount(*member)?;
                join_group(carrier.as_fd(), mount).during("Sharing", what)?;
            }
        }
        Ok(())
    }

    fn visit(&self, shown: &[Rc<Namespace>]) -> Result<impl Drop + use<>, ExecuteError> {
        let home = Rc::clone(&self.home);
        let all = std::iter::once(&self.namespace).chain(shown.iter().map(|shown| &**shown));
        home.visit(all)
            .during("Entering", || "the place where mounts are made".to_string())
    }

    fn copy_from_host(&mut self) -> Result<(), ExecuteError> {
        let plan = Rc::clone(&self.plan);
        for (index, source) in plan.tree.sources.iter().enumerate() {
            let Origin::Host(path) = &source.origin else {
                continue;
            };
            let copy = copy_of(path)?;
            self.sources[index] = Some(copy);
        }
        let host = HostMounts::read();
        for (index, group) in plan.groups.iter().enumerate() {
            let (Base::SlaveOfHost | Base::PeerOfHost, Some(source)) =
                (group.base, &self.sources[group.source])
            else {
                continue;
            };
            // The copy of a copy is in no namespace, so it cannot be copied again on older kernels.
            let Origin::Host(path) = &plan.tree.sources[group.source].origin else {
                continue;
            };
            let _ = source;
            let master = match group.base {
                Base::SlaveOfHost => host.master_of(group, &plan.tree, path),
                _ => Some(path.clone()),
            };
            self.carriers[index] = master.map(|path| copy_of(&path)).transpose()?;
        }
        Ok(())
    }

    /// Makes sources, mounts and carriers.
    fn make(&mut self, places: &Places, late: bool) -> Result<(), ExecuteError> {
        if !late {
            self.make_elsewhere(places)?;
        }
        let _visit = self.visit(&places.shown)?;
        let plan = Rc::clone(&self.plan);
        for (index, source) in plan.tree.sources.iter().enumerate() {
            let is_elsewhere = elsewhere(source, places).is_some();
            if source.late != late || source.layered || is_elsewhere {
                continue;
            }
            match &source.origin {
                Origin::New(_) if late => {}
                Origin::New(fs) => {
                    let mount = new_fs::make(&self.plan.images, fs, owner(fs, places))?;
                    self.keep_source(index, mount)?;
                }
                Origin::Host(_) => {
                    let copy = self.sources[index].take().expect("copied before");
                    set_propagation(copy.as_fd(), Reach::One, Propagation::Private)
                        .during("Separating", || "a copy of a mount".to_string())?;
                    self.keep_source(index, copy)?;
                }
            }
        }
        for (index, placed) in plan.tree.mounts.iter().enumerate() {
            let source = &plan.tree.sources[placed.source];
            if source.late == late && !source.layered {
                self.mounts[index] = Some(self.copy_part(placed, places)?);
            }
        }
        for (index, group) in plan.groups.iter().enumerate() {
            let source = &plan.tree.sources[group.source];
            if source.late == late && !source.layered {
                self.make_carrier(index, group)?;
            }
        }
        Ok(())
    }

    /// Makes sources that show other namespaces than those of the root.
    fn make_elsewhere(&mut self, places: &Places) -> Result<(), ExecuteError> {
        let plan = Rc::clone(&self.plan);
        for (index, source) in plan.tree.sources.iter().enumerate() {
            if let Some((fs, shown)) = elsewhere(source, places) {
                let _visit = self.visit(&shown)?;
                let mount = new_fs::make(&self.plan.images, fs, owner(fs, places))?;
                self.keep_source(index, mount)?;
            }
        }
        Ok(())
    }

    /// Makes and attaches what has its layers in the tree's other mounts, which the names of the layers
    /// lead to: one after the other, as one may be a layer of the next.
    fn make_layered(&mut self, places: &Places) -> Result<(), ExecuteError> {
        let plan = Rc::clone(&self.plan);
        for (index, placed) in plan.tree.mounts.iter().enumerate() {
            let source = &plan.tree.sources[placed.source];
            if source.layered {
                self.make_of_layers(placed, places)?;
                let _visit = self.visit(&places.shown)?;
                self.mounts[index] = Some(self.copy_part(placed, places)?);
            }
            if let (true, Some(parent)) = (placed.layered, placed.parent) {
                let _visit = self.visit_tree(placed.namespace, places)?;
                self.attach_one(index, placed, parent)?;
            }
        }
        let _visit = self.visit(&places.shown)?;
        for (index, group) in plan.groups.iter().enumerate() {
            if plan.tree.sources[group.source].layered {
                self.make_carrier(index, group)?;
            }
        }
        Ok(())
    }

    fn make_of_layers(&mut self, placed: &Placed, places: &Places) -> Result<(), ExecuteError> {
        let plan = Rc::clone(&self.plan);
        let (index, source) = (placed.source, &plan.tree.sources[placed.source]);
        let (None, Origin::New(fs)) = (&self.sources[index], &source.origin) else {
            return Ok(());
        };
        let visit = self.visit_tree(placed.namespace, places)?;
        let mount = new_fs::make(&self.plan.images, fs, owner(fs, places))?;
        drop(visit);
        let _visit = self.visit(&places.shown)?;
        self.keep_source(index, mount)
    }

    fn visit_tree(&self, id: u32, places: &Places) -> Result<impl Drop + use<>, ExecuteError> {
        let what = || format!("mount namespace {id}");
        let namespace = places.mount.get(&id).ok_or(Errno::NOENT);
        let namespace = namespace.during("Finding", what)?;
        self.home.visit([&**namespace]).during("Entering", what)
    }

    /// Attaches a source in the workshop: only mounts of a namespace can be copied.
    fn keep_source(&mut self, index: usize, mount: OwnedFd) -> Result<(), ExecuteError> {
        self.attach_in_yard(&format!("source-{index}"), &mount)?;
        self.sources[index] = Some(mount);
        Ok(())
    }

    fn attach_in_yard(&self, name: &str, mount: &OwnedFd) -> Result<(), ExecuteError> {
        let what = || format!("{name} where mounts are made");
        let stat = rustix::fs::fstat(mount).during("Looking at", what)?;
        let made = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => rustix::fs::mkdirat(&self.yard, name, Mode::RWXU),
            _ => rustix::fs::mknodat(&self.yard, name, FileType::RegularFile, Mode::RUSR, 0),
        };
        made.during("Making", what)?;
        let point = open_path(&self.yard, name).during("Opening", what)?;
        attach(mount.as_fd(), point.as_fd()).during("Attaching", what)
    }

    /// The copy that becomes one mount of the tree.
    fn copy_part(&mut self, placed: &Placed, places: &Places) -> Result<OwnedFd, ExecuteError> {
        let what = || format!("{} for {}", placed.entry.root, placed.entry.mountpoint);
        let source = self.source(placed.source)?.try_clone_to_owned();
        let source = source.during("Duplicating", what)?;
        let source = source.as_fd();
        let copy = if placed.part.is_empty() {
            copy_mount(source, b"").during("Copying", what)?
        } else if placed.entry.deleted == Some(true) {
            let kind = self.kind_of_point(placed);
            let plan = Rc::clone(&self.plan);
            let owner = match &plan.tree.sources[placed.source].origin {
                Origin::New(fs) => owner(fs, places),
                Origin::Host(_) => None,
            };
            let _files = owner.map(Owner::files).transpose()?;
            let made = make_deleted(source, &placed.part, kind);
            let (part, leftovers) = made.during("Making the deleted", what)?;
            self.leftovers.extend(leftovers);
            copy_mount(part.as_fd(), b"").during("Copying the deleted", what)?
        } else {
            if let Some(index) = terminal(placed) {
                self.masters.make(source, index)?;
            }
            let part = open_within(source, &placed.part).during("Looking for", what)?;
            copy_mount(part.as_fd(), b"").during("Copying", what)?
        };
        let (set, clear) = attributes(placed.entry.flags);
        mount::set_flags(copy.as_fd(), set, clear).during("Setting the flags of", what)?;
        if placed.entry.flags & libc::MS_UNBINDABLE as u32 != 0 {
            set_propagation(copy.as_fd(), Reach::One, Propagation::Unbindable)
                .during("Setting the flags of", what)?;
        }
        Ok(copy)
    }

    /// The type of a mount point, and so of what is mounted there.
    fn kind_of_point(&self, placed: &Placed) -> FileType {
        let Some(parent) = placed.parent.map(|parent| &self.plan.tree.mounts[parent]) else {
            return FileType::Directory;
        };
        let parts = [parent.part.as_str(), placed.point.as_str()];
        let path: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        let Ok(source) = self.source(parent.source) else {
            return FileType::Directory;
        };
        let found = match path.join("/") {
            path if path.is_empty() => source.try_clone_to_owned().map_err(|_| Errno::BADF),
            path => open_within(source, &path),
        };
        let stat = found.and_then(rustix::fs::fstat);
        stat.map_or(FileType::Directory, |stat| {
            FileType::from_raw_mode(stat.st_mode)
        })
    }

    fn make_carrier(&mut self, index: usize, group: &Group) -> Result<(), ExecuteError> {
        let what = || format!("sharing group {}", group.shared.max(group.master));
        if group.base == Base::SlaveOfHost && group.shared == 0 && self.carriers[index].is_none() {
            let first = &self.plan.tree.mounts[group.members[0]].entry;
            tracing::warn!(
                "{} receives no mounts of the caller's any more: none of those here shows the same and is shared",
                first.mountpoint
            );
            return Ok(());
        }
        let carrier = match (self.carriers[index].take(), group.base) {
            (Some(copy), _) => copy,
            (None, Base::SlaveOf(master)) => {
                let master = self.carriers[master].as_ref();
                let master = master
                    .ok_or(Errno::NOENT)
                    .during("Finding the master of", what)?;
                copy_mount(master.as_fd(), b"").during("Making", what)?
            }
            (None, _) => copy_mount(self.source(group.source)?, b"").during("Making", what)?,
        };
        self.attach_in_yard(&format!("group-{index}"), &carrier)?;
        if matches!(group.base, Base::SlaveOf(_) | Base::SlaveOfHost) {
            set_propagation(carrier.as_fd(), Reach::One, Propagation::Slave)
                .during("Making", what)?;
        }
        if group.shared != 0 && group.base != Base::PeerOfHost {
            set_propagation(carrier.as_fd(), Reach::One, Propagation::Shared)
                .during("Making", what)?;
        }
        self.carriers[index] = Some(carrier);
        Ok(())
    }

    /// Makes the root mount of a namespace its root, and takes away all else.
    fn enter_root(&self, id: u32, namespace: &Namespace) -> Result<(), ExecuteError> {
        let what = || format!("the root of mount namespace {id}");
        let mut mounts = self.plan.tree.mounts.iter();
        let root = mounts.position(|mount| mount.namespace == id && mount.parent.is_none());
        let root = self.mount(root.ok_or(Errno::NOENT).during("Finding", what)?)?;
        let _visit = self.home.visit([namespace]).during("Entering", what)?;
        let old = open_path(CWD, "/").during("Opening", what)?;
        set_propagation(old.as_fd(), Reach::Tree, Propagation::Private)
            .during("Separating", what)?;
        attach(root, old.as_fd()).during("Attaching", what)?;
        rustix::process::fchdir(root).during("Entering", what)?;
        rustix::process::pivot_root(".", ".").during("Changing to", what)?;
        // The old root lies on top of the new one now.
        rustix::mount::unmount(".", UnmountFlags::DETACH).during("Clearing", what)
    }

    fn attach_all(&mut self, places: &Places, late: bool) -> Result<(), ExecuteError> {
        for (id, namespace) in &places.mount {
            let _visit = self
                .home
                .visit([&**namespace])
                .during("Entering", || format!("mount namespace {id}"))?;
            for (index, placed) in self.plan.tree.mounts.iter().enumerate() {
                let Some(parent) = placed.parent else {
                    continue;
                };
                if placed.namespace == *id && placed.late == late && !placed.layered {
                    self.attach_one(index, placed, parent)?;
                }
            }
        }
        // A mount of what is deleted already cannot be attached.
        while let Some(leftover) = self.leftovers.pop() {
            leftover
                .remove()
                .during("Deleting again", || leftover.name.clone())?;
        }
        Ok(())
    }

    fn attach_one(&self, index: usize, placed: &Placed, parent: usize) -> Result<(), ExecuteError> {
        let what = || placed.entry.mountpoint.clone();
        let parent = self.mount(parent)?;
        let mount = self.mount(index)?;
        if placed.point.is_empty() {
            return attach(mount, parent).during("Mounting on", what);
        }
        let point =
            open_within(parent, &placed.point).during("Looking for the mount point", what)?;
        attach(mount, point.as_fd()).during("Mounting on", what)
    }

    fn source(&self, index: usize) -> Result<BorrowedFd<'_>, ExecuteError> {
        let source = self.sources[index].as_ref().map(AsFd::as_fd);
        source
            .ok_or(Errno::NOENT)
            .during("Finding the source", || index.to_string())
    }

    fn mount(&self, index: usize) -> Result<BorrowedFd<'_>, ExecuteError> {
        let mount = self.mounts[index].as_ref().map(AsFd::as_fd);
        mount.ok_or(Errno::NOENT).during("Finding the mount", || {
            self.plan.tree.mounts[index].entry.mountpoint.clone()
        })
    }
}

/// Whose a file system is that is mounted anew, where it is not ours.
fn owner<'p>(fs: &NewFs, places: &'p Places) -> Option<&'p Owner> {
    places.users.get(&fs.entry.floe_user_ns?)
}

/// What is mounted from other namespaces than those of the root, and from which.
fn elsewhere<'p>(source: &'p Source, places: &Places) -> Option<(&'p NewFs, Vec<Rc<Namespace>>)> {
    match &source.origin {
        Origin::New(fs) => Some((fs, seen::other_place(&fs.entry, places)?)),
        Origin::Host(_) => None,
    }
}

fn open_path(at: impl AsFd, path: &str) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(at, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

pub(super) fn open_within(at: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(at, path, flags, Mode::empty(), WITHIN)
}

fn new_mount_error(error: NewMountError) -> ExecuteError {
    let (object, source) = describe(error);
    ExecuteError::Failed {
        action: "Mounting a place to make mounts in:",
        object,
        source,
    }
}

/// A mount of this machine, for the tree.
fn copy_of(path: &Path) -> Result<OwnedFd, ExecuteError> {
    use io::ErrorKind::{NotADirectory, NotFound};
    match mount::copy_mount_at(path) {
        Err(error) if matches!(error.kind(), NotFound | NotADirectory) => {
            let path = path.to_path_buf();
            Err(FileFault::NoMount { path, error }.into())
        }
        other => other.during("Copying the mount of", || path.display().to_string()),
    }
}
