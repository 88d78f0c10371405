//! Whether the files and outside mounts of a checkpoint are here, as they were.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use floe_archive::check::Row;
use floe_image::messages::{MntEntry, RegFileEntry};
use floe_kernel::namespace::NsKind;
use floe_options::{External, RestoreOptions};
use floe_resources::fd::tty::is_pseudo;
use floe_resources::fd::unchanged::{self, FileFault};
use floe_resources::mount;
use floe_resources::namespace::own_of_root;
use floe_resources::restore::TreeImages;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

/// Where the files of a tree are looked for.
struct Roots<'i> {
    images: &'i TreeImages,
    /// The root of the tree's own mounts, which comes from here: its number in the images, and what it will be.
    own: Option<(u32, OwnedFd)>,
}

impl<'i> Roots<'i> {
    fn find(images: &'i TreeImages, options: &RestoreOptions) -> Result<Self, FileFault> {
        let own = own_of_root(images, NsKind::Mnt).and_then(|id| images.mounts.get(&id));
        let Some(mounts) = own else {
            return Ok(Roots { images, own: None });
        };
        let is_there = |number: u32| mounts.iter().any(|mount| mount.mnt_id == number);
        let root = mounts.iter().find(|mount| !is_there(mount.parent_mnt_id));
        let is_made =
            |root: &&MntEntry| root.floe_own_root == Some(true) && options.mounts.root.is_none();
        if root.as_ref().is_some_and(is_made) {
            return Ok(Roots { images, own: None });
        }
        let path = options.mounts.root.as_deref().unwrap_or(Path::new("/"));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(path, flags, Mode::empty());
        let opened = opened.map_err(|errno| FileFault::NoMount {
            path: path.to_path_buf(),
            error: errno.into(),
        })?;
        let own = root.map(|root| (root.mnt_id, opened));
        Ok(Roots { images, own })
    }

    /// Whether a file is on a mount that a restore makes anew, with all that is in it.
    fn makes(&self, file: &RegFileEntry) -> bool {
        let number = file.mnt_id.and_then(|number| u32::try_from(number).ok());
        let Some(number) = number else {
            return false;
        };
        let mut all = self.images.mounts.values().flatten();
        let is_root = self.own.as_ref().is_some_and(|(root, _)| *root == number);
        !is_root && all.any(|mount| mount.mnt_id == number)
    }

    /// Opens nothing: a device or a fifo would notice.
    fn name(&self, file: &RegFileEntry) -> Result<OwnedFd, FileFault> {
        let path = Path::new(&file.name);
        let saved = OFlags::from_bits_retain(file.flags) & OFlags::NOFOLLOW;
        let flags = OFlags::PATH | OFlags::CLOEXEC | saved;
        let named = match &self.own {
            None => rustix::fs::openat(CWD, path, flags, Mode::empty()),
            Some((_, root)) => {
                rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
            }
        };
        named.map_err(|errno| FileFault::Unreachable {
            path: path.to_path_buf(),
            error: errno.into(),
        })
    }
}

/// Files that a task had open, mapped or as its directory.
pub(super) fn rows(images: &TreeImages, options: &RestoreOptions) -> Vec<Row> {
    let roots = match Roots::find(images, options) {
        Ok(roots) => roots,
        Err(fault) => return vec![Row::bad("files", fault.to_string(), fault.remedy())],
    };
    let named = images.files.values().filter_map(|file| file.reg.as_ref());
    // Those come with the terminals.
    let terminals = images.files.values().filter_map(|file| file.tty.as_ref());
    let terminals = terminals.filter(|tty| is_pseudo(tty.tty_info_id));
    let terminals: BTreeSet<_> = terminals.filter_map(|tty| tty.regf_id).collect();
    let (mut count, mut made) = (0, 0);
    let mut seen = BTreeSet::new();
    let mut rows = Vec::new();
    for file in named {
        let looked_at = file.name.starts_with('/')
            && !file.name.starts_with("/proc/")
            && !file.ext.unwrap_or(false)
            && !is_given(file, options)
            && !terminals.contains(&file.id)
            && !images.remaps.contains_key(&file.id);
        if !looked_at || !seen.insert((&file.name, file.size, file.mode)) {
            continue;
        }
        if roots.makes(file) {
            made += 1;
            continue;
        }
        count += 1;
        if let Err(fault) = look_at(file, &roots, options) {
            rows.push(Row::bad("files", fault.to_string(), fault.remedy()));
        }
    }
    if rows.is_empty() {
        let text = format!("{count} files and directories are as they were");
        rows.push(Row::good("files", text));
    }
    if made > 0 {
        let text = format!("{made} files on mounts of the tree's own are not looked at");
        rows.push(Row::note("files", text));
    }
    rows
}

/// Whether the caller hands over a descriptor in its place.
fn is_given(file: &RegFileEntry, options: &RestoreOptions) -> bool {
    let name = file.name.trim_start_matches('/');
    let mut given = options.inherit_fds.iter();
    given.any(|given| given.resource.trim_start_matches('/') == name)
}

fn look_at(
    file: &RegFileEntry,
    roots: &Roots<'_>,
    options: &RestoreOptions,
) -> Result<(), FileFault> {
    let named = roots.name(file)?;
    let stat = rustix::fs::fstat(&named).map_err(|errno| FileFault::Unreachable {
        path: PathBuf::from(&file.name),
        error: errno.into(),
    })?;
    if file.build_id.is_empty() {
        return unchanged::compare_stat(file, &stat, options);
    }
    match std::fs::File::open(format!("/proc/self/fd/{}", named.as_raw_fd())) {
        Ok(opened) => unchanged::compare(file, (opened, &stat), options),
        Err(_) => unchanged::compare_stat(file, &stat, options),
    }
}

/// Places on this machine that mounts come from: named by the options, or found outside by the dump.
pub(super) fn mounts(images: &TreeImages, options: &RestoreOptions) -> Vec<Row> {
    if images.mounts.is_empty() {
        return Vec::new();
    }
    let is_elsewhere = |mount: &&MntEntry| {
        let mut named = options.external.iter();
        named.any(|one| matches!(one, External::Mount { key, .. } if *key == mount.mountpoint))
    };
    let found = images.mounts.values().flatten();
    let found = found.filter(|mount| mount::comes_from_caller(mount) && !is_elsewhere(mount));
    let external = options.external.iter().filter_map(|one| match one {
        External::Mount { key, value } | External::Device { key, value } => Some((key, value)),
        _ => None,
    });
    let mapped = options.mounts.ext_mount_map.iter();
    let named = external.chain(mapped.map(|map| (&map.key, &map.value)));
    let root = options.mounts.root.as_deref();
    let paths = named.map(|(_, value)| Path::new(value)).chain(root);
    let paths: BTreeSet<&Path> = paths
        .chain(found.map(|mount| Path::new(&mount.source)))
        .collect();
    let mut rows: Vec<Row> = paths.into_iter().filter_map(absent).collect();
    if rows.is_empty() {
        let text = "every place that mounts come from is here";
        rows.push(Row::good("mounts", text));
    }
    rows
}

fn absent(path: &Path) -> Option<Row> {
    // Relative ones begin at the root.
    let path = PathBuf::from("/").join(path);
    let error = std::fs::metadata(&path).err()?;
    let fault = FileFault::NoMount { path, error };
    Some(Row::bad("mounts", fault.to_string(), fault.remedy()))
}
