//! Looking for obstacles ahead of a dump, before it has written or tracked anything.
//!
//! The same collectors run as in the dump, on a tree that stands still for a moment. What they find is
//! dropped, and nothing is made for it: no image, no copy of a deleted file, no link.

use std::path::Path;
use std::time::Instant;

use floe_image::manifest::MANIFEST_NAME;
use floe_image::{ImageKind, ImageWriter};
use floe_inject::Watch;
use floe_kernel::features::KernelFeatures;
use floe_kernel::ids::HostPid;
use floe_options::DumpOptions;
use floe_resources::Collector;
use floe_resources::collect::make_room_for_descriptors;
use floe_resources::vma::MappingReader;

use crate::error::DumpError;
use crate::hooks::asked_external;
use crate::task::Shared;
use crate::{collect_all, release, reserve, stop, track};

/// Looks for what is in the way of the dump that `options` describe; the tree runs on in any case.
pub fn look(
    options: &DumpOptions,
    features: &KernelFeatures,
    watch: Option<&Watch>,
) -> Result<(), DumpError> {
    let root = HostPid(options.tree.get());
    let writer = ImageWriter::nowhere()?;
    let tracked = track::tracked_tasks(root)?;
    let mut mappings = MappingReader::default();
    if reserve::has_big_tasks(root) {
        mappings = MappingReader::prepare();
    }
    make_room_for_descriptors();
    let stopping = Instant::now();
    let tree = stop(root, options, watch)?;
    mappings.start(tree.living().map(|task| &task.proc));
    let options = &*asked_external(options)?;
    let mut collector = Collector::new(options, features, &writer)?;
    collector.set_tree(tree.tasks.iter().map(|task| task.pid), tree.pids.clone());
    collector.cache(|| tracked);
    collector.cache(|| mappings);
    collect_all(&tree, options, &mut Shared::new(), &mut collector)?;
    drop(collector);
    release::resume(tree)?;
    tracing::info!(
        frozen_us = stopping.elapsed().as_micros() as u64,
        "nothing is in the way of the dump"
    );
    Ok(())
}

/// Where a dump would write over an earlier one, it first looks whether it can be made.
pub fn spare_what_is_there(
    options: &DumpOptions,
    features: &KernelFeatures,
    watch: Option<&Watch>,
) -> Result<(), DumpError> {
    match holds_a_dump(&options.place.images_dir) {
        true => look(options, features, watch),
        false => Ok(()),
    }
}

fn holds_a_dump(images: &Path) -> bool {
    let inventory = ImageKind::Inventory.file_name(0);
    [MANIFEST_NAME, &inventory]
        .iter()
        .any(|name| images.join(name).exists())
}
