//! `floe.json`: what a whole dump consists of. Written last, so a directory without one was not
//! finished (or comes from another engine).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::dir::ImageDir;
use crate::error::ImageError;

/// Name of the manifest.
pub const MANIFEST_NAME: &str = "floe.json";
/// Version of the manifest that this crate writes, and the newest that it reads.
pub const MANIFEST_FORMAT: u32 = 1;
/// Largest manifest that is read, in bytes.
pub const MAX_MANIFEST: u64 = 64 << 20;
/// Hexadecimal digits of a generation's id.
const ID_DIGITS: usize = 32;
/// Name under which a manifest is written before it is renamed.
pub(crate) const MANIFEST_TEMPORARY: &str = ".floe.json.new";

/// Whether a directory holds all that a restore needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DumpKind {
    /// A checkpoint that can be restored.
    Full,
    /// Memory only, copied while the program ran on.
    PreDump,
}

/// What the caller knows about a dump.
#[derive(Clone, Debug)]
pub struct ManifestInfo {
    /// Full or pre-dump.
    pub kind: DumpKind,
    /// 0 for the first of a chain, then one more for each.
    pub generation: u32,
    /// What stands for this generation, where images are made of others; `None` for a new one.
    pub id: Option<String>,
    /// The link to the parent directory, as written.
    pub parent: Option<String>,
    /// The parent's [`Manifest::id`].
    pub parent_id: Option<String>,
    /// Dirty tracker that chose the pages, such as `uffd`; `None` for a full copy.
    pub tracker: Option<String>,
    /// Version of Floe.
    pub floe: String,
    /// Release of the kernel, as `uname -r`.
    pub kernel: String,
    /// Machine, as `uname -m`.
    pub machine: String,
    /// The processor's name.
    pub cpu: Option<String>,
    /// When the dump was made.
    pub created: SystemTime,
    /// The generations that are merged in it.
    pub rounds: Vec<RoundFacts>,
}

/// One file of a dump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Size in bytes.
    pub size: u64,
    /// BLAKE3 of the content in hex; `None` where it was not computed.
    pub blake3: Option<String>,
}

/// One generation as it was made, kept where several were merged into one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundFacts {
    /// Its number.
    pub number: u32,
    /// See [`Manifest::id`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `full` or `pre-dump`.
    pub kind: String,
    /// Dirty tracker that chose the pages.
    pub tracker: Option<String>,
    /// When it was made, in seconds since 1970 UTC.
    pub created: Option<u64>,
    /// When it began, in microseconds since 1970 UTC.
    pub began_us: Option<u64>,
    /// Bytes of pages that it copied.
    pub copied: u64,
    /// Bytes of pages that it found unchanged.
    pub unchanged: u64,
    /// Bytes of all its files.
    pub size: u64,
    /// How long the tree stood still, in microseconds.
    pub frozen_us: Option<u32>,
}

/// The content of `floe.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// See [`MANIFEST_FORMAT`].
    pub format: u32,
    /// Full or pre-dump.
    pub kind: DumpKind,
    /// See [`ManifestInfo::generation`].
    pub generation: u32,
    /// What stands for this generation and no other, also where it is compressed, squashed or unpacked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// See [`ManifestInfo::parent`].
    pub parent: Option<String>,
    /// See [`ManifestInfo::parent_id`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_id: Option<String>,
    /// See [`ManifestInfo::tracker`].
    pub tracker: Option<String>,
    /// See [`ManifestInfo::floe`].
    pub floe: String,
    /// See [`ManifestInfo::kernel`].
    pub kernel: String,
    /// See [`ManifestInfo::machine`].
    pub machine: String,
    /// See [`ManifestInfo::cpu`].
    pub cpu: Option<String>,
    /// When the dump was made, in seconds since 1970 UTC.
    pub created: u64,
    /// When the dump began, in microseconds since 1970 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub began_us: Option<u64>,
    /// The generations that were merged into this one, the oldest first; empty where none were.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<RoundFacts>,
    /// How the pages are compressed, such as `zstd:3`; `None` for plain ones, which CRIU reads too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<String>,
    /// Every file by name.
    pub files: BTreeMap<String, ManifestFile>,
}

/// A manifest is unreadable, or a directory is not what its manifest says.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A file cannot be opened.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A file cannot be read.
    #[error("Reading {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A changed manifest cannot take the place of the old one.
    #[error("Writing {}", path.display())]
    Replace {
        /// The manifest.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The manifest is no valid JSON, or lacks a field.
    #[error("{} is damaged", path.display())]
    Parse {
        /// The manifest.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The manifest is larger than any that is written.
    #[error("{} is damaged: {size} bytes, at most {MAX_MANIFEST} are allowed", path.display())]
    TooLarge {
        /// The manifest.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The manifest is newer than this program.
    #[error("{} has format {format}; this version of Floe knows formats up to {MANIFEST_FORMAT}: use a newer one", path.display())]
    Format {
        /// The manifest.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// A file that the manifest lists is absent.
    #[error("{} is listed in {MANIFEST_NAME} but missing: copy the directory again", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file has another size than the manifest says.
    #[error("{} has {found} bytes, {MANIFEST_NAME} says {listed}: copy the directory again", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Size in the manifest, in bytes.
        listed: u64,
        /// Size found, in bytes.
        found: u64,
    },
    /// A file's content has changed since the dump.
    #[error("{} differs from its BLAKE3 in {MANIFEST_NAME}: it was damaged or edited after the dump", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
    },
}

/// How much of the files [`Manifest::verify`] looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// That they are there with the right sizes: one `stat` a file.
    Sizes,
    /// Their content too, where a hash was computed.
    Hashes,
}

/// No two dumps are made of the same content at the same nanosecond.
fn new_id(since: Duration, files: &BTreeMap<String, ManifestFile>) -> String {
    let text = serde_json::to_vec(&(since, files)).expect("text keys only");
    blake3::hash(&text).to_hex()[..ID_DIGITS].to_string()
}

/// What a generation was made after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follows {
    /// The one in question.
    It,
    /// One of another number.
    AnotherNumber,
    /// One of the same number.
    Another,
}

impl Manifest {
    /// The manifest for these facts and files.
    pub fn new(info: ManifestInfo, files: BTreeMap<String, ManifestFile>) -> Manifest {
        let since = info.created.duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = info.id.unwrap_or_else(|| new_id(since, &files));
        Manifest {
            format: MANIFEST_FORMAT,
            kind: info.kind,
            generation: info.generation,
            id: Some(id),
            parent: info.parent,
            parent_id: info.parent_id,
            tracker: info.tracker,
            floe: info.floe,
            kernel: info.kernel,
            machine: info.machine,
            cpu: info.cpu,
            created: since.as_secs(),
            began_us: None,
            rounds: info.rounds,
            compression: None,
            files,
        }
    }

    /// Number of the generation that builds on the parent: of merged ones the oldest.
    pub fn oldest(&self) -> u32 {
        let merged = self.rounds.iter().map(|round| round.number);
        merged.min().unwrap_or(self.generation)
    }

    /// Whether this generation was made after `older` and nothing else, as far as both tell. Generations that are
    /// merged in this one may be in `older`, too.
    pub fn follows(&self, older: &Manifest) -> Follows {
        if older.generation.checked_add(1) == Some(self.oldest()) {
            return match (&self.parent_id, &older.id) {
                (Some(wanted), Some(found)) if wanted != found => Follows::Another,
                _ => Follows::It,
            };
        }
        let mut merged = self.rounds.iter();
        match merged.any(|round| round.number == older.generation && round.id == older.id) {
            true => Follows::It,
            false => Follows::AnotherNumber,
        }
    }

    /// The manifest of a directory; `None` when it has none.
    pub fn read(dir: &ImageDir) -> Result<Option<Manifest>, ManifestError> {
        let path = dir.path().join(MANIFEST_NAME);
        let Some(file) = dir.open_file(MANIFEST_NAME)? else {
            return Ok(None);
        };
        let mut text = Vec::new();
        let read = file.take(MAX_MANIFEST + 1).read_to_end(&mut text);
        if let Err(source) = read {
            return Err(ManifestError::Read { path, source });
        }
        if text.len() as u64 > MAX_MANIFEST {
            return Err(ManifestError::TooLarge {
                path,
                size: text.len() as u64,
            });
        }
        // The format first: a newer manifest may lack fields that this one must have.
        #[derive(Deserialize)]
        struct Versioned {
            format: u32,
        }
        match serde_json::from_slice::<Versioned>(&text) {
            Ok(Versioned { format }) if format > MANIFEST_FORMAT => {
                return Err(ManifestError::Format { path, format });
            }
            Ok(_) => {}
            Err(source) => return Err(ManifestError::Parse { path, source }),
        }
        match serde_json::from_slice(&text) {
            Ok(manifest) => Ok(Some(manifest)),
            Err(source) => Err(ManifestError::Parse { path, source }),
        }
    }

    /// Takes the place of the manifest of a directory, at once or not at all.
    pub fn replace(&self, directory: &Path) -> Result<(), ManifestError> {
        let path = directory.join(MANIFEST_NAME);
        let temporary = directory.join(MANIFEST_TEMPORARY);
        let mut text = serde_json::to_vec_pretty(self).expect("a manifest has text keys only");
        text.push(b'\n');
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        let written = options.open(&temporary).and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()?;
            std::fs::rename(&temporary, &path)
        });
        written.map_err(|source| ManifestError::Replace { path, source })
    }

    /// Checks that the directory holds what the manifest lists.
    pub fn verify(&self, dir: &ImageDir, verify: Verify) -> Result<(), ManifestError> {
        for (name, listed) in &self.files {
            let path = dir.path().join(name);
            let Some(found) = dir.file_size(name) else {
                return Err(ManifestError::Missing { path });
            };
            if found != listed.size {
                return Err(ManifestError::Size {
                    path,
                    listed: listed.size,
                    found,
                });
            }
            let Some(hash) = listed.blake3.as_ref().filter(|_| verify == Verify::Hashes) else {
                continue;
            };
            let Some(content) = dir.open_content(name)? else {
                return Err(ManifestError::Missing { path });
            };
            match content.hash() {
                Ok(found) if found.to_hex().as_str() == hash => {}
                Ok(_) => return Err(ManifestError::Hash { path }),
                Err(source) => return Err(ManifestError::Read { path, source }),
            }
        }
        Ok(())
    }
}
