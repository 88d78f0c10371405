//! Writing the images of tasks, and those of the whole tree.

use std::time::SystemTime;

use floe_image::manifest::{DumpKind, ManifestInfo};
use floe_image::messages::{InventoryEntry, VmaEntry};
use floe_image::{ImageKind, ImageWriter, WriteError};
use floe_kernel::cpu::CpuFacts;
use floe_kernel::security::SecurityModule;
use floe_options::{DumpOptions, NetworkLock, PreDumpMode};
use floe_resources::cpu;
use floe_resources::task::label::lsm_type;
use floe_resources::vma::AddressSpace;

use crate::freeze::FrozenTask;
use crate::task::{Draft, TaskDraft};
use crate::track::{Lineage, Tracking};
use floe_resources::namespace::ids;

/// Version 2 of the format: images with two magics.
const IMAGE_VERSION: u32 = 2;

/// Writes everything of one task but its pages.
pub fn write_task(
    writer: &ImageWriter,
    task: &FrozenTask,
    draft: Draft,
    guards: Vec<VmaEntry>,
) -> Result<(), WriteError> {
    let pid = u64::from(task.number);
    let draft = match draft {
        Draft::Dead(core) => return writer.write_one(ImageKind::Core, pid, &*core),
        Draft::Living(draft) => *draft,
    };
    let TaskDraft {
        threads,
        ids,
        fds,
        space,
        mut mm,
        fs,
    } = draft;
    for thread in &threads {
        writer.write_one(ImageKind::Core, u64::from(thread.number), &thread.core)?;
    }
    mm.aios = space.aio_rings();
    mm.vmas = entries(space, guards);
    writer.write_one(ImageKind::Mm, pid, &mm)?;
    writer.write_one(ImageKind::Fs, pid, &fs)?;
    writer.write_one(ImageKind::Ids, pid, &ids)?;
    if let Some(fds) = fds {
        writer.write_all(ImageKind::Fdinfo, u64::from(ids.files_id), &fds)?;
    }
    Ok(())
}

fn entries(space: AddressSpace, guards: Vec<VmaEntry>) -> Vec<VmaEntry> {
    space
        .vmas
        .into_iter()
        .map(|vma| vma.entry)
        .chain(guards)
        .collect()
}

/// Writes the inventory, by which a restore begins.
pub fn write_inventory(
    writer: &ImageWriter,
    options: &DumpOptions,
    (own_cgroups, security): (u32, SecurityModule),
    run_id: String,
) -> Result<(), WriteError> {
    let lock = match options.sockets.network_lock {
        NetworkLock::Iptables => 0,
        NetworkLock::Nftables => 1,
        NetworkLock::Skip => 2,
    };
    let entry = InventoryEntry {
        img_version: IMAGE_VERSION,
        fdinfo_per_id: Some(true),
        root_ids: Some(ids::of_host()),
        ns_per_id: Some(true),
        root_cg_set: Some(own_cgroups),
        lsmtype: Some(lsm_type(security) as i32),
        tcp_close: options.sockets.tcp_close.then_some(true),
        network_lock_method: Some(lock),
        // The tree is stopped still.
        dump_uptime: Some(uptime()),
        dump_criu_run_id: Some(run_id),
        ..InventoryEntry::default()
    };
    writer.write_one(ImageKind::Inventory, 0, &entry)
}

/// Microseconds since the start of the machine, as the start times of tasks count them.
pub fn uptime() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec.cast_unsigned() * 1_000_000 + now.tv_nsec.cast_unsigned() / 1000
}

/// What the manifest says about a dump.
pub fn manifest_info(kind: DumpKind, tracking: Option<&Tracking>) -> ManifestInfo {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let lineage = tracking.map(Tracking::lineage);
    ManifestInfo {
        kind,
        generation: lineage.map_or(0, |lineage| lineage.generation),
        id: None,
        parent: lineage.and_then(Lineage::link),
        parent_id: lineage.and_then(|lineage| lineage.parent_id.clone()),
        tracker: tracking.map(|tracking| tracking.kind().name().to_string()),
        floe: env!("CARGO_PKG_VERSION").to_string(),
        kernel: release.trim_end().to_string(),
        machine: std::env::consts::ARCH.to_string(),
        cpu: None,
        created: SystemTime::now(),
        rounds: Vec::new(),
    }
}

/// The inventory of a pre-dump: by its id the next round knows that it follows.
/// `uptime` is that of a moment at which the tree was there, by which a pid that comes again is told.
pub fn write_round(
    writer: &ImageWriter,
    mode: PreDumpMode,
    id: &str,
    uptime: u64,
) -> Result<(), WriteError> {
    let entry = InventoryEntry {
        img_version: IMAGE_VERSION,
        fdinfo_per_id: Some(true),
        ns_per_id: Some(true),
        root_ids: Some(ids::of_host()),
        lsmtype: Some(lsm_type(SecurityModule::active()) as i32),
        pre_dump_mode: Some(match mode {
            PreDumpMode::Splice => 1,
            PreDumpMode::Read => 2,
        }),
        dump_uptime: Some(uptime),
        dump_criu_run_id: Some(id.to_string()),
        ..InventoryEntry::default()
    };
    writer.write_one(ImageKind::Inventory, 0, &entry)
}

/// What the tasks may have found out about this CPU; `--cpu-cap=none` leaves it out.
pub fn write_cpu(writer: &ImageWriter, options: &DumpOptions) -> Result<(), WriteError> {
    if !options.cpu_cap.image {
        return Ok(());
    }
    match CpuFacts::read() {
        Ok(facts) => writer.write_one(ImageKind::Cpuinfo, 0, &cpu::encode(&facts)),
        Err(error) => {
            tracing::warn!("no CPU capabilities are saved: {error}");
            Ok(())
        }
    }
}
