//! Opening files whose name leads nowhere, or to something else.
//!
//! A deleted file gets its name back for the moment of its opening, so that `/proc` shows the same name
//! afterwards, with ` (deleted)`.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use floe_image::dir::GhostImage;
use floe_image::messages::{RegFileEntry, RemapFilePathEntry, RemapType};
use floe_plan::Handle;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};

use super::LINK_NAME;
use super::ended;
use super::ghost;
use super::names::TemporaryNames;
use crate::fd::regular;
use crate::fd::unchanged::FileFault;
use crate::mount;
use crate::namespace::OwnerMap;
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, TreeImages, World};

/// Made when all names that exist for the opening of files are gone again.
pub const NAMES_GONE: Handle = Handle::Object("temporary names gone", 0);

fn ghost_handle(id: u32) -> Handle {
    Handle::Object("ghost", u64::from(id))
}

/// Descriptors of deleted files, by the id of the entry with the name, until their own step takes them.
#[derive(Default)]
struct Opened(BTreeMap<u32, OwnedFd>);

/// A name of a deleted file, and how it is opened.
type User<'i> = (&'i RegFileEntry, OFlags);

/// Adds the steps that open deleted files.
///
/// One step brings the file back, opens it for all who have it, and removes it again, so that nothing of
/// it is to be seen between steps.
pub fn plan_names(planner: &mut Planner<'_>) -> Result<(), PlanError> {
    let images = planner.images;
    let mut users: BTreeMap<u32, Vec<User<'_>>> = BTreeMap::new();
    for remap in images.remaps.values() {
        let file = remapped_file(images, remap)?;
        match remap.remap_type() {
            RemapType::Ghost => {
                let user = (file, regular::flags_by_name(file, planner));
                users.entry(remap.remap_id).or_default().push(user);
            }
            RemapType::Linked => plan_link(planner, remap)?,
            RemapType::Procfs => {}
        }
    }
    let gone: Vec<Handle> = users.keys().map(|id| ghost_handle(*id)).collect();
    for (id, users) in users {
        let image = images.dir.open_ghost(u64::from(id))?;
        check_kind(images, id, &users, &image)?;
        let name = format!("open the deleted {}", users[0].0.name);
        let needs: Vec<Handle> = users
            .iter()
            .flat_map(|(file, _)| mount::needs_of_file(images, file))
            .collect();
        planner.step(name, (&needs, &[ghost_handle(id)]), move |world| {
            open_ghost(world, &users, &image)
        });
    }
    planner.step(
        "no temporary names are left",
        (&gone, &[NAMES_GONE]),
        |_| Ok(()),
    );
    Ok(())
}

/// Only the ends of a fifo may open one: to others it would be a file that nobody ever writes.
fn check_kind(
    images: &TreeImages,
    id: u32,
    users: &[User<'_>],
    image: &GhostImage,
) -> Result<(), PlanError> {
    let is_fifo = FileType::from_raw_mode(image.entry.mode) == FileType::Fifo;
    let stranger = |(file, _): &&User<'_>| images.named_by(file.id).is_empty();
    match users.iter().find(stranger) {
        Some((file, _)) if is_fifo => {
            let what = format!("it is a fifo, and {} is open as a file", file.name);
            Err(PlanError::damaged(format!("ghost-file-{id:x}.img"), what))
        }
        _ => Ok(()),
    }
}

/// Makes the file, opens it for its users, each where it had its name, and removes it again.
fn open_ghost(
    world: &mut World<'_>,
    users: &[User<'_>],
    image: &GhostImage,
) -> Result<(), ExecuteError> {
    let first = users[0].0;
    let (names, ghost) = mount::in_place_of(world, first.mnt_id, |world| {
        let _writable = mount::Writable::of(world.images, first.mnt_id)?;
        let names = TemporaryNames::watched(world.janitor());
        let ghost = make_ghost(first, image, &names, &world.images.owners);
        Ok((names, ghost))
    })?;
    let opened = ghost.and_then(|ghost| open_for_all(world, users, (&ghost, image)));
    let removed = mount::in_place_of(world, first.mnt_id, |world| {
        let _writable = mount::Writable::of(world.images, first.mnt_id)?;
        names
            .remove()
            .during("Removing the name of", || first.name.clone())
    });
    opened.and(removed)
}

/// A directory keeps the name under which it is made: it can have no second one.
fn is_directory(image: &GhostImage) -> bool {
    FileType::from_raw_mode(image.entry.mode) == FileType::Directory
}

fn make_ghost(
    first: &RegFileEntry,
    image: &GhostImage,
    names: &TemporaryNames,
    owners: &OwnerMap,
) -> Result<PathBuf, ExecuteError> {
    if is_directory(image) {
        return ghost::make(names, Path::new(&first.name), image, owners);
    }
    let name = format!("{}.cr.{:x}.ghost", first.name, first.id);
    ghost::make(names, Path::new(&name), image, owners)
}

fn open_for_all(
    world: &mut World<'_>,
    users: &[User<'_>],
    (ghost, image): (&Path, &GhostImage),
) -> Result<(), ExecuteError> {
    let first = users[0].0.mnt_id;
    for (file, flags) in users {
        let opened = mount::in_place_of(world, file.mnt_id, |world| {
            let _writable = mount::Writable::of(world.images, file.mnt_id)?;
            let open = |path: &Path| rustix::fs::open(path, *flags, Mode::empty());
            let (here, names) = in_sight(world, (first, ghost), file)?;
            if is_directory(image) {
                return open(&here).during("Opening the deleted directory", || file.name.clone());
            }
            let opened = open_linked(&here, (Path::new(&file.name), &names), open);
            let removed = names.remove();
            removed.during("Removing a second name of", || file.name.clone())?;
            opened
        })?;
        world.state::<Opened>().0.insert(file.id, opened);
    }
    Ok(())
}

/// The name by which a file of another mount is found in the mount of `file`, in whose namespace the
/// coordinator is: where it has none there, it is given one, which is among the names returned.
fn in_sight(
    world: &mut World<'_>,
    (mount, name): (Option<i32>, &Path),
    file: &RegFileEntry,
) -> Result<(PathBuf, TemporaryNames), ExecuteError> {
    let names = TemporaryNames::watched(world.janitor());
    let Some(text) = name.to_str() else {
        return Ok((name.to_path_buf(), names));
    };
    if let Some(seen) = mount::seen_from(world.images, text, (mount, file.mnt_id)) {
        return Ok((seen.into(), names));
    }
    let to = (file.mnt_id, file.name.as_str());
    let Some(given) = mount::bring_into_sight(world, (mount, text), to)? else {
        return Ok((name.to_path_buf(), names));
    };
    names.adopt(Path::new(&given));
    Ok((given.into(), names))
}

/// Opens a file under a name that it has for that moment only.
fn open_linked(
    source: &Path,
    (path, watched): (&Path, &TemporaryNames),
    open: impl FnOnce(&Path) -> rustix::io::Result<OwnedFd>,
) -> Result<OwnedFd, ExecuteError> {
    let what = || path.display().to_string();
    let names = watched.another();
    let linked = names.make_file(path, |path| {
        rustix::fs::linkat(CWD, source, CWD, path, AtFlags::empty())
    });
    let opened = linked
        .during("Giving its name back to", what)
        .and_then(|name| open(&name).during("Opening", what));
    names.remove().during("Removing the name of", what)?;
    opened
}

pub(super) fn remapped_file<'i>(
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
    let name = name.map(Path::new).ok_or_else(|| {
        PlanError::damaged(
            "remap-fpath.img",
            format!("file {:#x}, the link, is missing", remap.remap_id),
        )
    })?;
    // It goes when the restore is done: no other file may be taken for it.
    let last = name.file_name().map(|last| last.as_encoded_bytes());
    if !last.is_some_and(|last| last.starts_with(LINK_NAME.as_bytes())) {
        let what = format!("{} is no name that a dump gives to a file", name.display());
        return Err(PlanError::damaged("files.img", what));
    }
    Ok(name)
}

/// Whether an entry is only the extra name of a file, given by `--link-remap`.
pub fn is_link(images: &TreeImages, id: u32) -> bool {
    images
        .remaps
        .values()
        .any(|remap| remap.remap_type() == RemapType::Linked && remap.remap_id == id)
}

/// What must exist before the file can be opened by its name.
pub fn needs_of_name(images: &TreeImages, file: &RegFileEntry) -> Vec<Handle> {
    let mut needs = mount::needs_of_file(images, file);
    match images.remaps.get(&file.id) {
        Some(remap) if remap.remap_type() == RemapType::Ghost => {
            needs.push(ghost_handle(remap.remap_id));
        }
        Some(_) => {}
        None if ended::is_of_task(images, file) => needs.push(Handle::Tree),
        None => {}
    }
    needs
}

/// Runs `open` on the file's name, at which the file can be found meanwhile. Deleted files are open already.
pub fn open_by_name(
    world: &mut World<'_>,
    file: &RegFileEntry,
    open: impl FnOnce(&Path) -> rustix::io::Result<OwnedFd>,
) -> Result<OwnedFd, ExecuteError> {
    let remap = world.images.remaps.get(&file.id);
    if let Some(remap) = remap.filter(|remap| remap.remap_type() == RemapType::Linked) {
        let link = link_of(world.images, remap)?;
        remove_at_the_end(world, link)?;
    }
    mount::in_place_of(world, file.mnt_id, |world| open_here(world, file, open))
}

/// The name that the dump has given a file, with its mount.
fn link_of<'i>(
    images: &'i TreeImages,
    remap: &RemapFilePathEntry,
) -> Result<(Option<i32>, &'i Path), ExecuteError> {
    let link = link_name(images, remap).map_err(ExecuteError::from_plan)?;
    let entry = images.files.get(&remap.remap_id);
    let mount = entry.and_then(|entry| entry.reg.as_ref()?.mnt_id);
    Ok((mount, link))
}

/// The name that the dump has given a file goes when the restore is done.
fn remove_at_the_end(
    world: &mut World<'_>,
    (mount, link): (Option<i32>, &Path),
) -> Result<(), ExecuteError> {
    let names = TemporaryNames::default();
    names.adopt(link);
    match mount::way_to(world, mount)? {
        None => world.on_success(move || names.remove_quietly()),
        Some((home, namespace)) => world.on_success(move || match home.visit([&*namespace]) {
            Ok(_visit) => names.remove_quietly(),
            Err(error) => tracing::warn!(%error, "a temporary name stays"),
        }),
    }
    Ok(())
}

fn open_here(
    world: &mut World<'_>,
    file: &RegFileEntry,
    open: impl FnOnce(&Path) -> rustix::io::Result<OwnedFd>,
) -> Result<OwnedFd, ExecuteError> {
    let path = Path::new(&file.name);
    let what = || file.name.clone();
    let images = world.images;
    match images.remaps.get(&file.id) {
        Some(remap) if remap.remap_type() == RemapType::Ghost => {
            let opened = world.state::<Opened>().0.remove(&file.id);
            return opened
                .ok_or(rustix::io::Errno::BADF)
                .during("Finding the deleted", what);
        }
        Some(remap) if remap.remap_type() == RemapType::Linked => {
            let link = link_of(images, remap)?;
            let (link, names) = in_sight(world, link, file)?;
            let opened = open_linked(&link, (path, &names), open);
            names.remove().during("Removing a second name of", what)?;
            return opened;
        }
        _ => {}
    }
    ended::bring_back(world, file)?;
    open(path).map_err(|errno| {
        FileFault::Unreachable {
            path: path.to_path_buf(),
            error: errno.into(),
        }
        .into()
    })
}
