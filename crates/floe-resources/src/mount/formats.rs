//! Formats of programs with an interpreter of their own (`binfmt_misc`), which each user namespace has.
//!
//! Saved:    the entries of a `binfmt_misc` that the tree has mounted itself, also disabled ones.
//! Rebuilt:  registered again through the new mount, oldest first: the newest is asked first. Needs: all
//!           mounts, as an interpreter may be opened at once (flag `F`).
//! Not kept: that all of it was switched off (`status`); entries of the host's, which stay there.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use floe_image::ImageKind;
use floe_image::dir::ImageDir;
use floe_image::messages::BinfmtMiscEntry;
use rustix::fs::{Dir, Mode, OFlags};
use rustix::io::Errno;

use crate::collect::CollectError;
use crate::restore::{Attempt, ExecuteError, PlanError};

/// The name of the file system.
pub const NAME: &str = "binfmt_misc";
/// Its files that are no entries.
const REGISTER: &str = "register";
const STATUS: &str = "status";
/// Characters that may stand between the fields of an entry that is registered.
const DELIMITERS: &str = ":|;,#!@%^&~=+";

/// Reads all entries, the newest first.
pub fn collect(root: BorrowedFd<'_>, point: &str) -> Result<Vec<BinfmtMiscEntry>, CollectError> {
    let read = || -> io::Result<Vec<BinfmtMiscEntry>> {
        let mut entries = Vec::new();
        for name in names(root)? {
            let text = read_file(root, &name)?;
            let malformed = || io::Error::new(io::ErrorKind::InvalidData, format!("entry {name}"));
            entries.push(parse(&name, &text).ok_or_else(malformed)?);
        }
        if read_file(root, STATUS)?.trim() == "disabled" {
            tracing::warn!("the binfmt_misc at {point} is switched off, and will be on");
        }
        Ok(entries)
    };
    read().map_err(|source| CollectError::System {
        action: format!("Reading the formats of {point}"),
        source,
    })
}

fn names(root: BorrowedFd<'_>) -> io::Result<Vec<String>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(root, ".", flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::new(opened)? {
        let entry = entry?;
        let name = entry.file_name().to_str();
        let name = name.map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        if !matches!(name, "." | ".." | REGISTER | STATUS) {
            names.push(name.to_string());
        }
    }
    Ok(names)
}

fn open(root: BorrowedFd<'_>, name: &str, flags: OFlags) -> Result<File, Errno> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(root, name, flags, Mode::empty()).map(File::from)
}

fn read_file(root: BorrowedFd<'_>, name: &str) -> io::Result<String> {
    let mut text = String::new();
    open(root, name, OFlags::RDONLY)?.read_to_string(&mut text)?;
    Ok(text)
}

fn parse(name: &str, text: &str) -> Option<BinfmtMiscEntry> {
    let mut entry = BinfmtMiscEntry {
        name: name.to_string(),
        ..BinfmtMiscEntry::default()
    };
    for line in text.lines() {
        let (key, value) = line.split_once(' ').unwrap_or((line, ""));
        match key {
            "enabled" => entry.enabled = true,
            "disabled" => {}
            "interpreter" => entry.interpreter = value.to_string(),
            "flags:" => entry.flags = Some(value.to_string()),
            "extension" => entry.extension = Some(value.strip_prefix('.')?.to_string()),
            "offset" => entry.offset = Some(value.parse().ok()?),
            "magic" => entry.magic = Some(value.to_string()),
            "mask" => entry.mask = Some(value.to_string()),
            _ => return None,
        }
    }
    Some(entry)
}

/// The line that registers an entry; `None` where it is impossible.
fn line_of(entry: &BinfmtMiscEntry) -> Option<String> {
    let bytes = |hex: &str| -> Option<String> {
        let is_hex = hex.len().is_multiple_of(2) && hex.bytes().all(|b| b.is_ascii_hexdigit());
        let pairs = hex.as_bytes().chunks(2).map(str::from_utf8);
        let pairs = pairs.map(|pair| Some(format!("\\x{}", pair.ok()?)));
        is_hex.then(|| pairs.collect()).flatten()
    };
    let fields = match (&entry.magic, &entry.extension) {
        (Some(magic), _) => [
            "M".to_string(),
            entry.offset.unwrap_or(0).to_string(),
            bytes(magic)?,
            bytes(entry.mask.as_deref().unwrap_or(""))?,
        ],
        (None, Some(extension)) => {
            let empty = String::new;
            ["E".to_string(), empty(), extension.clone(), empty()]
        }
        (None, None) => return None,
    };
    let flags = entry.flags.as_deref().unwrap_or("");
    let fields = std::iter::once(entry.name.as_str())
        .chain(fields.iter().map(String::as_str))
        .chain([entry.interpreter.as_str(), flags]);
    let fields: Vec<&str> = fields.collect();
    let is_free = |mark: &char| !fields.iter().any(|field| field.contains(*mark));
    let delimiter = DELIMITERS.chars().find(is_free)?;
    let plain = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('/');
    let is_plain = plain(&entry.name) && !fields.iter().any(|field| field.contains('\n'));
    let mut line = String::new();
    for field in &fields {
        line.push(delimiter);
        line.push_str(field);
    }
    is_plain.then_some(line)
}

/// The entries of the images; `device` is that of the mount.
pub fn decode(images: &ImageDir, device: u32) -> Result<Vec<BinfmtMiscEntry>, PlanError> {
    let old = (ImageKind::BinfmtMiscOld, u64::from(device));
    let (kind, id) = match images.has(old.0, old.1) {
        true => old,
        false => (ImageKind::BinfmtMisc, 0),
    };
    let entries: Vec<BinfmtMiscEntry> = images.read_all(kind, id)?;
    match entries.iter().find(|entry| line_of(entry).is_none()) {
        None => Ok(entries),
        Some(bad) => {
            let what = format!("the format {} cannot be registered", bad.name);
            Err(PlanError::damaged(kind.file_name(id), what))
        }
    }
}

/// Registers entries; the coordinator is where their interpreters are found.
pub fn register(root: &OwnedFd, entries: &[BinfmtMiscEntry]) -> Result<(), ExecuteError> {
    let root = root.as_fd();
    for entry in entries.iter().rev() {
        let what = || format!("the format {} of {}", entry.name, entry.interpreter);
        if let Ok(text) = read_file(root, &entry.name) {
            if parse(&entry.name, &text).as_ref() != Some(entry) {
                tracing::warn!(
                    "there is another format {} already, which stays",
                    entry.name
                );
            }
            continue;
        }
        let line = line_of(entry).ok_or(Errno::INVAL);
        let line = line.during("Registering", what)?;
        let write = |name: &str, text: &str| -> io::Result<()> {
            open(root, name, OFlags::WRONLY)?.write_all(text.as_bytes())
        };
        write(REGISTER, &line).during("Registering", what)?;
        if !entry.enabled {
            write(&entry.name, "0").during("Disabling", what)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_shows_is_registered_again() {
        let text =
            "disabled\ninterpreter /usr/bin/a:b c\nflags: POCF\noffset 3\nmagic 7f45\nmask ff00\n";
        let entry = parse("name", text).expect("well formed");
        assert!(!entry.enabled);
        let line = line_of(&entry).expect("possible");
        assert_eq!(line, r"|name|M|3|\x7f\x45|\xff\x00|/usr/bin/a:b c|POCF");
        let text = "enabled\ninterpreter /bin/x\nflags: \nextension .ext\n";
        let entry = parse("e", text).expect("well formed");
        assert_eq!(line_of(&entry).expect("possible"), ":e:E::ext::/bin/x:");
        assert!(parse("e", "unknown words\n").is_none());
        let damaged = BinfmtMiscEntry {
            name: "../x".into(),
            ..entry
        };
        assert!(line_of(&damaged).is_none());
    }
}
