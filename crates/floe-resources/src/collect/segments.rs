//! Memory that is shared between address spaces, saved once.

use std::os::fd::OwnedFd;

use rustix::fs::MemfdFlags;

use super::CollectError;

/// A file in memory whose pages are saved as `pagemap-shmem-ID`.
#[derive(Debug)]
pub struct Segment {
    pub id: u64,
    /// Opened for reading, with an offset of its own.
    pub file: OwnedFd,
    /// Bytes.
    pub size: u64,
}

/// The device number of the kernel's internal tmpfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedMemoryDevice(pub u64);

impl SharedMemoryDevice {
    /// Finds it by making a file there.
    pub fn probe() -> Result<Self, CollectError> {
        rustix::fs::memfd_create("floe-probe", MemfdFlags::CLOEXEC)
            .and_then(rustix::fs::fstat)
            .map(|stat| SharedMemoryDevice(stat.st_dev))
            .map_err(|errno| CollectError::System {
                action: "Making a memfd".to_string(),
                source: errno.into(),
            })
    }
}
