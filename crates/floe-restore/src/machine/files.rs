//! Whether the files and outside mounts of a checkpoint are here, as they were.

use std::collections::BTreeSet;
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
use rustix::fs::{CWD, Mode, OFlags};

/// Whether a file is found through a mount of the tree's own.
fn is_on_own_mount(images: &TreeImages, file: &RegFileEntry) -> bool {
    let number = file.mnt_id.and_then(|number| u32::try_from(number).ok());
    let mut all = images.mounts.values().flatten();
    number.is_some_and(|number| all.any(|mount| mount.mnt_id == number))
}

/// Files that a task had open, mapped or as its directory.
pub(super) fn rows(images: &TreeImages, options: &RestoreOptions) -> Vec<Row> {
    if own_of_root(images, NsKind::Mnt).is_some() {
        return vec![Row::note(
            "files",
            "the tasks had mounts of their own; their files are not looked at",
        )];
    }
    let named = images.files.values().filter_map(|file| file.reg.as_ref());
    // Those come with the terminals.
    let terminals = images.files.values().filter_map(|file| file.tty.as_ref());
    let terminals = terminals.filter(|tty| is_pseudo(tty.tty_info_id));
    let terminals: BTreeSet<_> = terminals.filter_map(|tty| tty.regf_id).collect();
    let mut count = 0;
    let mut seen = BTreeSet::new();
    let mut rows = Vec::new();
    for file in named {
        let looked_at = file.name.starts_with('/')
            && !file.name.starts_with("/proc/")
            && !file.ext.unwrap_or(false)
            && !is_given(file, options)
            && !is_on_own_mount(images, file)
            && !terminals.contains(&file.id)
            && !images.remaps.contains_key(&file.id);
        if !looked_at || !seen.insert((&file.name, file.size, file.mode)) {
            continue;
        }
        count += 1;
        if let Err(fault) = look_at(file, options) {
            rows.push(Row::bad("files", fault.to_string(), fault.remedy()));
        }
    }
    if rows.is_empty() {
        rows.push(Row::good(
            "files",
            format!("{count} files and directories are as they were"),
        ));
    }
    rows
}

/// Whether the caller hands over a descriptor in its place.
fn is_given(file: &RegFileEntry, options: &RestoreOptions) -> bool {
    let name = file.name.trim_start_matches('/');
    let mut given = options.inherit_fds.iter();
    given.any(|given| given.resource.trim_start_matches('/') == name)
}

fn look_at(file: &RegFileEntry, options: &RestoreOptions) -> Result<(), FileFault> {
    let path = Path::new(&file.name);
    let failed = |errno: rustix::io::Errno| FileFault::Unreachable {
        path: path.to_path_buf(),
        error: errno.into(),
    };
    // O_PATH opens nothing: a device or a fifo would notice.
    let saved = OFlags::from_bits_retain(file.flags) & OFlags::NOFOLLOW;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let named = rustix::fs::openat(CWD, path, flags | saved, Mode::empty()).map_err(failed)?;
    let stat = rustix::fs::fstat(&named).map_err(failed)?;
    if file.build_id.is_empty() {
        return unchanged::compare_stat(file, &stat, options);
    }
    match std::fs::File::open(path) {
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
