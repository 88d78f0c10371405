//! `bpf(2)`: the call itself, and maps.
//!
//! Contract relied on: the kernel reads and writes only the structure that is given, in the size that is
//! given, and the buffers that it names; the type of a map and the sizes of its keys and values never
//! change.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const BPF_MAP_CREATE: i32 = 0;
const BPF_MAP_GET_FD_BY_ID: i32 = 14;
const BPF_OBJ_GET_INFO_BY_FD: i32 = 15;
const BPF_MAP_FREEZE: i32 = 22;
const BPF_MAP_LOOKUP_BATCH: i32 = 24;
const BPF_MAP_UPDATE_BATCH: i32 = 26;

/// A map of any keys (`BPF_MAP_TYPE_HASH`).
pub const HASH: u32 = 1;
/// A map whose keys are the numbers below its size (`BPF_MAP_TYPE_ARRAY`).
pub const ARRAY: u32 = 2;

/// What the kernel calls the types of maps, from 0.
const TYPES: [&str; 34] = [
    "unspec",
    "hash",
    "array",
    "prog_array",
    "perf_event_array",
    "percpu_hash",
    "percpu_array",
    "stack_trace",
    "cgroup_array",
    "lru_hash",
    "lru_percpu_hash",
    "lpm_trie",
    "array_of_maps",
    "hash_of_maps",
    "devmap",
    "sockmap",
    "cpumap",
    "xskmap",
    "sockhash",
    "cgroup_storage",
    "reuseport_sockarray",
    "percpu_cgroup_storage",
    "queue",
    "stack",
    "sk_storage",
    "devmap_hash",
    "struct_ops",
    "ringbuf",
    "inode_storage",
    "task_storage",
    "bloom_filter",
    "user_ringbuf",
    "cgrp_storage",
    "arena",
];

/// The name of a type of maps (`BPF_MAP_TYPE_*`), its number where it is newer than this program.
pub fn type_name(map_type: u32) -> String {
    let name = TYPES.get(map_type as usize);
    name.map_or_else(|| map_type.to_string(), |name| (*name).to_string())
}

/// What a map is made with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MapShape {
    /// `BPF_MAP_TYPE_*`.
    pub map_type: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Most entries that it takes.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
    /// At most 15 bytes.
    pub name: String,
    /// What some types need besides.
    pub extra: u64,
}

/// What a descriptor of a map may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapAccess {
    ReadWrite,
    /// `BPF_F_RDONLY`.
    ReadOnly,
    /// `BPF_F_WRONLY`.
    WriteOnly,
}

/// A map behind a descriptor, with what the kernel says of it.
#[derive(Debug)]
pub struct Map<'fd> {
    file: BorrowedFd<'fd>,
    shape: MapShape,
    info: Info,
}

/// Some entries of a map.
#[derive(Debug)]
pub struct Batch {
    /// The keys, one after the other.
    pub keys: Vec<u8>,
    /// Their values, in the same order.
    pub values: Vec<u8>,
    /// Where it goes on; `None` after the last entry.
    pub next: Option<Cursor>,
}

/// A place between two entries of a map.
#[derive(Debug)]
pub struct Cursor(Vec<u8>);

/// The part of `union bpf_attr` that makes a map.
#[repr(C)]
#[derive(Default)]
struct CreateArgument {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
    map_ifindex: u32,
    btf_fd: u32,
    btf_key_type_id: u32,
    btf_value_type_id: u32,
    btf_vmlinux_value_type_id: u32,
    map_extra: u64,
}

#[repr(C)]
struct IdArgument {
    map_id: u32,
    next_id: u32,
    open_flags: u32,
}

#[repr(C)]
struct InfoArgument {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
struct FreezeArgument {
    map_fd: u32,
}

#[repr(C)]
struct BatchArgument {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// `struct bpf_map_info`.
#[repr(C)]
#[derive(Debug, Default)]
struct Info {
    map_type: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    name: [u8; 16],
    ifindex: u32,
    btf_vmlinux_value_type_id: u32,
    netns_dev: u64,
    netns_ino: u64,
    btf_id: u32,
    btf_key_type_id: u32,
    btf_value_type_id: u32,
    padding: u32,
    map_extra: u64,
}

/// Makes a map without entries, on any node of memory.
pub fn create_map(shape: &MapShape) -> io::Result<OwnedFd> {
    let mut map_name = [0; 16];
    let name = shape.name.as_bytes();
    // The last byte stays zero.
    if name.len() >= map_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    map_name[..name.len()].copy_from_slice(name);
    let mut argument = CreateArgument {
        map_type: shape.map_type,
        key_size: shape.key_size,
        value_size: shape.value_size,
        max_entries: shape.max_entries,
        map_flags: shape.flags,
        map_name,
        map_extra: shape.extra,
        ..CreateArgument::default()
    };
    // SAFETY: the argument names no buffer, and the command gives a descriptor.
    unsafe { open(BPF_MAP_CREATE, &mut argument) }
}

impl<'fd> Map<'fd> {
    /// Asks the kernel about the map behind a descriptor.
    pub fn of(file: BorrowedFd<'fd>) -> io::Result<Self> {
        let mut info = Info::default();
        let mut argument = InfoArgument {
            bpf_fd: file.as_raw_fd().cast_unsigned(),
            info_len: size_of::<Info>() as u32,
            info: (&raw mut info) as u64,
        };
        // SAFETY: `info` is live, writable, of `info_len` bytes, and valid with any bytes in it.
        unsafe { call(BPF_OBJ_GET_INFO_BY_FD, &mut argument)? };
        let end = info.name.iter().position(|byte| *byte == 0);
        let name = &info.name[..end.unwrap_or(info.name.len())];
        let shape = MapShape {
            map_type: info.map_type,
            key_size: info.key_size,
            value_size: info.value_size,
            max_entries: info.max_entries,
            flags: info.map_flags,
            // The kernel takes letters, digits, `_` and `.` only.
            name: String::from_utf8_lossy(name).into_owned(),
            extra: info.map_extra,
        };
        Ok(Map { file, shape, info })
    }

    /// What it was made with.
    pub fn shape(&self) -> &MapShape {
        &self.shape
    }

    /// The number that it has while it exists.
    pub fn id(&self) -> u32 {
        self.info.id
    }

    /// Whether the kernel knows what types its keys and values have (`BPF_BTF_LOAD`).
    pub fn has_types(&self) -> bool {
        self.info.btf_id != 0
    }

    /// The network device that holds it; 0 for none.
    pub fn device(&self) -> u32 {
        self.info.ifindex
    }

    /// Another open file description of it. Needs `CAP_SYS_ADMIN`.
    pub fn open_again(&self, access: MapAccess) -> io::Result<OwnedFd> {
        let mut argument = IdArgument {
            map_id: self.id(),
            next_id: 0,
            open_flags: match access {
                MapAccess::ReadWrite => 0,
                MapAccess::ReadOnly => 1 << 3,
                MapAccess::WriteOnly => 1 << 4,
            },
        };
        // SAFETY: the argument names no buffer, and the command gives a descriptor.
        unsafe { open(BPF_MAP_GET_FD_BY_ID, &mut argument) }
    }

    /// Forbids to change entries by system calls, for ever.
    pub fn freeze(&self) -> io::Result<()> {
        let mut argument = FreezeArgument {
            map_fd: self.file.as_raw_fd().cast_unsigned(),
        };
        // SAFETY: the argument names no buffer.
        unsafe { call(BPF_MAP_FREEZE, &mut argument) }.map(drop)
    }

    /// Reads at most `room` entries from a place on. `ENOSPC` when the entries that must be read at once
    /// are more. Of hashes and arrays only: values of other types have other sizes than they say.
    pub fn read(&self, from: Option<&Cursor>, room: u32) -> io::Result<Batch> {
        let (key, value) = self.sizes()?;
        let mut keys = vec![0; key * room as usize];
        let mut values = vec![0; value * room as usize];
        // For a hash it is the number of a bucket, whatever the size of a key.
        let mut next = vec![0; key.max(size_of::<u32>())];
        if from.is_some_and(|from| from.0.len() != next.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut argument = BatchArgument {
            in_batch: from.map_or(0, |from| from.0.as_ptr() as u64),
            out_batch: next.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: room,
            map_fd: self.file.as_raw_fd().cast_unsigned(),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: `keys` and `values` are live, writable, and have room for `count` keys and values of the
        // map's own sizes; `in_batch` and `out_batch` name a key or a 32 bit number, for which both have
        // room.
        let done = unsafe { call(BPF_MAP_LOOKUP_BATCH, &mut argument) };
        let next = match done {
            Ok(_) => Some(Cursor(next)),
            // After the last entry; some may have been read.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
            Err(error) => return Err(error),
        };
        let count = argument.count.min(room) as usize;
        keys.truncate(key * count);
        values.truncate(value * count);
        Ok(Batch { keys, values, next })
    }

    /// Sets entries of a hash or an array, keys and values one after the other in the same order.
    pub fn write(&self, keys: &[u8], values: &[u8]) -> io::Result<()> {
        let (key, value) = self.sizes()?;
        let count = keys.len() / key.max(1);
        if keys.len() != count * key || values.len() != count * value {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if count == 0 {
            return Ok(());
        }
        let mut argument = BatchArgument {
            in_batch: 0,
            out_batch: 0,
            keys: keys.as_ptr() as u64,
            values: values.as_ptr() as u64,
            count: u32::try_from(count).map_err(io::Error::other)?,
            map_fd: self.file.as_raw_fd().cast_unsigned(),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: `keys` and `values` are live and hold `count` keys and values of the map's own sizes; the
        // kernel only reads them.
        unsafe { call(BPF_MAP_UPDATE_BATCH, &mut argument) }.map(drop)
    }

    /// Bytes that system calls move for a key and for a value.
    fn sizes(&self) -> io::Result<(usize, usize)> {
        if !matches!(self.shape.map_type, HASH | ARRAY) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let MapShape {
            key_size,
            value_size,
            ..
        } = self.shape;
        Ok((key_size as usize, value_size as usize))
    }
}

/// Calls `bpf(2)`.
///
/// # Safety
/// All addresses in `argument` are those of buffers that are live, as long as it states, and writable
/// where the command writes.
unsafe fn call<T>(command: i32, argument: &mut T) -> io::Result<i32> {
    let size = size_of::<T>();
    // SAFETY: `argument` is live and of the size that is given; what it points to is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *argument, size) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as i32)
}

/// Calls `bpf(2)`, and takes the descriptor that it gives.
///
/// # Safety
/// As for [`call`], and `command` is one that gives a new descriptor.
pub(crate) unsafe fn open<T>(command: i32, argument: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { call(command, argument)? };
    // SAFETY: the command returns a new descriptor that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_map_tells_what_it_was_made_with_and_what_was_put_in() {
        let shape = MapShape {
            map_type: HASH,
            // Less than the number of a bucket needs.
            key_size: 1,
            value_size: 5,
            max_entries: 16,
            flags: 0,
            name: "floe_test".into(),
            extra: 0,
        };
        let file = match create_map(&shape) {
            Ok(file) => file,
            Err(error) => {
                println!("skipped: no BPF maps: {error}");
                return;
            }
        };
        let map = Map::of(file.as_fd()).expect("a map");
        assert_eq!(map.shape(), &shape);
        assert!(map.read(None, 16).expect("empty").keys.is_empty());
        map.write(&[3, 4], b"abcdefghij").expect("room for two");
        let batch = map.read(None, 16).expect("two entries");
        assert!(batch.next.is_none());
        let mut found: Vec<_> = batch.keys.iter().zip(batch.values.chunks(5)).collect();
        found.sort_unstable();
        assert_eq!(found, [(&3, &b"abcde"[..]), (&4, &b"fghij"[..])]);
        map.freeze().expect("our own");
        assert!(map.write(&[5], b"abcde").is_err());
        let refused = map.write(&[5], b"too long").expect_err("sizes differ");
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn unknown_types_are_named_by_number() {
        assert_eq!(type_name(HASH), "hash");
        assert_eq!(type_name(27), "ringbuf");
        assert_eq!(type_name(99), "99");
    }
}
