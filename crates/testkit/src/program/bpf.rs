//! BPF maps.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::ensure;

use super::files::descriptor;
use super::{Check, Missing, Place, Program, fact, unchanged};
use crate::sys::bpf::{self, Kind, NO_PREALLOC, Shape};

pub const PROGRAMS: &[Program] = &[
    Program::new("bpf-maps", maps),
    Program::new("bpf-map-shared", shared),
];

/// Programs with maps that cannot be dumped.
pub const REFUSED: &[Program] = &[Program::new("bpf-map-lru", least_recently_used)];

const HASH: Shape = Shape {
    kind: Kind::Hash,
    max_entries: 3000,
    flags: NO_PREALLOC,
    name: "floe_hash",
};
const ARRAY: Shape = Shape {
    kind: Kind::Array,
    max_entries: 10,
    flags: 0,
    name: "floe.array",
};

fn create(shape: Shape) -> anyhow::Result<OwnedFd> {
    bpf::create(shape).map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM | libc::ENOSYS) => Missing(format!("no BPF maps: {error}")).into(),
        _ => error.into(),
    })
}

/// What the kernel knows of a map, without its number.
fn facts(map: &OwnedFd) -> anyhow::Result<(String, String)> {
    const KEYS: [&str; 6] = [
        "map_type",
        "key_size",
        "value_size",
        "max_entries",
        "map_flags",
        "frozen",
    ];
    let (_, name) = bpf::identity(map)?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd()))?;
    let known = |line: &&str| KEYS.iter().any(|key| line.starts_with(key));
    let info: Vec<&str> = info.lines().filter(known).collect();
    Ok(fact(format!("map {name}"), info.join(" ")))
}

fn value(key: u32) -> u64 {
    u64::from(key).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// A hash with room left, a frozen array, an empty hash.
fn maps(_: &Place) -> anyhow::Result<Check> {
    let hash = create(HASH)?;
    for key in 0..2000 {
        bpf::set(&hash, key * 7, value(key))?;
    }
    let array = create(ARRAY)?;
    for key in 0..10 {
        bpf::set(&array, key, value(key))?;
    }
    bpf::freeze(&array)?;
    let empty = create(Shape { name: "", ..HASH })?;
    let all = [hash.try_clone()?, array.try_clone()?, empty.try_clone()?];
    let mut same = unchanged(move || {
        all.iter()
            .flat_map(|map| [descriptor(map), facts(map)])
            .collect()
    })?;
    Ok(Box::new(move || {
        same()?;
        for key in 0..14_000 {
            let expected = (key % 7 == 0).then(|| value(key / 7));
            let found = bpf::get(&hash, key)?;
            ensure!(found == expected, "the hash has {found:?} for {key}");
        }
        for key in 0..10 {
            let found = bpf::get(&array, key)?;
            ensure!(
                found == Some(value(key)),
                "the array has {found:?} for {key}"
            );
        }
        ensure!(bpf::set(&array, 1, 1).is_err(), "the array is not frozen");
        ensure!(bpf::get(&empty, 1)?.is_none(), "the empty one has an entry");
        bpf::set(&hash, 7, value(1))?;
        Ok(())
    }))
}

/// Two descriptions of one map, of which one only reads.
fn shared(_: &Place) -> anyhow::Result<Check> {
    let map = create(HASH)?;
    bpf::set(&map, 5, 0)?;
    let reader = bpf::open_to_read(&map)?;
    let all = [map.try_clone()?, reader.try_clone()?];
    let mut same = unchanged(move || {
        all.iter()
            .flat_map(|map| [descriptor(map), facts(map)])
            .collect()
    })?;
    let mut count = 0;
    Ok(Box::new(move || {
        same()?;
        let found = bpf::get(&reader, 5)?;
        ensure!(found == Some(count), "the reader sees {found:?}");
        count += 1;
        bpf::set(&map, 5, count)?;
        ensure!(bpf::set(&reader, 5, 0).is_err(), "the reader can write");
        Ok(())
    }))
}

fn least_recently_used(_: &Place) -> anyhow::Result<Check> {
    let map = create(Shape {
        kind: Kind::LruHash,
        flags: 0,
        ..HASH
    })?;
    bpf::set(&map, 5, 6)?;
    Ok(Box::new(move || {
        let found = bpf::get(&map, 5)?;
        ensure!(found == Some(6), "the map has {found:?}");
        Ok(())
    }))
}
