//! Where the files of a dumped tree are found by their names.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use floe_kernel::ids::HostPid;
use floe_kernel::namespace::{Home, NsKind, Visit};
use floe_kernel::proc::ProcDir;
use rustix::fs::{CWD, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::collect::KnownMounts;
use super::model::kernel_device;
use super::uncover::mount_id;
use crate::collect::Collector;
use crate::namespace::TreeNamespace;

/// The mount that a file is on, and the way to where its name leads to it.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// Its number in the images; `None` for one of ours.
    pub mount: Option<u32>,
    way: Option<(Rc<Home>, Rc<TreeNamespace>)>,
}

/// A file that is looked for by the name that the kernel shows.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    pub stat: &'a Stat,
    pub name: &'a [u8],
    /// Flags of mounts (`mount(2)`) on which it could not be opened as it is.
    pub barring: u32,
}

/// Why a file has no place.
#[derive(Debug)]
pub enum NoPlace {
    /// It is on a mount that is in no namespace of the tree.
    Outside(u64),
    /// The kernel does not tell.
    Failed(Errno),
}

impl Place {
    /// The place of an open file.
    pub fn of(file: BorrowedFd<'_>, collector: &mut Collector<'_>) -> Result<Place, NoPlace> {
        if collector.cache(KnownMounts::default).is_empty() {
            return Ok(Place::default());
        }
        let mount = mount_id(file).map_err(NoPlace::Failed)?;
        let known = collector.cache(KnownMounts::default);
        let number = u32::try_from(mount).map_err(|_| NoPlace::Outside(mount))?;
        let Some(id) = known.place_of(number) else {
            let root_is_at_home = collector.namespaces().of_root(NsKind::Mnt).is_none();
            return match root_is_at_home {
                true => Ok(Place::default()),
                false => Err(NoPlace::Outside(mount)),
            };
        };
        let namespaces = collector.namespaces();
        let namespace = namespaces.all().iter().find(|namespace| namespace.id == id);
        let home = namespaces.home();
        Ok(Place {
            mount: Some(number),
            way: namespace.map(|namespace| (Rc::clone(home), Rc::clone(namespace))),
        })
    }

    /// The place where a task finds the same file as one whose mount is in no namespace of the tree, and its name
    /// there. Who leaves its mounts behind keeps its program on them, and what it has open; the kernel shows
    /// names from the root of the mount once nobody has that namespace any more.
    pub fn of_same_file(
        (task, wanted): (HostPid, Wanted<'_>),
        collector: &mut Collector<'_>,
    ) -> Option<(Place, PathBuf)> {
        let own = ProcDir::open(task).ok()?;
        let namespaces = collector.namespaces();
        let identity = namespaces.identity(&own, NsKind::Mnt).ok()??;
        let namespace = Rc::clone(namespaces.find(NsKind::Mnt, identity)?);
        let stat = wanted.stat;
        let (major, minor) = (
            rustix::fs::major(stat.st_dev),
            rustix::fs::minor(stat.st_dev),
        );
        let shown = Path::new(OsStr::from_bytes(wanted.name));
        let known = collector.cache(KnownMounts::default);
        let mounts = known.of_device(kernel_device(major, minor));
        let points = mounts.filter(|(id, _)| *id == namespace.id);
        let names = points.filter_map(|(_, mount)| {
            let inside = shown.strip_prefix(&mount.root).ok()?;
            Some(Path::new(&mount.mountpoint).join(inside))
        });
        let names: Vec<PathBuf> = std::iter::once(shown.into()).chain(names).collect();
        let visit = collector.namespaces().visit(&[&namespace]).ok()?;
        let found = names.into_iter().find_map(|name| {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(CWD, &name, flags, Mode::empty()).ok()?;
            let found = rustix::fs::fstat(&file).ok()?;
            let same = (found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino);
            Some((name, file)).filter(|_| same)
        });
        drop(visit);
        let (name, file) = found?;
        let place = Place::of(file.as_fd(), collector).ok()?;
        let known = collector.cache(KnownMounts::default);
        let flags = known.find(place.mount?)?.flags;
        (flags & wanted.barring == 0).then_some((place, name))
    }

    /// Goes there until the visit is dropped.
    pub fn visit(&self) -> std::io::Result<Option<Visit>> {
        let Some((home, namespace)) = &self.way else {
            return Ok(None);
        };
        home.visit([&namespace.namespace]).map(Some)
    }
}
