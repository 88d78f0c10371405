//! Second names for files, in mounts that do not see the first one: given through a mount of all of their
//! file system.

use std::os::fd::OwnedFd;

use floe_image::messages::MntEntry;
use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::model::below;
use super::plan::{find_mount, join};
use crate::restore::{Attempt, ExecuteError, World};

/// A mount of all that the tree sees of a file system; it is in no namespace of the tree.
#[derive(Debug)]
pub struct Whole {
    pub device: u32,
    /// Its root, as a path in its file system.
    pub root: String,
    pub mount: OwnedFd,
}

/// Those of a tree, as long as it is being restored.
#[derive(Default)]
pub struct Wholes(pub Vec<Whole>);

/// Gives a file a second name near `wanted`, which is in the sight of the mount `to`, and returns it; `None`
/// where the file is on that mount anyway, or on another file system. Whoever asks removes the name.
pub fn bring_into_sight(
    world: &mut World<'_>,
    (from, name): (Option<i32>, &str),
    (to, wanted): (Option<i32>, &str),
) -> Result<Option<String>, ExecuteError> {
    let images = world.images;
    let entry = |number: Option<i32>| Some(find_mount(images, number?)?.1);
    let (Some(from), Some(to)) = (entry(from), entry(to)) else {
        return Ok(None);
    };
    if from.mnt_id == to.mnt_id || from.root_dev != to.root_dev {
        return Ok(None);
    }
    let Some(inside) = in_file_system(from, name) else {
        return Ok(None);
    };
    for whole in &world.state::<Wholes>().0 {
        let source = below(&inside, &whole.root).filter(|_| whole.device == from.root_dev);
        let Some(source) = source else { continue };
        if let Some(made) = link_near(whole, source, (to, wanted))? {
            return Ok(Some(made));
        }
    }
    Ok(None)
}

fn in_file_system(mount: &MntEntry, name: &str) -> Option<String> {
    Some(join(&mount.root, below(name, &mount.mountpoint)?))
}

/// Links a file in the directory of `wanted`, or in the nearest one above that is there.
fn link_near(
    whole: &Whole,
    source: &str,
    (to, wanted): (&MntEntry, &str),
) -> Result<Option<String>, ExecuteError> {
    for directory in std::path::Path::new(wanted).ancestors().skip(1) {
        let Some(name) = directory.join(LINK).to_str().map(str::to_string) else {
            return Ok(None);
        };
        let target = in_file_system(to, &name);
        let target = target.as_deref().and_then(|path| below(path, &whole.root));
        let Some(target) = target else {
            return Ok(None);
        };
        let (at, flags) = (&whole.mount, AtFlags::empty());
        match rustix::fs::linkat(at, source, at, target, flags) {
            Ok(()) => return Ok(Some(name)),
            Err(Errno::NOENT) => {}
            linked => {
                linked.during("Giving a second name to", || source.to_string())?;
            }
        }
    }
    Ok(None)
}

/// The name of such a link.
const LINK: &str = ".floe.link";
