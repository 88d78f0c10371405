//! Sets of semaphores (`semget(2)`).
//!
//! Saved:    key, number, permissions, owner and creator of each set; the values.
//! Rebuilt:  made with key and number, then owner and values. Needs: the namespace and its limits.
//! Not kept: times, pids of last users, adjustments at the end of a task (`SEM_UNDO`).

use std::io;

use floe_image::ImageKind;
use floe_image::messages::IpcSemEntry;
use floe_image::writer::EntryStream;
use floe_kernel::proc::{SemSet, parse_sysvipc_sem};
use floe_kernel::sysv::sem;
use floe_plan::Handle;

use super::{Numbered, check_number, describe, failed, limited, list, outside, padded};
use crate::collect::CollectError;
use crate::namespace::{OwnerMap, made};
use crate::restore::{Attempt, ExecuteError, PlanError, Planner};

const NUMBERED: Numbered = Numbered {
    noun: "set of semaphores",
    next: "/proc/sys/kernel/sem_next_id",
    remove: sem::remove,
};

/// Reads all sets with their values; we are inside.
pub fn collect() -> Result<Vec<(SemSet, Vec<u16>)>, CollectError> {
    let sets = list("sem", parse_sysvipc_sem).map_err(|source| CollectError::System {
        action: "Listing semaphores".to_string(),
        source,
    })?;
    let values = |set: SemSet| {
        let values = sem::values(set.owner.id, set.count);
        let action = "Reading the semaphores of set";
        Ok((set, values.map_err(failed(action, set.owner.id))?))
    };
    sets.into_iter().map(values).collect()
}

/// Writes `ipcns-sem`.
pub fn encode(
    sets: Vec<(SemSet, Vec<u16>)>,
    owners: &OwnerMap,
    image: &mut EntryStream,
) -> Result<(), CollectError> {
    for (set, values) in sets {
        image.append(&IpcSemEntry {
            desc: describe(&set.owner, owners),
            nsems: set.count,
        })?;
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        image.append_raw(&padded(bytes, 8))?;
    }
    Ok(())
}

/// Adds the step that makes all sets; returns what it makes.
pub fn plan(id: u32, planner: &mut Planner<'_>) -> Result<Handle, PlanError> {
    let dir = &planner.images.dir;
    let sets: Vec<(IpcSemEntry, Vec<u8>)> =
        dir.read_with_extra(ImageKind::IpcnsSem, u64::from(id))?;
    for (entry, _) in &sets {
        check_number(&entry.desc, ImageKind::IpcnsSem.file_name(u64::from(id)))?;
    }
    let handle = Handle::Object("semaphores of namespace", u64::from(id));
    let name = format!("make {} sets of semaphores", sets.len());
    planner.step_at_home(name, (&[made(id), limited(id)], &[handle]), move |world| {
        world.in_namespace(id, |world| {
            let owners = &world.images.owners;
            sets.iter()
                .try_for_each(|(entry, values)| make((entry, values), owners))
        })
    });
    Ok(handle)
}

fn make((entry, values): (&IpcSemEntry, &[u8]), owners: &OwnerMap) -> Result<(), ExecuteError> {
    let desc = &outside(&entry.desc, owners);
    let mode = desc.mode & 0o777;
    let create = || -> io::Result<i32> { sem::create(desc.key, entry.nsems, mode.cast_signed()) };
    let id = NUMBERED.make(desc, &create)?;
    let what = || format!("semaphores {id}");
    let pairs = values.chunks_exact(2);
    let values: Vec<u16> = pairs
        .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
        .collect();
    sem::set_values(id, &values).during("Setting the values of", what)?;
    sem::set_owner(id, (desc.uid, desc.gid), mode).during("Setting the owner of", what)
}
