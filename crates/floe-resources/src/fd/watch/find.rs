//! Finding what is watched, at the dump: by its handle, by searching likely places or its whole mount, or
//! among the open files of the tree where it is deleted.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::rc::Rc;

use floe_image::messages::FhEntry;
use floe_kernel::ids::HostPid;
use floe_kernel::namespace::{NsKind, own_fd_path};
use floe_kernel::proc::ProcDir;
use floe_kernel::watch::{FileHandle, handle_of, open_by_handle};
use rustix::fs::{FileType, Mode, OFlags};

use super::search::{search, search_mount};
use super::{Watched, handle_in};
use crate::collect::{CollectError, Collector, FdProbe, Obstacle};
use crate::fd::remap::{self, kernel_device};
use crate::mount::{KnownMounts, fs_name, own_mounts};
use crate::namespace::TreeNamespace;

/// A mount that may show the watched file.
pub(super) struct Sight {
    /// Its number in the images; `None` for one of ours.
    pub mount: Option<u32>,
    namespace: Option<Rc<TreeNamespace>>,
    pub point: PathBuf,
    fs_type: String,
}

impl Sight {
    /// The mount, opened; `None` where another one hides it. To be called in its namespace.
    pub fn open(&self, dev: u32) -> Option<OwnedFd> {
        let path = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rustix::fs::open(&self.point, path, Mode::empty()).ok()?;
        let stat = rustix::fs::fstat(&root).ok()?;
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        // Files of an overlay may have the device of a layer, directories never.
        if is_directory && kernel_device(stat.st_dev) != dev {
            return None;
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory | FileType::RegularFile => {
                rustix::fs::open(own_fd_path(&root), flags, Mode::empty()).ok()
            }
            _ => None,
        }
    }
}

/// Puts the path of a watched file into its handle, where it has one. Returns how the images name the
/// file: a deleted one as its descriptor does, which differs from its watch on overlays.
pub(in crate::fd) fn find_path(
    watched: Watched,
    entry: &mut FhEntry,
    fd: &FdProbe<'_>,
    collector: &mut Collector<'_>,
) -> Result<Watched, CollectError> {
    let sights = sights(watched.dev, collector)?;
    let handle = handle_in(entry);
    let (opened, mut found) = by_handle(watched, handle.as_ref(), (&sights, collector))?;
    if found.is_none() && (!opened || collector.options.force_irmap) {
        found = by_search(watched, handle.as_ref(), (&sights, collector))?;
    }
    if let Some((mount, path)) = found {
        let is_overlay = sights.iter().any(|sight| sight.fs_type == "overlay");
        if is_overlay {
            let path = path.display();
            tracing::warn!(pid = %fd.pid(), fd = %fd.fd(), "the watch on {path}, on an overlay, will be made again by that path");
        }
        let path = path.into_os_string().into_string();
        entry.path = Some(path.map_err(|_| fd.garbled("the path of a watched file"))?);
        entry.mnt_id = mount;
        return Ok(watched);
    }
    let named = match opened {
        false => among_open_files((watched, handle.as_ref()), collector).unwrap_or(watched),
        true => watched,
    };
    let in_memory = |sight: &Sight| matches!(&*sight.fs_type, "tmpfs" | "devtmpfs");
    if !opened || sights.iter().any(in_memory) {
        let (pid, number) = (fd.pid(), fd.fd());
        let what = format!("a watch on inode {} that has no path", watched.ino);
        let remedy = "use --irmap-scan-path with a directory above the watched file";
        collector.defer(move |collector| {
            // A deleted file that is open too is found through that.
            if !remap::is_saved_ghost(named.dev, named.ino, collector) {
                collector.obstacle(Obstacle::fd(pid, number, what, remedy));
            }
            Ok(())
        });
    }
    Ok(named)
}

/// The mounts of a file system, those of the root's namespace first.
fn sights(dev: u32, collector: &mut Collector<'_>) -> Result<Vec<Sight>, CollectError> {
    let known = collector.cache(KnownMounts::default).of_device(dev);
    let known: Vec<_> = known
        .map(|(id, entry)| {
            let fs_type = fs_name(entry).unwrap_or_default();
            (id, entry.mnt_id, entry.mountpoint.clone(), fs_type)
        })
        .collect();
    let all = collector.namespaces().all();
    let mut sights: Vec<Sight> = known
        .into_iter()
        .map(|(id, mount, point, fs_type)| Sight {
            mount: Some(mount),
            namespace: all.iter().find(|namespace| namespace.id == id).cloned(),
            point: PathBuf::from(point),
            fs_type,
        })
        .collect();
    if collector.namespaces().of_root(NsKind::Mnt).is_none() {
        let own = own_mounts(collector)?;
        let of_device = own
            .iter()
            .filter(|mount| mount.dev_major << 20 | mount.dev_minor == dev);
        sights.extend(of_device.map(|mount| Sight {
            mount: None,
            namespace: None,
            point: PathBuf::from(OsStr::from_bytes(&mount.point)),
            fs_type: String::from_utf8_lossy(&mount.fs_type).into_owned(),
        }));
    }
    let of_root = |sight: &Sight| sight.namespace.as_ref().is_some_and(|ns| ns.of_root);
    sights.sort_by_key(|sight| !of_root(sight));
    Ok(sights)
}

type Where<'c, 'a> = (&'c [Sight], &'c mut Collector<'a>);
/// The number of a mount, and a path in its namespace.
type Path = (Option<u32>, PathBuf);

/// Whether the handle can be opened, and where that is.
fn by_handle(
    watched: Watched,
    handle: Option<&FileHandle>,
    (sights, collector): Where<'_, '_>,
) -> Result<(bool, Option<Path>), CollectError> {
    let mut opened = false;
    let Some(handle) = handle else {
        return Ok((false, None));
    };
    for sight in sights {
        let inside = sight.namespace.as_deref();
        let _visit = collector.namespaces().visit(inside.as_slice())?;
        let mount = sight.open(watched.dev);
        let file = mount.and_then(|mount| open_by_handle(mount.as_fd(), handle).ok());
        let Some(file) = file else { continue };
        opened = true;
        if let Some(path) = path_of(file.as_fd()) {
            return Ok((true, Some((sight.mount, path))));
        }
    }
    Ok((opened, None))
}

/// The path of an opened file, if it still leads there.
fn path_of(file: BorrowedFd<'_>) -> Option<PathBuf> {
    let path = std::fs::read_link(own_fd_path(file)).ok()?;
    let (there, here) = (
        rustix::fs::lstat(&path).ok()?,
        rustix::fs::fstat(file).ok()?,
    );
    ((there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)).then_some(path)
}

fn by_search(
    watched: Watched,
    handle: Option<&FileHandle>,
    (sights, collector): Where<'_, '_>,
) -> Result<Option<Path>, CollectError> {
    // Paths are those that the tree sees.
    let inside = collector.namespaces().of_root(NsKind::Mnt).cloned();
    let visit = collector.namespaces().visit(inside.as_deref().as_slice())?;
    let found = search(watched, collector);
    drop(visit);
    if let Some(path) = found {
        return Ok(Some((None, path)));
    }
    for sight in sights {
        let inside = sight.namespace.as_deref();
        let visit = collector.namespaces().visit(inside.as_slice())?;
        let found = search_mount((watched, handle), sight, collector);
        drop(visit);
        if let Some(path) = found {
            return Ok(Some((sight.mount, path)));
        }
    }
    Ok(None)
}

/// A file that some task of the tree has open, as it is named by its descriptor.
fn among_open_files(
    sought: (Watched, Option<&FileHandle>),
    collector: &Collector<'_>,
) -> Option<Watched> {
    collector.processes().find_map(|pid| of_task(pid, sought))
}

fn of_task(pid: HostPid, (watched, handle): (Watched, Option<&FileHandle>)) -> Option<Watched> {
    let proc = ProcDir::open(pid).ok()?;
    let numbers = proc.list("fd").unwrap_or_default();
    let names = numbers.into_iter().map(|number| format!("fd/{number}"));
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    names.chain(["cwd".to_string()]).find_map(|name| {
        let file = proc.open_file(&name, flags).ok()?;
        let stat = rustix::fs::fstat(&file).ok()?;
        let is_it = match handle_of(file.as_fd(), c"") {
            Ok((own, _)) => handle == Some(&own),
            // A kernel before 6.5 has no handles on overlays; the number is the same in both places.
            Err(_) => stat.st_ino == watched.ino && is_on_overlay(file.as_fd()),
        };
        is_it.then_some(Watched {
            dev: kernel_device(stat.st_dev),
            ino: stat.st_ino,
        })
    })
}

fn is_on_overlay(file: BorrowedFd<'_>) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type == libc::OVERLAYFS_SUPER_MAGIC)
}
