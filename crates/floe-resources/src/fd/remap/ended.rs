//! Opening files of processes, in a `proc`, that have ended.

use std::collections::BTreeSet;

use floe_image::messages::{RegFileEntry, RemapType};
use floe_kernel::ids::HostPid;
use floe_kernel::namespace::{Namespace, NsKind};
use floe_kernel::placeholder::Placeholder;

use super::rebuild::remapped_file;
use crate::mount::NamedProcess;
use crate::namespace::has_own_pids;
use crate::restore::{Attempt, ExecuteError, TreeImages, World};

/// Whether a file is one of a task of the tree.
pub fn is_of_task(images: &TreeImages, file: &RegFileEntry) -> bool {
    NamedProcess::of_file(images, file).is_some_and(|process| is_task(images, process))
}

fn is_task(images: &TreeImages, process: NamedProcess) -> bool {
    let nested = &images.nested;
    let first = process.namespace.and_then(|id| nested.first_of(id));
    let is_it = |id: u32| match first {
        None => id == process.pid,
        // Seen from a namespace beside it, it has such a number as well.
        Some(first) => nested.seen_by(first, id) == process.pid,
    };
    images
        .tasks
        .iter()
        .any(|task| is_it(task.pid()) || task.threads.keys().copied().any(is_it))
}

/// Only the first file of such a process has an entry that says so.
fn ended_process(images: &TreeImages, file: &RegFileEntry) -> Option<NamedProcess> {
    let process = NamedProcess::of_file(images, file)?;
    let remaps = images.remaps.values();
    let mut ended = remaps
        .filter(|remap| remap.remap_type() == RemapType::Procfs && remap.remap_id == process.pid)
        .filter_map(|remap| remapped_file(images, remap).ok())
        .filter_map(|file| NamedProcess::of_file(images, file));
    let has_ended = ended.any(|ended| ended == process);
    (has_ended && !is_task(images, process)).then_some(process)
}

/// Processes that have ended and exist again while files are opened in their directories.
#[derive(Default)]
struct BroughtBack(BTreeSet<NamedProcess>);

/// Lets a process stand for the one whose file this is, where that has ended, until the end of the restore: a
/// task whose working directory it is can enter it only as long as the process lives.
pub fn bring_back(world: &mut World<'_>, file: &RegFileEntry) -> Result<(), ExecuteError> {
    let Some(ended) = ended_process(world.images, file) else {
        return Ok(());
    };
    if world.state::<BroughtBack>().0.insert(ended) {
        let what = || file.name.clone();
        let process = stand_in(world, ended).during("Bringing back the process of", what)?;
        world.on_success(move || drop(process));
    }
    Ok(())
}

fn stand_in(world: &mut World<'_>, ended: NamedProcess) -> std::io::Result<Placeholder> {
    let images = world.images;
    let below = ended.namespace.and_then(|id| images.nested.first_of(id));
    let own_pids = has_own_pids(images);
    let member = below.or_else(|| own_pids.then(|| images.root().pid()));
    let Some(member) = member.and_then(|member| world.host_pid(member)) else {
        return Placeholder::start(Some(HostPid(ended.pid.cast_signed())));
    };
    let mut numbers = vec![ended.pid];
    if let Some(first) = below {
        // Nobody of the tree may miss the numbers that it has further out.
        let around = images.nested.below(first).len() - usize::from(!own_pids);
        let count = world.state::<BroughtBack>().0.len() as u32;
        numbers.resize(1 + around, unused(images) + count);
    }
    Placeholder::start_among(&Namespace::of_task(member, NsKind::Pid)?, &numbers)
}

/// A number above all that the tree has, and above those that its helpers may have.
fn unused(images: &TreeImages) -> u32 {
    let tasks = images.tasks.iter();
    let known = tasks.flat_map(|task| {
        let entry = &task.entry;
        let threads = task.threads.keys().copied();
        threads.chain([entry.pid, entry.pgid, entry.sid])
    });
    let highest = known.max().unwrap_or(0).max(images.nested.highest());
    highest + images.tasks.len() as u32
}
