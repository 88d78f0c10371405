//! Character devices without state of their own: `/dev/null`, `/dev/zero`, `/dev/random`, `/dev/kmsg`.
//!
//! Saved:    path, flags, owner, as of a regular file.
//! Rebuilt:  opened by path, then flags and owner. Needs: the device at its path.
//! Not kept: the place in the log of `/dev/kmsg` opened for writing.

use floe_image::messages::FileEntry;
use rustix::fs::{FileType, OFlags};

use super::FdKind;
use super::regular::{NamedFile, collect_named};
use crate::collect::{CollectError, Collector, FdProbe, FileId};

/// See the module.
pub struct Device;

const MEM_MAJOR: u32 = 1;
const KMSG_MINOR: u32 = 11;
const MISC_MAJOR: u32 = 10;
const AUTOFS_MINOR: u32 = 235;

fn number(fd: &FdProbe<'_>) -> (u32, u32) {
    let rdev = fd.stat().st_rdev;
    (rustix::fs::major(rdev), rustix::fs::minor(rdev))
}

impl FdKind for Device {
    fn recognises(&self, fd: &FdProbe<'_>) -> bool {
        let known = matches!(number(fd), (MEM_MAJOR, _) | (MISC_MAJOR, AUTOFS_MINOR));
        fd.file_type() == FileType::CharacterDevice && !fd.is_path() && known
    }

    fn collect(
        &self,
        id: FileId,
        fd: &FdProbe<'_>,
        collector: &mut Collector<'_>,
    ) -> Result<FileEntry, CollectError> {
        let mut file = NamedFile::of(fd)?;
        let write_only = fd.flags() & OFlags::ACCMODE.bits() == OFlags::WRONLY.bits();
        if number(fd) == (MEM_MAJOR, KMSG_MINOR) && write_only && file.pos == 0 {
            // The kernel refuses to seek here; this offset says not to.
            file.pos = u64::MAX;
        }
        collect_named(id, file, collector)
    }
}
