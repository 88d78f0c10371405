//! System V shared memory (`shmget(2)`): all of a namespace of the tree, and what the tree has attached
//! of the host's.
//!
//! Saved:    key, number, size, permissions, owner and creator; the content.
//! Rebuilt:  made with the key and number that it had, and filled; then attached by the tasks. What is
//!           still there on the host is attached again, with its content of the dump unless others use
//!           it. Needs: the namespace and its limits.
//! Not kept: times, and the pids of creator and last user.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use floe_image::ImageKind;
use floe_image::messages::IpcShmEntry;
use floe_kernel::ids::HostPid;
use floe_kernel::janitor::NameKind;
use floe_kernel::namespace::NsKind;
use floe_kernel::proc::{ShmSegment, parse_sysvipc_shm};
use floe_kernel::shared_anonymous::SharedAnonymous;
use floe_kernel::sysv::shm;
use floe_plan::Handle;
use rustix::fs::FallocateFlags;

use super::{Numbered, check_number, describe, limited, list, outside};
use crate::collect::{CollectError, Collector, Obstacle, PathFile, Segment};
use crate::fd::memfd::{huge_flag, reopen};
use crate::namespace::ids::host_number;
use crate::namespace::{OwnerMap, TreeNamespace, made};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, TreeImages, World};

const NUMBERED: Numbered = Numbered {
    noun: "shared memory",
    next: "/proc/sys/kernel/shm_next_id",
    remove: shm::remove,
};
/// `SHM_HUGETLB`.
const HUGE: u32 = 0o4000;

/// The host's segments as they were when the first one was met.
struct OfHost(Vec<ShmSegment>);

/// Sizes of the segments in the namespace of the tree, by number; none where it has no own one.
#[derive(Default)]
struct OfTree(Option<HashMap<u64, u64>>);

fn all() -> io::Result<Vec<ShmSegment>> {
    list("shm", parse_sysvipc_shm)
}

/// Opens all segments; we are inside.
pub fn collect() -> Result<Vec<(ShmSegment, OwnedFd)>, CollectError> {
    let failed = |action: &str| {
        let action = action.to_string();
        move |source| CollectError::System { action, source }
    };
    let segments = all().map_err(failed("Listing System V shared memory"))?;
    let open = |segment: ShmSegment| {
        let attached = shm::attach(segment.owner.id, segment.size);
        let attached = attached.map_err(failed("Attaching to System V shared memory"))?;
        Ok((segment, attached.into_fd()))
    };
    segments.into_iter().map(open).collect()
}

/// Has the segments of a namespace saved.
pub fn encode(
    segments: Vec<(ShmSegment, OwnedFd)>,
    namespace: &TreeNamespace,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let (pid, image) = (namespace.member, u64::from(namespace.id));
    let sizes = segments
        .iter()
        .map(|(segment, _)| (u64::from(segment.owner.id.cast_unsigned()), segment.size));
    collector.cache(OfTree::default).0 = Some(sizes.collect());
    collector.side(ImageKind::IpcnsShm, image)?;
    for (segment, file) in segments {
        let saved = Saved {
            pid,
            image,
            segment,
            file,
        };
        saved.defer(collector);
    }
    Ok(())
}

/// The segment behind a mapping, which is saved once for all of its mappings; returns its number.
pub fn collect_attached(
    (pid, id): (HostPid, u64),
    file: &PathFile,
    collector: &mut Collector<'_>,
) -> Result<u64, CollectError> {
    let failed = |action| {
        move |source: io::Error| CollectError::Task {
            pid,
            action,
            source,
        }
    };
    let size = file.stat().st_size.cast_unsigned();
    let foreign = || {
        CollectError::Unsupported(Obstacle {
            pid,
            object: format!("System V shared memory {id} of another IPC namespace"),
            remedy: "detach it before leaving the namespace that it belongs to".to_string(),
        })
    };
    if let Some(sizes) = &collector.cache(OfTree::default).0 {
        return match sizes.get(&id) == Some(&size) {
            true => Ok(id),
            false => Err(foreign()),
        };
    }
    let known = collector.try_cache(|_| {
        let listed = all().map_err(failed("Listing System V shared memory"));
        listed.map(OfHost)
    })?;
    let found = known
        .0
        .iter()
        .find(|segment| u64::try_from(segment.owner.id) == Ok(id) && segment.size == size);
    let &segment = found.ok_or_else(foreign)?;
    let opened = reopen(file.file()).map_err(io::Error::from);
    let saved = Saved {
        pid,
        image: host_namespace(),
        segment,
        file: opened.map_err(failed("Opening System V shared memory"))?,
    };
    saved.defer(collector);
    Ok(id)
}

/// A segment to be saved.
struct Saved {
    pid: HostPid,
    /// Number of its image.
    image: u64,
    segment: ShmSegment,
    file: OwnedFd,
}

impl Saved {
    /// Saves it when everything else is known that has pages in an image of its own.
    fn defer(self, collector: &mut Collector<'_>) {
        collector.defer(move |collector| self.save(collector));
    }

    fn save(self, collector: &mut Collector<'_>) -> Result<(), CollectError> {
        let size = self.segment.size;
        let id = u64::from(self.segment.owner.id.cast_unsigned());
        let huge = huge_flag(self.pid, self.file.as_fd())?;
        // Segments and other memory are numbered apart, their images are not.
        let in_pagemaps = !collector.has_segment(id);
        let entry = IpcShmEntry {
            desc: describe(&self.segment.owner, collector.owners()),
            size,
            in_pagemaps: Some(in_pagemaps),
            hugetlb_flag: huge.map(|flag| flag | HUGE),
        };
        let image = collector.side(ImageKind::IpcnsShm, self.image)?;
        image.append(&entry)?;
        if !in_pagemaps {
            return self.append_content(collector);
        }
        let file = self.file;
        collector.add_segment(Segment { id, file, size });
        Ok(())
    }

    fn append_content(&self, collector: &mut Collector<'_>) -> Result<(), CollectError> {
        const CHUNK: u64 = 1 << 20;
        let image = collector.side(ImageKind::IpcnsShm, self.image)?;
        let size = self.segment.size;
        let mut buffer = Vec::new();
        for start in (0..size).step_by(CHUNK as usize) {
            let len = CHUNK.min(size - start) as usize;
            buffer.resize(len, 0);
            let read = rustix::io::pread(&self.file, &mut buffer, start);
            let whole = match read.map_err(io::Error::from) {
                Ok(read) if read == len => Ok(()),
                Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) => Err(error),
            };
            whole.map_err(|source| CollectError::Task {
                pid: self.pid,
                action: "Reading System V shared memory",
                source,
            })?;
            buffer.resize(len.next_multiple_of(4), 0);
            image.append_raw(&buffer)?;
        }
        Ok(())
    }
}

/// The number that our own IPC namespace has in our images.
fn host_namespace() -> u64 {
    u64::from(host_number(NsKind::Ipc))
}

/// The namespace of the root task in the images.
fn namespace(images: &TreeImages) -> u64 {
    let ids = images.root().ids.as_ref();
    ids.and_then(|ids| ids.ipc_ns_id)
        .map_or_else(host_namespace, u64::from)
}

fn read(images: &TreeImages, namespace: u64) -> Result<Vec<(IpcShmEntry, Vec<u8>)>, PlanError> {
    let entries: Vec<(IpcShmEntry, Vec<u8>)> =
        images.dir.read_with_extra(ImageKind::IpcnsShm, namespace)?;
    for (entry, _) in &entries {
        let image = || ImageKind::IpcnsShm.file_name(namespace);
        check_number(&entry.desc, image())?;
        if i64::try_from(entry.size).is_err() {
            let what = format!("the size of segment {} is impossible", entry.desc.id);
            return Err(PlanError::damaged(image(), what));
        }
    }
    Ok(entries)
}

/// Size in bytes of every saved segment, by its number.
pub fn sizes(images: &TreeImages) -> Result<BTreeMap<u64, u64>, PlanError> {
    let entries = read(images, namespace(images))?;
    let entries = entries.iter().map(|(entry, _)| entry);
    Ok(entries
        .map(|entry| (u64::from(entry.desc.id), entry.size))
        .collect())
}

/// Made by the step that has a segment ready to be attached.
pub fn provided(id: u64) -> Handle {
    Handle::Object("System V segment", id)
}

/// Adds the steps that find or make the segments of the host that the tree has attached.
pub fn plan_attached(planner: &mut Planner<'_>) -> Result<(), PlanError> {
    if namespace(planner.images) != host_namespace() {
        return Ok(());
    }
    for (entry, content) in read(planner.images, host_namespace())? {
        let id = entry.desc.id;
        let makes = [provided(u64::from(id))];
        let name = format!("find or make System V shared memory {id}");
        planner.step_at_home(name, (&[], &makes), move |world| {
            find_or_make(world, &entry, &content)
        });
    }
    Ok(())
}

/// Adds the steps that make the segments of a namespace; returns what they make.
pub fn plan_namespace(id: u32, planner: &mut Planner<'_>) -> Result<Vec<Handle>, PlanError> {
    let mut made_by_steps = Vec::new();
    for (entry, content) in read(planner.images, u64::from(id))? {
        let number = entry.desc.id;
        let makes = [provided(u64::from(number))];
        made_by_steps.extend(makes);
        let name = format!("make System V shared memory {number}");
        planner.step_at_home(name, (&[made(id), limited(id)], &makes), move |world| {
            make_inside(world, id, entry, &content)
        });
    }
    Ok(made_by_steps)
}

fn make_inside(
    world: &mut World<'_>,
    id: u32,
    entry: IpcShmEntry,
    content: &[u8],
) -> Result<(), ExecuteError> {
    let attached = world.in_namespace(id, |world| {
        make(&entry, &world.images.owners)?;
        filled(world, &entry, content)
    })?;
    let (home, inside) = world.namespaces().way_to(&[id])?;
    world.before_release(
        move || match home.visit(inside.iter().map(|namespace| &**namespace)) {
            Ok(_visit) => hand_over(&entry, attached),
            Err(error) => tracing::warn!(%error, "no way back into the IPC namespace"),
        },
    );
    Ok(())
}

fn find_or_make(
    world: &mut World<'_>,
    entry: &IpcShmEntry,
    content: &[u8],
) -> Result<(), ExecuteError> {
    let id = entry.desc.id;
    let listed = all().during("Listing", || "System V shared memory".to_string())?;
    match present(entry, (&listed, &world.images.owners))? {
        Some(there) if there.attached > 0 => {
            tracing::warn!(
                segment = id,
                "System V shared memory is in use: it keeps its present content"
            );
            return Ok(());
        }
        Some(_) => {}
        None => {
            make(entry, &world.images.owners)?;
            world.made_name(NameKind::SharedMemory, PathBuf::from(id.to_string()));
        }
    }
    let attached = filled(world, entry, content)?;
    let entry = entry.clone();
    world.before_release(move || hand_over(&entry, attached));
    Ok(())
}

/// The tasks have it now: the last one to detach from marked memory takes it away.
fn hand_over(entry: &IpcShmEntry, attached: SharedAnonymous) {
    let id = entry.desc.id.cast_signed();
    let marked = entry.desc.mode & shm::MARKED != 0;
    if marked && let Err(error) = shm::remove(id) {
        tracing::warn!(%error, segment = id, "System V shared memory is not marked to go");
    }
    drop(attached);
}

/// Attaches to a segment and gives it its content.
fn filled(
    world: &World<'_>,
    entry: &IpcShmEntry,
    content: &[u8],
) -> Result<SharedAnonymous, ExecuteError> {
    let id = entry.desc.id;
    let attached = shm::attach(id.cast_signed(), entry.size);
    let mut attached = attached.during("Attaching to System V segment", || id.to_string())?;
    fill(world, entry, content, &mut attached)?;
    Ok(attached)
}

/// The segment of the dump, if it is still there. Its number or key may not be somebody else's.
fn present<'l>(
    entry: &IpcShmEntry,
    (listed, owners): (&'l [ShmSegment], &OwnerMap),
) -> Result<Option<&'l ShmSegment>, ExecuteError> {
    let wanted = &entry.desc;
    let same = |segment: &ShmSegment| {
        let there = describe(&segment.owner, owners);
        // Without the flags; a mark takes the key away.
        let marked = there.mode & shm::MARKED != 0;
        segment.size == entry.size
            && (there.key == wanted.key || marked)
            && (there.cuid, there.cgid) == (wanted.cuid, wanted.cgid)
    };
    let by_number = |segment: &&ShmSegment| segment.owner.id.cast_unsigned() == wanted.id;
    if let Some(segment) = listed.iter().find(by_number) {
        return match same(segment) {
            true => Ok(Some(segment)),
            false => Err(taken(entry, "number", segment)),
        };
    }
    let same_key = |segment: &&ShmSegment| wanted.key != 0 && segment.owner.key == wanted.key;
    match listed.iter().find(same_key) {
        Some(other) => Err(taken(entry, "key", other)),
        None => Ok(None),
    }
}

fn taken(entry: &IpcShmEntry, what: &str, other: &ShmSegment) -> ExecuteError {
    ExecuteError::from_plan(PlanError::Unsupported {
        object: format!(
            "System V shared memory {} (key {:#x}), whose {what} segment {} (key {:#x}, made by process {}) has,",
            entry.desc.id, entry.desc.key, other.owner.id, other.owner.key, other.creator
        ),
        remedy: "end who uses the other segment, or remove it with `ipcrm -m NUMBER` if nobody does",
    })
}

fn make(entry: &IpcShmEntry, owners: &OwnerMap) -> Result<(), ExecuteError> {
    let desc = &outside(&entry.desc, owners);
    let flags = desc.mode & 0o777 | entry.hugetlb_flag.unwrap_or(0);
    let create = || shm::create(desc.key, entry.size, flags.cast_signed());
    let id = NUMBERED.make(desc, &create)?;
    let what = || id.to_string();
    shm::set_owner(id, (desc.uid, desc.gid), desc.mode)
        .during("Setting the owner of System V segment", what)?;
    if desc.mode & shm::LOCKED != 0 {
        shm::lock(id).during("Locking System V segment", what)?;
    }
    Ok(())
}

fn fill(
    world: &World<'_>,
    entry: &IpcShmEntry,
    content: &[u8],
    attached: &mut SharedAnonymous,
) -> Result<(), ExecuteError> {
    let id = entry.desc.id;
    let all = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&*attached, all, 0, entry.size)
        .during("Emptying System V segment", || id.to_string())?;
    let mut write = |offset: u64, bytes: &[u8]| {
        // The last page may reach over the end.
        let left = entry.size.saturating_sub(offset).min(bytes.len() as u64);
        if left > 0 {
            attached.write_mapped(offset as usize, &bytes[..left as usize]);
        }
        Ok(())
    };
    if !entry.in_pagemaps() {
        return write(0, content).during("Filling System V segment", || id.to_string());
    }
    floe_memory::copy_segment(&world.images.dir, u64::from(id), write).map_err(|source| {
        ExecuteError::Content {
            object: format!("Filling System V segment {id}"),
            source: Box::new(source),
        }
    })
}
