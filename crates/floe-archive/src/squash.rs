//! One full checkpoint out of a chain, in a directory.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use floe_image::catalogue::ImageKind;
use floe_image::dir::{GENERATIONS, PARENT_LINK};
use floe_image::{ImageDir, ImageError, ImageWriter, PagesReader, Sync, WriteError};
use rustix::fs::RenameFlags;
use rustix::io::Errno;

use crate::merged::{MergeError, Merged, MergedPages};
use crate::unpack::EARLIER;

/// Bytes that are copied at once where the kernel cannot do it.
const PART: usize = 1 << 20;

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SquashReport {
    /// Generations that became one.
    pub generations: usize,
    /// Bytes of pages.
    pub bytes: u64,
}

/// Squashing failed; the chain is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SquashError {
    /// The chain is not whole.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The new directory.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A file cannot be copied.
    #[error("Copying {name} to {}", into.display())]
    Copy {
        name: String,
        into: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The new directory must not be there.
    #[error("{} is there already: give a new directory", path.display())]
    Exists { path: PathBuf },
    /// The finished directory cannot take the place of the old one.
    #[error("Putting {} in the place of {}", new.display(), old.display())]
    Replace {
        new: PathBuf,
        old: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Makes a full checkpoint of the chain of `newest` in the new directory `into`.
pub fn squash(newest: &ImageDir, into: &Path) -> Result<SquashReport, SquashError> {
    let merged = Merged::read(newest, None)?;
    if into.symlink_metadata().is_ok() {
        return Err(SquashError::Exists {
            path: into.to_path_buf(),
        });
    }
    let writer = ImageWriter::create(into, Sync::Durable)?;
    let outcome = write(&merged, &writer);
    if outcome.is_err() {
        // It lacks its manifest in any case.
        let _ = std::fs::remove_dir_all(into);
    }
    outcome
}

/// Makes the directory itself full: the new one takes its place at once, or not at all.
pub fn squash_in_place(path: &Path) -> Result<SquashReport, SquashError> {
    let old = path.canonicalize().map_err(|source| ImageError::OpenDir {
        path: path.to_path_buf(),
        source,
    })?;
    let mut name = old.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".squash-{}", std::process::id()));
    let new = old.with_file_name(name);
    let report = squash(&ImageDir::open(&old)?, &new)?;
    let cwd = rustix::fs::CWD;
    let swapped = rustix::fs::renameat_with(cwd, &new, cwd, &old, RenameFlags::EXCHANGE);
    swapped.map_err(|errno| {
        let _ = std::fs::remove_dir_all(&new);
        SquashError::Replace {
            new: new.clone(),
            old: old.clone(),
            source: errno.into(),
        }
    })?;
    // The old files are in the way of nobody now.
    keep_others(&new, &old);
    let _ = std::fs::remove_dir_all(&new);
    Ok(report)
}

/// Logs, and whatever else lay beside the images, move to the new directory; generations that are in the
/// new one now do not.
fn keep_others(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let text = name.to_string_lossy();
        let image = text.ends_with(".img")
            || text.contains(".img.")
            || [PARENT_LINK, GENERATIONS, EARLIER].contains(&&*text);
        if !image && !to.join(&name).exists() {
            let _ = std::fs::rename(entry.path(), to.join(&name));
        }
    }
}

fn write(merged: &Merged, writer: &ImageWriter) -> Result<SquashReport, SquashError> {
    let newest = &merged.chain.newest().dir;
    for name in &merged.files {
        let failed = |source| failed(writer, name, source);
        let Some(file) = newest.open_file(name)? else {
            return Err(failed(io::ErrorKind::NotFound.into()));
        };
        let size = file.metadata().map_err(failed)?.len();
        let out = writer.create_file(name)?;
        copy(&PagesReader::Plain(file), (0, size), (&out, 0)).map_err(failed)?;
        let noted = merged
            .chain
            .newest()
            .manifest
            .as_ref()
            .and_then(|manifest| manifest.files.get(name));
        let hash = noted.and_then(|noted| blake3::Hash::from_hex(noted.blake3.as_ref()?).ok());
        writer.note_file(name, size, hash);
    }
    let mut bytes = 0;
    for space in &merged.memory {
        bytes += write_pages(space, writer)?;
        let name = space.kind.file_name(space.id);
        let pagemap = space.pagemap();
        let written = writer.create_file(&name)?.write_all(&pagemap);
        written.map_err(|source| failed(writer, &name, source))?;
        writer.note_file(&name, pagemap.len() as u64, Some(blake3::hash(&pagemap)));
    }
    writer.finish(merged.manifest_info(None))?;
    Ok(SquashReport {
        generations: merged.chain.generations().len(),
        bytes,
    })
}

fn failed(writer: &ImageWriter, name: &str, source: io::Error) -> SquashError {
    SquashError::Copy {
        name: name.to_owned(),
        into: writer.path().to_path_buf(),
        source,
    }
}

fn write_pages(space: &MergedPages, writer: &ImageWriter) -> Result<u64, SquashError> {
    let out = writer.create_raw(ImageKind::Pages, space.pages_id.into())?;
    let name = ImageKind::Pages.file_name(space.pages_id.into());
    let mut opened = None;
    let mut done = 0;
    for run in space.stored() {
        if opened.as_ref().is_none_or(|(file, _)| *file != run.file) {
            opened = Some((run.file, space.index.open(run.file)?));
        }
        let (_, pages) = opened.as_ref().expect("opened above");
        copy(pages, (run.offset, run.len), (&out, done))
            .map_err(|source| failed(writer, &name, source))?;
        done += run.len;
    }
    Ok(done)
}

/// Copies a range; the file system shares the blocks where it can, else the kernel copies them.
fn copy(
    from: &PagesReader,
    (mut offset, mut len): (u64, u64),
    (to, mut at): (&File, u64),
) -> io::Result<()> {
    if let Some(plain) = from.as_plain() {
        while len > 0 {
            match rustix::fs::copy_file_range(
                plain,
                Some(&mut offset),
                to,
                Some(&mut at),
                len.min(1 << 30) as usize,
            ) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(copied) => len -= copied as u64,
                Err(Errno::INTR) => {}
                // Between file systems of different kinds, or where it is not known.
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    let mut buffer = vec![0; PART.min(len as usize)];
    while len > 0 {
        let part = &mut buffer[..(len as usize).min(PART)];
        from.read_exact_at(part, offset)?;
        std::os::unix::fs::FileExt::write_all_at(to, part, at)?;
        (offset, at, len) = (
            offset + part.len() as u64,
            at + part.len() as u64,
            len - part.len() as u64,
        );
    }
    Ok(())
}
