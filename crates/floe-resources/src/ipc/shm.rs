//! System V shared memory (`shmget(2)`), as far as the tree has it attached.
//!
//! Saved:    key, number, size, permissions, owner and creator; the content.
//! Rebuilt:  a segment that is still there is attached again, with its content of the dump unless
//!           others use it; one that is gone is made with the key and number that it had. Needs: nothing.
//! Not kept: times, and the pids of creator and last user.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use floe_image::ImageKind;
use floe_image::messages::{IpcDescEntry, IpcShmEntry};
use floe_kernel::ids::HostPid;
use floe_kernel::janitor::NameKind;
use floe_kernel::namespace::NsKind;
use floe_kernel::proc::{IpcOwner, ShmSegment, parse_sysvipc_shm};
use floe_kernel::shared_anonymous::SharedAnonymous;
use floe_kernel::sysv;
use floe_plan::Handle;
use rustix::fs::FallocateFlags;

use crate::collect::{CollectError, Collector, Obstacle, PathFile, Segment};
use crate::fd::memfd::{huge_flag, reopen};
use crate::namespace::ids::host_number;
use crate::restore::{Attempt, ExecuteError, PlanError, Planner, TreeImages, World};

const LIST: &str = "/proc/sysvipc/shm";
/// Writing a number here gives it to the next segment made.
const NEXT_NUMBER: &str = "/proc/sys/kernel/shm_next_id";
/// `SHM_HUGETLB`.
const HUGE: u32 = 0o4000;

/// All segments of our IPC namespace.
fn list() -> io::Result<Vec<ShmSegment>> {
    let text = std::fs::read(LIST)?;
    parse_sysvipc_shm(&text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// The segments as they were when the first one was met.
struct Known(Vec<ShmSegment>);

/// Saves the segment behind a mapping, once for all of its mappings; returns its number.
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
    let known = collector.try_cache(|_| {
        let listed = list().map_err(failed("Listing System V shared memory"));
        listed.map(Known)
    })?;
    let size = file.stat().st_size.cast_unsigned();
    let found = known
        .0
        .iter()
        .find(|segment| u64::try_from(segment.owner.id) == Ok(id) && segment.size == size);
    let Some(&segment) = found else {
        return Err(CollectError::Unsupported(Obstacle {
            pid,
            object: format!("System V shared memory {id} of another IPC namespace"),
            remedy: "detach it before leaving the namespace that it belongs to".to_string(),
        }));
    };
    let huge = huge_flag(pid, file.file())?;
    let entry = IpcShmEntry {
        desc: describe(&segment.owner),
        size,
        in_pagemaps: Some(true),
        hugetlb_flag: huge.map(|flag| flag | HUGE),
    };
    let opened = reopen(file.file()).map_err(io::Error::from);
    let file = opened.map_err(failed("Opening System V shared memory"))?;
    collector
        .side(ImageKind::IpcnsShm, host_namespace())?
        .append(&entry)?;
    collector.add_segment(Segment { id, file, size });
    Ok(id)
}

fn describe(owner: &IpcOwner) -> IpcDescEntry {
    IpcDescEntry {
        key: owner.key,
        uid: owner.uid,
        gid: owner.gid,
        cuid: owner.cuid,
        cgid: owner.cgid,
        mode: owner.mode,
        id: owner.id.cast_unsigned(),
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

fn read(images: &TreeImages) -> Result<Vec<(IpcShmEntry, Vec<u8>)>, PlanError> {
    let id = namespace(images);
    let entries: Vec<(IpcShmEntry, Vec<u8>)> =
        images.dir.read_with_extra(ImageKind::IpcnsShm, id)?;
    for (entry, _) in &entries {
        if i32::try_from(entry.desc.id).is_err() || i64::try_from(entry.size).is_err() {
            let what = format!("the segment {} is impossible", entry.desc.id);
            return Err(PlanError::damaged(ImageKind::IpcnsShm.file_name(id), what));
        }
    }
    Ok(entries)
}

/// Size in bytes of every saved segment, by its number.
pub fn sizes(images: &TreeImages) -> Result<BTreeMap<u64, u64>, PlanError> {
    let entries = read(images)?;
    let entries = entries.iter().map(|(entry, _)| entry);
    Ok(entries
        .map(|entry| (u64::from(entry.desc.id), entry.size))
        .collect())
}

/// Made by the step that has a segment ready to be attached.
pub fn provided(id: u64) -> Handle {
    Handle::Object("System V segment", id)
}

/// Adds the steps that find or make the segments of the tree.
pub fn plan(planner: &mut Planner<'_>) -> Result<(), PlanError> {
    for (entry, content) in read(planner.images)? {
        let id = entry.desc.id;
        planner.step(
            format!("find or make System V shared memory {id}"),
            (&[], &[provided(u64::from(id))]),
            move |world| provide(world, &entry, &content),
        );
    }
    Ok(())
}

fn provide(world: &mut World<'_>, entry: &IpcShmEntry, content: &[u8]) -> Result<(), ExecuteError> {
    let id = entry.desc.id.cast_signed();
    let what = || format!("{id}");
    let listed = list().during("Listing", || LIST.to_string())?;
    match present(entry, &listed)? {
        Some(there) if there.attached > 0 => {
            tracing::warn!(
                segment = id,
                "System V shared memory is in use: it keeps its present content"
            );
            return Ok(());
        }
        Some(_) => {}
        None => {
            make(entry)?;
            world.made_name(NameKind::SharedMemory, PathBuf::from(id.to_string()));
            let owner = (entry.desc.uid, entry.desc.gid);
            sysv::set_owner(id, owner, entry.desc.mode)
                .during("Setting the owner of System V segment", what)?;
            if entry.desc.mode & sysv::LOCKED != 0 {
                sysv::lock_segment(id).during("Locking System V segment", what)?;
            }
        }
    }
    let mut attached =
        sysv::attach(id, entry.size).during("Attaching to System V segment", what)?;
    fill(world, entry, content, &mut attached)?;
    let marked = entry.desc.mode & sysv::MARKED != 0;
    // Until the tasks have it: the last one to detach from marked memory takes it away.
    world.before_release(move || {
        if marked && let Err(error) = sysv::remove_segment(id) {
            tracing::warn!(%error, segment = id, "System V shared memory is not marked to go");
        }
        drop(attached);
    });
    Ok(())
}

/// The segment of the dump, if it is still there. Its number or key may not be somebody else's.
fn present<'l>(
    entry: &IpcShmEntry,
    listed: &'l [ShmSegment],
) -> Result<Option<&'l ShmSegment>, ExecuteError> {
    let wanted = &entry.desc;
    let same = |segment: &ShmSegment| {
        let there = describe(&segment.owner);
        // Without the flags; a mark takes the key away.
        let marked = there.mode & sysv::MARKED != 0;
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

/// Makes a segment with the number that it had.
fn make(entry: &IpcShmEntry) -> Result<(), ExecuteError> {
    /// Somebody else may make a segment between our two calls.
    const ATTEMPTS: usize = 3;
    let desc = &entry.desc;
    let wanted = desc.id.cast_signed();
    let flags = desc.mode & 0o777 | entry.hugetlb_flag.unwrap_or(0);
    let create = || sysv::create_segment(desc.key, entry.size, flags.cast_signed());
    for _ in 0..ATTEMPTS {
        std::fs::write(NEXT_NUMBER, wanted.to_string())
            .during("Asking for the next number in", || NEXT_NUMBER.to_string())?;
        let made = match sysv::as_creator((desc.cuid, desc.cgid), create) {
            // Users without a number here, and huge pages, which not everybody gets.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => {
                create()
            }
            made => made,
        };
        let made = made.during("Making System V segment", || wanted.to_string())?;
        if made == wanted {
            return Ok(());
        }
        sysv::remove_segment(made).during("Removing System V segment", || made.to_string())?;
    }
    Err(ExecuteError::from_plan(PlanError::Unsupported {
        object: format!("System V shared memory {wanted}, whose number the kernel does not give,"),
        remedy: "remove the other segment in its place, see `ipcs -m`",
    }))
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
