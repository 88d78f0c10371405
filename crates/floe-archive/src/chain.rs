//! A chain of generations: a checkpoint and all that it builds on.

use std::path::PathBuf;

use floe_image::manifest::{Follows, Manifest, ManifestError};
use floe_image::{ImageDir, ImageError, ImageKind};

/// One directory of a chain.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Its images.
    pub dir: ImageDir,
    /// Its manifest; other engines write none.
    pub manifest: Option<Manifest>,
}

/// Generations, oldest first; never empty.
#[derive(Clone, Debug)]
pub struct Chain {
    generations: Vec<Generation>,
}

/// A chain cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// A directory or an image of it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A link `parent` leads to another generation than the one that was built on.
    #[error(
        "{} builds on generation {wanted}, but its link `parent` leads to generation {found}: \
         the directories of the chain were mixed up. Bring each back to its own place, or make the link anew (`ln -sfn`)",
        dir.display()
    )]
    Mixed {
        dir: PathBuf,
        wanted: String,
        found: u32,
    },
    /// The generation that was built on is not there any more.
    #[error(
        "{} builds on another checkpoint than the one that is in {} now: that was dumped into the same directory later, \
         or comes from another chain. Bring the first one back: it alone has the pages that this generation left to it",
        dir.display(), parent.display()
    )]
    Replaced { dir: PathBuf, parent: PathBuf },
}

impl Chain {
    /// Follows the links `parent` from the newest directory.
    pub fn open(newest: &ImageDir) -> Result<Chain, ChainError> {
        let mut generations = Vec::new();
        let mut next = Some(newest.clone());
        while let Some(dir) = next {
            next = dir.parent()?;
            let manifest = Manifest::read(&dir)?;
            generations.push(Generation { dir, manifest });
        }
        generations.reverse();
        Ok(Chain { generations })
    }

    /// Checks that each generation builds on the one that it was made on, as far as their manifests tell.
    pub fn check_links(&self) -> Result<(), ChainError> {
        for pair in self.generations.windows(2) {
            let (Some(older), Some(newer)) = (&pair[0].manifest, &pair[1].manifest) else {
                continue;
            };
            let dir = pair[1].dir.path().to_path_buf();
            match newer.follows(older) {
                Follows::It => {}
                Follows::Another => {
                    let parent = pair[0].dir.path().to_path_buf();
                    return Err(ChainError::Replaced { dir, parent });
                }
                Follows::AnotherNumber => {
                    let wanted = newer.oldest().checked_sub(1);
                    return Err(ChainError::Mixed {
                        dir,
                        wanted: wanted.map_or("none".to_string(), |number| number.to_string()),
                        found: older.generation,
                    });
                }
            }
        }
        Ok(())
    }

    /// All, oldest first.
    pub fn generations(&self) -> &[Generation] {
        &self.generations
    }

    /// The one that a restore begins with.
    pub fn newest(&self) -> &Generation {
        self.generations.last().expect("a chain has at least one")
    }

    /// Number of the newest generation, as its manifest says or as counted.
    pub fn newest_number(&self) -> u32 {
        let counted = self.generations.len() as u32 - 1;
        let noted = self.newest().manifest.as_ref();
        noted.map_or(counted, |manifest| manifest.generation.max(counted))
    }

    /// Number of a generation by its index.
    pub fn number(&self, index: usize) -> u32 {
        self.newest_number() - (self.generations.len() - 1 - index) as u32
    }
}

impl Generation {
    /// What stands for this generation and no other: its id; of older versions a hash of its manifest, of other
    /// engines one of its small images.
    pub fn digest(&self) -> Result<String, ChainError> {
        let id = self
            .manifest
            .as_ref()
            .and_then(|manifest| manifest.id.clone());
        if let Some(id) = id {
            return Ok(id);
        }
        let mut hasher = blake3::Hasher::new();
        if let Some(manifest) = &self.manifest {
            // Pages may be compressed or punched later, which makes no other generation of it.
            let mut lasting = manifest.clone();
            lasting.compression = None;
            lasting
                .files
                .retain(|name, _| !matches!(kind_of(name), Some((ImageKind::Pages, _))));
            let text = serde_json::to_vec(&lasting).expect("a manifest has text keys only");
            hasher.update(&text);
        } else {
            let mut images = self.dir.images()?;
            images.sort();
            for (kind, id) in images.into_iter().filter(|(kind, _)| !kind.is_raw()) {
                let name = kind.file_name(id.unwrap_or(0));
                hasher.update(name.as_bytes());
                if let Some(file) = self.dir.open_file(&name)? {
                    let read = hasher.update_reader(file);
                    read.map_err(|source| ImageError::Read {
                        path: self.dir.path().join(&name),
                        offset: 0,
                        source,
                    })?;
                }
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Whether this is memory only, copied while the program ran on.
    pub fn is_pre_dump(&self) -> bool {
        match &self.manifest {
            Some(manifest) => manifest.kind == floe_image::manifest::DumpKind::PreDump,
            None => {
                // With the state of tasks only the tree is missing.
                let tasks = self.dir.has(ImageKind::Pstree, 0)
                    || self
                        .dir
                        .ids(ImageKind::Core)
                        .is_ok_and(|ids| !ids.is_empty());
                !tasks && self.dir.has(ImageKind::Inventory, 0)
            }
        }
    }
}

/// Kind and number of an image by its name, compressed or not.
pub(crate) fn kind_of(name: &str) -> Option<(ImageKind, Option<u64>)> {
    ImageKind::of_file_name(name.trim_end_matches(".zst").trim_end_matches(".lz4"))
}
