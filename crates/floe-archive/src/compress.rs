//! Compressing the pages of a finished directory, for Floe alone: other engines cannot read them.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use floe_image::catalogue::ImageKind;
use floe_image::frames::{Codec, FRAME_BYTES, FrameWriter};
use floe_image::manifest::{MANIFEST_NAME, Manifest, ManifestError, ManifestFile};
use floe_image::{ImageDir, ImageError};

/// Bytes before and after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompressReport {
    /// Bytes of pages.
    pub content: u64,
    /// Bytes of the compressed files.
    pub stored: u64,
}

/// Compressing failed; the plain pages are still there.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Without a manifest nothing says that the pages are compressed.
    #[error("{} has no {MANIFEST_NAME}: only finished checkpoints of Floe are compressed", path.display())]
    NoManifest { path: PathBuf },
    /// A file.
    #[error("Compressing {}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Compresses every `pages-N.img` of a directory. The manifest changes at once, before the plain files go.
pub fn compress(
    path: &Path,
    codec: Codec,
    threads: usize,
) -> Result<CompressReport, CompressError> {
    let dir = ImageDir::open(path)?;
    let Some(mut manifest) = Manifest::read(&dir)? else {
        return Err(CompressError::NoManifest {
            path: path.to_path_buf(),
        });
    };
    let mut report = CompressReport::default();
    let mut plain = Vec::new();
    for id in dir.ids(ImageKind::Pages)? {
        let name = ImageKind::Pages.file_name(id);
        let compressed = format!("{name}{}", codec.suffix());
        let failed = |source| CompressError::File {
            path: path.join(&name),
            source,
        };
        let (stored, hash) =
            compress_file(&path.join(&name), &path.join(&compressed), codec, threads)
                .map_err(failed)?;
        report.content += dir.file_size(&name).unwrap_or(0);
        report.stored += stored;
        manifest.files.remove(&name);
        manifest.files.insert(
            compressed,
            ManifestFile {
                size: stored,
                blake3: Some(hash.to_hex().to_string()),
            },
        );
        plain.push(path.join(name));
    }
    manifest.compression = Some(codec.to_string());
    manifest.replace(path)?;
    for path in plain {
        std::fs::remove_file(&path).map_err(|source| CompressError::File { path, source })?;
    }
    Ok(report)
}

fn compress_file(
    from: &Path,
    to: &Path,
    codec: Codec,
    threads: usize,
) -> io::Result<(u64, blake3::Hash)> {
    let mut input = File::open(from)?;
    let output = create(to)?;
    let mut frames = FrameWriter::new(
        Hashing {
            out: output,
            hasher: blake3::Hasher::new(),
        },
        codec,
        threads,
    )?;
    let mut input = io::BufReader::with_capacity(FRAME_BYTES, &mut input);
    io::copy(&mut input, &mut frames)?;
    let (hashing, stored) = frames.finish()?;
    hashing.out.sync_all()?;
    Ok((stored, hashing.hasher.finalize()))
}

/// Readable by the owner only, as all images.
fn create(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path)
}

/// Hashes what goes through.
struct Hashing {
    out: File,
    hasher: blake3::Hasher,
}

impl io::Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
