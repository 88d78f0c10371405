//! Whether a file is the one that a task had at the dump: asked by a restore, and by who looks ahead.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

use floe_image::messages::RegFileEntry;
use floe_options::{FileValidation, RestoreOptions};
use rustix::fs::{FileType, Stat};

use super::build_id;

/// How a file is not as a restore needs it. The images are in order.
#[derive(Debug, thiserror::Error)]
pub enum FileFault {
    #[error("{} cannot be opened: {error}", .path.display())]
    Unreachable { path: PathBuf, error: io::Error },
    #[error("{}, which is to be mounted in the tree, cannot be reached: {error}", .path.display())]
    NoMount { path: PathBuf, error: io::Error },
    #[error("{} is not as it was at the dump: its {what} was {saved}, is {found}", .path.display())]
    Changed {
        path: PathBuf,
        what: Property,
        saved: String,
        found: String,
    },
}

/// What of a file is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property {
    Type,
    Size,
    Mode,
    BuildId,
}

impl std::fmt::Display for Property {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Property::Type => "type",
            Property::Size => "size",
            Property::Mode => "mode",
            Property::BuildId => "build id",
        })
    }
}

impl FileFault {
    /// What to do about it.
    pub fn remedy(&self) -> String {
        let (what, saved, path) = match self {
            FileFault::Unreachable { error, .. } => {
                return match error.kind() {
                    io::ErrorKind::PermissionDenied => {
                        "run as a user that may open it, such as root".into()
                    }
                    _ => "bring it here, as it was at the dump".into(),
                };
            }
            FileFault::NoMount { .. } => {
                return "bring it here, or name the place where it is now (--external, --root)"
                    .into();
            }
            FileFault::Changed {
                what, saved, path, ..
            } => (what, saved, path),
        };
        match what {
            Property::Type | Property::Size => {
                "bring back the file as it was at the dump (a snapshot of its file system)".into()
            }
            Property::Mode => format!(
                "chmod {saved} {}, or restore with --skip-file-rwx-check",
                path.display()
            ),
            Property::BuildId => "install the build that ran at the dump; \
                 --file-validation filesize restores with another one, and the program may crash"
                .into(),
        }
    }
}

/// Compares a file with the entry of it.
pub fn compare(
    entry: &RegFileEntry,
    (file, stat): (impl AsFd, &Stat),
    options: &RestoreOptions,
) -> Result<(), FileFault> {
    compare_stat(entry, stat, options)?;
    if entry.build_id.is_empty() || options.file_validation != FileValidation::BuildId {
        return Ok(());
    }
    // A file that cannot be read now cannot be compared; it was found under the same name.
    let Ok(found) = build_id::read(file) else {
        return Ok(());
    };
    let found = build_id::to_words(&found.unwrap_or_default());
    match found == entry.build_id {
        true => Ok(()),
        false => Err(changed(
            entry,
            Property::BuildId,
            (hex(&entry.build_id), hex(&found)),
        )),
    }
}

/// The part of [`compare`] that need not open the file.
pub fn compare_stat(
    entry: &RegFileEntry,
    stat: &Stat,
    options: &RestoreOptions,
) -> Result<(), FileFault> {
    let found = FileType::from_raw_mode(stat.st_mode);
    let saved = entry.mode.map(FileType::from_raw_mode);
    if let Some(saved) = saved.filter(|saved| *saved != found) {
        let types = (type_name(saved).into(), type_name(found).into());
        return Err(changed(entry, Property::Type, types));
    }
    let regular = found == FileType::RegularFile;
    let size = entry.size.filter(|_| regular);
    if let Some(size) = size.filter(|size| i64::try_from(*size) != Ok(stat.st_size)) {
        let sizes = (format!("{size} bytes"), format!("{} bytes", stat.st_size));
        return Err(changed(entry, Property::Size, sizes));
    }
    match entry.mode {
        Some(mode) if mode != stat.st_mode && !options.skip_file_rwx_check => {
            const PERMISSIONS: u32 = 0o7777;
            let octal = |mode: u32| format!("{:o}", mode & PERMISSIONS);
            let modes = (octal(mode), octal(stat.st_mode));
            Err(changed(entry, Property::Mode, modes))
        }
        _ => Ok(()),
    }
}

fn changed(entry: &RegFileEntry, what: Property, (saved, found): (String, String)) -> FileFault {
    FileFault::Changed {
        path: PathBuf::from(&entry.name),
        what,
        saved,
        found,
    }
}

fn type_name(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "a file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a fifo",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Unknown => "unknown",
    }
}

fn hex(id: &[u32]) -> String {
    id.iter()
        .map(|word| format!("{:08x}", word.swap_bytes()))
        .collect()
}
