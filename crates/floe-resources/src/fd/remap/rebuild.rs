//! Opening files whose name leads nowhere, or to something else.
//!
//! A deleted file gets its name back for the moment of its opening, so that `/proc` shows the same name
//! afterwards, with ` (deleted)`.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use floe_image::messages::{RegFileEntry, RemapFilePathEntry, RemapType};
use floe_kernel::ids::HostPid;
use floe_kernel::placeholder::Placeholder;
use floe_plan::Handle;
use rustix::fs::{AtFlags, CWD, FileType};

use super::ghost;
use super::names::TemporaryNames;
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, TreeImages, World};

/// Made when all names that exist for the opening of files are gone again.
pub const NAMES_GONE: Handle = Handle::Object("temporary names gone", 0);

fn ghost_handle(id: u32) -> Handle {
    Handle::Object("ghost", u64::from(id))
}

/// Names of deleted files that exist for the time being, by the number of their image.
#[derive(Default)]
struct Ghosts {
    paths: BTreeMap<u32, PathBuf>,
    names: Option<TemporaryNames>,
}

/// Adds the steps that bring deleted files back and remove them again.
pub fn plan_names(planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let images = planner.images;
    let mut users: BTreeMap<u32, Vec<&RegFileEntry>> = BTreeMap::new();
    for remap in images.remaps.values() {
        let file = remapped_file(images, remap)?;
        match remap.remap_type() {
            RemapType::Ghost => users.entry(remap.remap_id).or_default().push(file),
            RemapType::Linked => plan_link(planner, remap)?,
            RemapType::Procfs => {}
        }
    }
    let mut opened = Vec::new();
    for (id, files) in users {
        let image = images.dir.open_ghost(u64::from(id))?;
        // A directory keeps the name under which it is made: it can have no second one.
        let is_directory = FileType::from_raw_mode(image.entry.mode) == FileType::Directory;
        let path = if is_directory {
            PathBuf::from(&files[0].name)
        } else {
            PathBuf::from(format!("{}.cr.{id:x}.ghost", files[0].name))
        };
        let name = format!("bring back the deleted {}", files[0].name);
        planner.step(name, (&[], &[ghost_handle(id)]), move |world| {
            let names = ghost_names(world);
            let undo = names.clone();
            world.on_failure(move || undo.remove_quietly());
            let made = ghost::make(&names, &path, &image)?;
            world.state::<Ghosts>().paths.insert(id, made);
            Ok(())
        });
        opened.extend(files.iter().flat_map(|file| opened_as(images, file.id)));
    }
    let needs: Vec<Handle> = opened.into_iter().map(Handle::File).collect();
    planner.step(
        "remove temporary names",
        (&needs, &[NAMES_GONE]),
        |world| match &world.state::<Ghosts>().names {
            Some(names) => names
                .remove()
                .during("Removing", || "the names of deleted files".into()),
            None => Ok(()),
        },
    );
    Ok(())
}

/// The list of names that deleted files have for the time being.
fn ghost_names(world: &mut World<'_>) -> TemporaryNames {
    if let Some(names) = &world.state::<Ghosts>().names {
        return names.clone();
    }
    let names = TemporaryNames::watched(world.janitor());
    world.state::<Ghosts>().names = Some(names.clone());
    names
}

fn remapped_file<'i>(
    images: &'i TreeImages,
    remap: &RemapFilePathEntry,
) -> Result<&'i RegFileEntry, PlanError> {
    let file = images.files.get(&remap.orig_id);
    file.and_then(|file| file.reg.as_ref()).ok_or_else(|| {
        PlanError::damaged(
            "remap-fpath.img",
            format!("file {:#x} is no file with a name", remap.orig_id),
        )
    })
}

/// The extra name that the dump gave a file goes when the restore is done.
fn plan_link(planner: &mut Planner<'_>, remap: &RemapFilePathEntry) -> Result<(), PlanError> {
    link_name(planner.images, remap)?;
    let sharers = planner.images.remaps.values().filter(|other| {
        other.remap_type() == RemapType::Linked && other.remap_id == remap.remap_id
    });
    if sharers.map(|other| other.orig_id).min() == Some(remap.orig_id) {
        planner.consume("files.img", u64::from(remap.remap_id));
    }
    Ok(())
}

fn link_name<'i>(
    images: &'i TreeImages,
    remap: &RemapFilePathEntry,
) -> Result<&'i Path, PlanError> {
    let file = images.files.get(&remap.remap_id);
    let name = file
        .and_then(|file| file.reg.as_ref())
        .map(|file| file.name.as_str());
    name.map(Path::new).ok_or_else(|| {
        PlanError::damaged(
            "remap-fpath.img",
            format!("file {:#x}, the link, is missing", remap.remap_id),
        )
    })
}

/// Whether an entry is only the extra name of a file, given by `--link-remap`.
pub fn is_link(images: &TreeImages, id: u32) -> bool {
    images
        .remaps
        .values()
        .any(|remap| remap.remap_type() == RemapType::Linked && remap.remap_id == id)
}

fn opened_as(images: &TreeImages, id: u32) -> Vec<u32> {
    match images.named_by(id) {
        [] => vec![id],
        others => others.to_vec(),
    }
}

/// What must exist before the file can be opened by its name.
pub fn needs_of_name(images: &TreeImages, file: &RegFileEntry) -> Vec<Handle> {
    match images.remaps.get(&file.id) {
        Some(remap) if remap.remap_type() == RemapType::Ghost => {
            vec![ghost_handle(remap.remap_id)]
        }
        Some(_) => Vec::new(),
        None => match process_of(&file.name) {
            Some(pid) if is_task(images, pid) => vec![Handle::Tree],
            _ => Vec::new(),
        },
    }
}

/// The process that a name in `/proc` belongs to.
fn process_of(name: &str) -> Option<u32> {
    let (pid, _) = name
        .strip_prefix("/proc/")?
        .split_once('/')
        .unwrap_or((name.strip_prefix("/proc/")?, ""));
    pid.parse().ok()
}

fn is_task(images: &TreeImages, pid: u32) -> bool {
    images
        .tasks
        .iter()
        .any(|task| task.pid() == pid || task.threads.contains_key(&pid))
}

/// Only the first file of a dead process has an entry of its own.
fn dead_process(images: &TreeImages, file: &RegFileEntry) -> Option<u32> {
    let pid = process_of(&file.name)?;
    let dead: BTreeSet<u32> = images
        .remaps
        .values()
        .filter(|remap| remap.remap_type() == RemapType::Procfs)
        .map(|remap| remap.remap_id)
        .collect();
    (dead.contains(&pid) && !is_task(images, pid)).then_some(pid)
}

/// Runs `open` on the file's name, at which the file can be found meanwhile.
pub fn open_by_name(
    world: &mut World<'_>,
    file: &RegFileEntry,
    open: impl FnOnce(&Path) -> rustix::io::Result<OwnedFd>,
) -> Result<OwnedFd, ExecuteError> {
    let path = Path::new(&file.name);
    let what = || file.name.clone();
    let images = world.images;
    let source = match images.remaps.get(&file.id) {
        Some(remap) if remap.remap_type() == RemapType::Ghost => {
            let ghosts = world.state::<Ghosts>();
            ghosts.paths.get(&remap.remap_id).cloned()
        }
        Some(remap) if remap.remap_type() == RemapType::Linked => {
            let link = link_name(images, remap).map_err(ExecuteError::from_plan)?;
            let names = TemporaryNames::default();
            names.adopt(link);
            world.on_success(move || names.remove_quietly());
            Some(link.to_path_buf())
        }
        _ => None,
    };
    let Some(source) = source else {
        let dead = dead_process(images, file).map(|pid| HostPid(pid.cast_signed()));
        let _process = dead
            .map(|pid| Placeholder::start(Some(pid)))
            .transpose()
            .during("Bringing back the process of", what)?;
        return open(path).during("Opening", what);
    };
    if source.is_dir() && !source.is_symlink() {
        return open(&source).during("Opening the deleted directory", what);
    }
    let names = TemporaryNames::watched(world.janitor());
    let linked = names.make_file(path, |path| {
        rustix::fs::linkat(CWD, &source, CWD, path, AtFlags::empty())
    });
    let opened = linked
        .during("Giving its name back to", what)
        .and_then(|name| open(&name).during("Opening", what));
    names.remove().during("Removing the name of", what)?;
    opened
}
