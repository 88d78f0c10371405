//! How the generations of a chain were made: what each copied, and for how long the tree stood still.

use floe_image::catalogue::{ImageKind, STATS_DUMP};
use floe_image::dir::{PE_PARENT, PE_PRESENT};
use floe_image::manifest::RoundFacts;
use floe_image::messages::StatsEntry;
use floe_image::{ImageDir, ImageError};
use floe_kernel::ids::PAGE_SIZE;

use crate::{Chain, Generation};

/// The rounds of a chain, oldest first; those that were merged into one generation are told by it.
pub fn of_chain(chain: &Chain) -> Result<Vec<RoundFacts>, ImageError> {
    let mut rounds = Vec::new();
    for (index, generation) in chain.generations().iter().enumerate() {
        match &generation.manifest {
            Some(manifest) if !manifest.rounds.is_empty() => {
                rounds.extend(manifest.rounds.iter().cloned());
            }
            _ => rounds.push(of_generation(generation, chain.number(index))?),
        }
    }
    Ok(rounds)
}

fn of_generation(generation: &Generation, number: u32) -> Result<RoundFacts, ImageError> {
    let dir: &ImageDir = &generation.dir;
    let (mut copied, mut unchanged) = (0, 0);
    for (kind, id) in dir.images()? {
        if !matches!(kind, ImageKind::Pagemap | ImageKind::ShmemPagemap) {
            continue;
        }
        for entry in dir.read_pagemap(kind, id.unwrap_or(0))?.1 {
            let bytes = entry.nr_pages().saturating_mul(PAGE_SIZE);
            if entry.flags() & PE_PRESENT != 0 {
                copied += bytes;
            } else if entry.flags() & PE_PARENT != 0 {
                unchanged += bytes;
            }
        }
    }
    let stats = dir.read_optional::<StatsEntry>(ImageKind::Stats, STATS_DUMP)?;
    let manifest = generation.manifest.as_ref();
    let names = dir.file_names()?;
    Ok(RoundFacts {
        number,
        id: manifest.and_then(|manifest| manifest.id.clone()),
        kind: kind_word(generation.is_pre_dump()).to_owned(),
        tracker: manifest.and_then(|manifest| manifest.tracker.clone()),
        created: manifest.map(|manifest| manifest.created),
        began_us: manifest.and_then(|manifest| manifest.began_us),
        copied,
        unchanged,
        size: names.iter().filter_map(|name| dir.file_size(name)).sum(),
        frozen_us: stats
            .and_then(|stats| stats.dump)
            .map(|dump| dump.frozen_time),
    })
}

/// What a checkpoint is called.
pub(crate) fn kind_word(is_pre_dump: bool) -> &'static str {
    if is_pre_dump { "pre-dump" } else { "full" }
}
