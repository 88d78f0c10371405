//! BPF maps of numbers: keys of 32 bits, values of 64.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::check;

const MAP_CREATE: i32 = 0;
const MAP_LOOKUP_ELEM: i32 = 1;
const MAP_UPDATE_ELEM: i32 = 2;
const MAP_GET_FD_BY_ID: i32 = 14;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const MAP_FREEZE: i32 = 22;
/// Words of `struct bpf_map_info` up to the name's end.
const INFO: usize = 10;

/// The type of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Hash = 1,
    Array = 2,
    LruHash = 9,
}

/// `BPF_F_NO_PREALLOC`: entries of a hash come to be when they are set.
pub const NO_PREALLOC: u32 = 1;

/// What a map is made with.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub kind: Kind,
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
    /// At most 15 bytes.
    pub name: &'static str,
}

/// Makes a map.
pub fn create(shape: Shape) -> io::Result<OwnedFd> {
    let mut argument = [0_u32; 11];
    argument[..5].copy_from_slice(&[shape.kind as u32, 4, 8, shape.max_entries, shape.flags]);
    let mut name = [0; 16];
    name[..shape.name.len()].copy_from_slice(shape.name.as_bytes());
    for (word, bytes) in argument[7..].iter_mut().zip(name.chunks(4)) {
        *word = u32::from_ne_bytes(bytes.try_into().expect("chunks of four"));
    }
    descriptor(MAP_CREATE, &mut argument)
}

/// Sets the value of a key.
pub fn set(map: &OwnedFd, key: u32, value: u64) -> io::Result<()> {
    let mut value = value;
    element(MAP_UPDATE_ELEM, map, key, &mut value)
}

/// The value of a key, if it has one.
pub fn get(map: &OwnedFd, key: u32) -> io::Result<Option<u64>> {
    let mut value = 0;
    match element(MAP_LOOKUP_ELEM, map, key, &mut value) {
        Ok(()) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Forbids system calls to change the map.
pub fn freeze(map: &OwnedFd) -> io::Result<()> {
    // SAFETY: no buffer is named.
    unsafe { call(MAP_FREEZE, &mut [map.as_raw_fd() as u32]) }.map(drop)
}

/// The number and the name of a map.
pub fn identity(map: &OwnedFd) -> io::Result<(u32, String)> {
    let mut info = [0_u32; INFO];
    let address = info.as_mut_ptr() as u64;
    let mut argument = [
        u64::from(map.as_raw_fd() as u32) | (size_of_val(&info) as u64) << 32,
        address,
    ];
    // SAFETY: `info` is live, and of the length that is stated.
    unsafe { call(OBJ_GET_INFO_BY_FD, &mut argument)? };
    let name: Vec<u8> = info[6..]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok((info[1], String::from_utf8_lossy(name).into_owned()))
}

/// Another description of a map, that only reads.
pub fn open_to_read(map: &OwnedFd) -> io::Result<OwnedFd> {
    let (id, _) = identity(map)?;
    descriptor(MAP_GET_FD_BY_ID, &mut [id, 0, 1 << 3])
}

fn element(command: i32, map: &OwnedFd, key: u32, value: &mut u64) -> io::Result<()> {
    let mut argument = [
        u64::from(map.as_raw_fd() as u32),
        (&raw const key) as u64,
        (&raw mut *value) as u64,
        0,
    ];
    // SAFETY: `key` and `value` are live, and of the sizes that all maps of this module have.
    unsafe { call(command, &mut argument) }.map(drop)
}

fn descriptor<T>(command: i32, argument: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the arguments of both callers name no buffer.
    let fd = unsafe { call(command, argument)? };
    // SAFETY: both callers' commands give a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Calls `bpf(2)`.
///
/// # Safety
/// Buffers that the argument names are live and as long as the command needs.
unsafe fn call<T>(command: i32, argument: &mut T) -> io::Result<i64> {
    // SAFETY: the argument is live and of this size; the rest is the caller's promise.
    check(unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *argument, size_of::<T>()) })
}
