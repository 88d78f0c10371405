//! The generation that a dump builds on.

use std::path::PathBuf;

use floe_image::manifest::Manifest;
use floe_image::messages::InventoryEntry;
use floe_image::{ImageDir, ImageKind, ImageWriter, WriteError};
use floe_options::Place;

use crate::error::DumpError;

/// Where a dump stands in its chain.
#[derive(Debug, Default)]
pub struct Lineage {
    /// The parent's images.
    pub parent: Option<ImageDir>,
    /// The round that made them, where a finished dump of ours did.
    pub parent_round: Option<String>,
    /// What stands for the parent, where a finished dump of ours says so.
    pub parent_id: Option<String>,
    /// 0 without a parent.
    pub generation: u32,
    /// As the link is written.
    link: Option<PathBuf>,
}

impl Lineage {
    /// Opens the parent that was asked for. One that is not there is an error: a chain with a hole
    /// must be noticed before there is nothing left to build it on.
    pub fn find(place: &Place) -> Result<Lineage, DumpError> {
        let Some(link) = &place.prev_images_dir else {
            return Ok(Lineage::default());
        };
        let path = place.images_dir.join(link);
        let parent = ImageDir::open(&path)?;
        let manifest = Manifest::read(&parent)?;
        if manifest.is_none() && !parent.has(ImageKind::Inventory, 0) {
            return Err(DumpError::NoGeneration { path });
        }
        let round = match &manifest {
            Some(_) => parent
                .read_optional::<InventoryEntry>(ImageKind::Inventory, 0)?
                .and_then(|inventory| inventory.dump_criu_run_id),
            None => None,
        };
        let made = manifest.as_ref().map(|manifest| manifest.generation);
        Ok(Lineage {
            parent_round: round,
            parent_id: manifest.and_then(|manifest| manifest.id),
            generation: made.map_or(1, |generation| generation.saturating_add(1)),
            parent: Some(parent),
            link: Some(link.clone()),
        })
    }

    /// Makes the link to the parent, or takes away that of an earlier dump into this directory.
    pub fn write_link(&self, writer: &ImageWriter) -> Result<(), WriteError> {
        match &self.link {
            Some(link) => writer.link_parent(link),
            None => writer.unlink_parent(),
        }
    }

    /// The link to the parent as written.
    pub fn link(&self) -> Option<String> {
        let link = self.link.as_ref()?;
        Some(link.to_string_lossy().into_owned())
    }
}

/// Refuses images that would take the place of what they build on (`--prev-images-dir`), before anything is
/// removed there.
pub fn refuse_own_parent(place: &Place) -> Result<(), DumpError> {
    let Some(link) = &place.prev_images_dir else {
        return Ok(());
    };
    let own = ImageDir::open(&place.images_dir).ok();
    // What else is wrong with the chain is for whoever needs it.
    let mut next = ImageDir::open(place.images_dir.join(link)).ok();
    while let Some(parent) = next {
        if own.as_ref().is_some_and(|own| parent.is_same(own)) {
            return Err(DumpError::OwnParent {
                images: place.images_dir.clone(),
                link: link.clone(),
            });
        }
        next = parent.parent().ok().flatten();
    }
    Ok(())
}
