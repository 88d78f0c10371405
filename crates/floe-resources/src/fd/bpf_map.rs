//! BPF maps (`bpf(2)`) of the types `hash` and `array`.
//!
//! Saved:    flags and owner of each description; shape, entries and whether it is frozen (fdinfo) of each
//!           map.
//! Rebuilt:  made with the first description, filled, frozen; further ones are opened of it. Needs: nothing.
//! Not kept: its number; what else has it (pins in bpffs, programs), the types of keys and values (BTF),
//!           the node of its memory.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use floe_image::ImageKind;
use floe_image::framing::MAX_EXTRA;
use floe_image::messages::{BpfmapDataEntry, BpfmapFileEntry, FdTypes, FileEntry};
use floe_kernel::bpf::{ARRAY, HASH, Map, MapAccess, MapShape, create_map, type_name};
use floe_plan::Handle;
use rustix::fs::OFlags;

use super::{FdKind, FdRestore, file_entry, payload};
use crate::collect::{CollectError, Collector, FdProbe, FileId, Obstacle};
use crate::restore::{
    Attempt, ExecuteError, PlanError, Planner, TreeImages, plan_owner, set_flags,
};

/// See the module.
pub struct BpfMap;

/// About how much is read at once.
const BATCH: u64 = 1 << 20;

/// Maps whose entries are saved already, by the kernel's number.
#[derive(Default)]
struct Saved(HashSet<u32>);

impl FdKind for BpfMap {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        fd.is_anon("bpf-map") && !fd.is_path()
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let map =
            Map::of(fd.file()).map_err(|error| fd.failed("Asking about the BPF map", error))?;
        refuse_what_cannot_be_saved(&map, fd)?;
        if collector.cache(Saved::default).0.insert(map.id()) {
            save_entries(&map, fd, collector)?;
        }
        let shape = map.shape();
        let entry = BpfmapFileEntry {
            id: id.0,
            flags: fd.flags(),
            pos: 0,
            fown: fd.owner()?,
            map_type: shape.map_type,
            key_size: shape.key_size,
            value_size: shape.value_size,
            map_id: map.id(),
            max_entries: shape.max_entries,
            map_flags: shape.flags,
            memlock: fd.info_number("memlock", 10)?,
            frozen: fd.info_number("frozen", 10)? != 0,
            map_name: shape.name.clone(),
            ifindex: 0,
            mnt_id: None,
            map_extra: Some(shape.extra),
        };
        Ok(FileEntry {
            bpf: Some(entry),
            ..file_entry(FdTypes::Bpfmap, id)
        })
    }
}

fn is_supported(map_type: u32) -> bool {
    matches!(map_type, HASH | ARRAY)
}

fn obstacle(map: &Map<'_>, fd: &FdProbe<'_>, remedy: &str) -> CollectError {
    let MapShape { map_type, name, .. } = map.shape();
    let what = format!(
        "anon_inode:bpf-map, {name:?} of type {}",
        type_name(*map_type)
    );
    CollectError::Unsupported(Obstacle::fd(fd.pid(), fd.fd(), what, remedy))
}

fn refuse_what_cannot_be_saved(map: &Map<'_>, fd: &FdProbe<'_>) -> Result<(), CollectError> {
    if !is_supported(map.shape().map_type) {
        let remedy = "close it before the checkpoint: of BPF maps only the types hash and array can be saved";
        return Err(obstacle(map, fd, remedy));
    }
    if map.device() != 0 {
        let remedy = "close it before the checkpoint: it is held by a network device";
        return Err(obstacle(map, fd, remedy));
    }
    if map.has_types() {
        tracing::warn!(
            pid = %fd.pid(),
            fd = %fd.fd(),
            map = map.shape().name,
            "a BPF map is saved without the types of its keys and values (BTF)"
        );
    }
    Ok(())
}

/// Keys and values of all entries, each one after the other.
#[derive(Debug, Default)]
struct Entries {
    keys: Vec<u8>,
    values: Vec<u8>,
}

fn save_entries(
    map: &Map<'_>,
    fd: &FdProbe<'_>,
    collector: &mut Collector<'_>,
) -> Result<(), CollectError> {
    let failed = |error| fd.failed("Reading the BPF map", error);
    let shape = map.shape();
    let own;
    let again;
    let readable = if access(fd.flags()) == MapAccess::WriteOnly {
        own = map.open_again(MapAccess::ReadOnly).map_err(failed)?;
        again = Map::of(own.as_fd()).map_err(failed)?;
        &again
    } else {
        map
    };
    let room = BATCH / (u64::from(shape.key_size) + u64::from(shape.value_size)).max(1);
    let room = u32::try_from(room).expect("less than a batch has bytes");
    let Some(entries) = read_entries(readable, room).map_err(failed)? else {
        let remedy = "make it smaller before the checkpoint: its entries have more than 1 GiB";
        return Err(obstacle(map, fd, remedy));
    };
    let entry = BpfmapDataEntry {
        map_id: map.id(),
        keys_bytes: entries.keys.len() as u32,
        values_bytes: entries.values.len() as u32,
        count: (entries.keys.len() / shape.key_size.max(1) as usize) as u32,
    };
    let bytes = [entries.keys, entries.values].concat();
    let image = collector.side(ImageKind::BpfmapData, 0)?;
    Ok(image.append_with_extra(&entry, &bytes)?)
}

/// Reads the whole map, at first `room` entries at once; `None` when an image cannot hold it.
fn read_entries(map: &Map<'_>, room: u32) -> io::Result<Option<Entries>> {
    let most = map.shape().max_entries.max(1);
    let mut room = room.clamp(1, most);
    let mut entries = Entries::default();
    let mut from = None;
    loop {
        let batch = match map.read(from.as_ref(), room) {
            // A bucket of a hash is read as a whole.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && room < most => {
                room = room.saturating_mul(2).min(most);
                continue;
            }
            batch => batch?,
        };
        entries.keys.extend(batch.keys);
        entries.values.extend(batch.values);
        if (entries.keys.len() + entries.values.len()) as u64 > MAX_EXTRA {
            return Ok(None);
        }
        match batch.next {
            Some(next) => from = Some(next),
            None => return Ok(Some(entries)),
        }
    }
}

/// What the flags of a description of a map let it do.
fn access(flags: u32) -> MapAccess {
    match OFlags::from_bits_retain(flags) & OFlags::ACCMODE {
        OFlags::RDONLY => MapAccess::ReadOnly,
        OFlags::WRONLY => MapAccess::WriteOnly,
        _ => MapAccess::ReadWrite,
    }
}

impl FdRestore for BpfMap {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Bpfmap
    }

    fn plan<'i>(&self, file: &'i FileEntry, planner: &mut Planner<'i>) -> Result<(), PlanError> {
        let entry = payload(file, &file.bpf)?;
        if !is_supported(entry.map_type) || entry.ifindex != 0 {
            return Err(PlanError::Unsupported {
                object: format!(
                    "BPF map {:?} of type {} on network device {}",
                    entry.map_name,
                    type_name(entry.map_type),
                    entry.ifindex
                ),
                remedy: "only maps of the types hash and array, on no device, can be made again",
            });
        }
        let known = planner.try_cache(Known::read)?;
        let first = known.first[&entry.map_id];
        plan_owner(planner, entry.id, &entry.fown);
        if first != entry.id {
            let name = format!("open BPF map {:?} again", entry.map_name);
            planner.open(entry.id, name, &[Handle::File(first)], move |world| {
                open_again(world.file(first)?, entry)
            });
            return Ok(());
        }
        let known = planner.try_cache(Known::read)?;
        let entries = known.entries.remove(&entry.map_id).unwrap_or_default();
        let name = format!("make BPF map {:?}", entry.map_name);
        planner.open(entry.id, name, &[], move |_| make(entry, &entries));
        Ok(())
    }
}

/// What the images say of maps, by the number that each had.
struct Known {
    /// The description that makes the map.
    first: HashMap<u32, u32>,
    /// Entries of maps that are not planned yet.
    entries: HashMap<u32, Entries>,
}

impl Known {
    fn read(images: &TreeImages) -> Result<Self, PlanError> {
        let mut first: HashMap<u32, u32> = HashMap::new();
        let mut maps: HashMap<u32, &BpfmapFileEntry> = HashMap::new();
        for entry in images.of_type(FdTypes::Bpfmap) {
            if let Some(map) = &entry.bpf {
                first.entry(map.map_id).or_insert(map.id);
                maps.entry(map.map_id).or_insert(map);
            }
        }
        let mut entries = HashMap::new();
        // CRIU saves a map once for each description.
        for (data, bytes) in images
            .dir
            .read_with_extra::<BpfmapDataEntry>(ImageKind::BpfmapData, 0)?
        {
            let damaged = |what| {
                let what = format!("map {} {what}", data.map_id);
                PlanError::damaged("bpfmap-data.img", what)
            };
            let map = maps.get(&data.map_id);
            let map = map.ok_or_else(|| damaged("is of no file"))?;
            let is_whole =
                |bytes: u32, size: u32| u64::from(bytes) == u64::from(data.count) * u64::from(size);
            if !is_whole(data.keys_bytes, map.key_size)
                || !is_whole(data.values_bytes, map.value_size)
            {
                return Err(damaged("has entries of another size"));
            }
            let (keys, values) = bytes
                .split_at_checked(data.keys_bytes as usize)
                .ok_or_else(|| damaged("ends too early"))?;
            let content = Entries {
                keys: keys.to_vec(),
                values: values.to_vec(),
            };
            entries.insert(data.map_id, content);
        }
        Ok(Known { first, entries })
    }
}

fn make(entry: &BpfmapFileEntry, entries: &Entries) -> Result<OwnedFd, ExecuteError> {
    let what = || format!("{:?}", entry.map_name);
    let shape = MapShape {
        map_type: entry.map_type,
        key_size: entry.key_size,
        value_size: entry.value_size,
        max_entries: entry.max_entries,
        flags: entry.map_flags,
        name: entry.map_name.clone(),
        extra: entry.map_extra.unwrap_or(0),
    };
    let file = create_map(&shape).during("Making BPF map", what)?;
    let map = Map::of(file.as_fd()).during("Asking about BPF map", what)?;
    map.write(&entries.keys, &entries.values)
        .during("Filling BPF map", what)?;
    if entry.frozen {
        map.freeze().during("Freezing BPF map", what)?;
    }
    if access(entry.flags) != MapAccess::ReadWrite {
        return open_again(file.as_fd(), entry);
    }
    set_flags(file.as_fd(), entry.flags)?;
    Ok(file)
}

/// Opens a map once more as `entry` had it.
fn open_again(map: BorrowedFd<'_>, entry: &BpfmapFileEntry) -> Result<OwnedFd, ExecuteError> {
    let opened = Map::of(map).and_then(|map| map.open_again(access(entry.flags)));
    let opened = opened.during("Opening again BPF map", || format!("{:?}", entry.map_name))?;
    set_flags(opened.as_fd(), entry.flags)?;
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_read_whole_in_batches_of_any_size() {
        let shape = MapShape {
            map_type: HASH,
            key_size: 4,
            value_size: 4,
            max_entries: 500,
            ..MapShape::default()
        };
        let file = match create_map(&shape) {
            Ok(file) => file,
            Err(error) => {
                println!("skipped: no BPF maps: {error}");
                return;
            }
        };
        let map = Map::of(file.as_fd()).expect("a map");
        let numbers: Vec<u8> = (0..500_u32).flat_map(u32::to_ne_bytes).collect();
        map.write(&numbers, &numbers).expect("room");
        for room in [1, 7, 499, 500, 10_000] {
            let entries = read_entries(&map, room).expect("readable");
            let entries = entries.expect("not much");
            assert_eq!(entries.keys, entries.values);
            let mut found: Vec<&[u8]> = entries.keys.chunks(4).collect();
            found.sort_unstable();
            let mut expected: Vec<&[u8]> = numbers.chunks(4).collect();
            expected.sort_unstable();
            assert_eq!(found, expected, "{room} at once");
        }
    }
}
