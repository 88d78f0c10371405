//! `floe cpuinfo dump` and `floe cpuinfo check`.

use floe_image::{ImageDir, ImageKind, ImageWriter};
use floe_kernel::cpu::CpuFacts;
use floe_options::{CpuCapabilities, Place};
use floe_resources::cpu;

use crate::exit::{Exit, Failure};

/// Writes `cpuinfo.img` of this CPU.
pub fn dump(place: &Place) -> Result<Exit, Failure> {
    let facts = CpuFacts::read().map_err(|error| Failure::new(Exit::Unsupported, error))?;
    let written = ImageWriter::for_statistics(&place.images_dir)
        .and_then(|writer| writer.write_one(ImageKind::Cpuinfo, 0, &cpu::encode(&facts)));
    written.map_err(|error| Failure::new(Exit::Failed, error))?;
    Ok(Exit::Done)
}

/// Compares this CPU with `cpuinfo.img`. Asked for nothing, it compares everything, as CRIU does.
pub fn check(place: &Place, wanted: CpuCapabilities) -> Result<Exit, Failure> {
    let wanted = if wanted == CpuCapabilities::NONE {
        CpuCapabilities::ALL
    } else {
        wanted
    };
    let facts = CpuFacts::read().map_err(|error| Failure::new(Exit::Unsupported, error))?;
    let image =
        ImageDir::open(&place.images_dir).and_then(|dir| dir.read_one(ImageKind::Cpuinfo, 0));
    let image = image.map_err(|error| Failure::new(Exit::BadImage, error))?;
    cpu::compare(&image, &facts, wanted).map_err(|mismatches| {
        let lines: Vec<String> = mismatches.iter().map(ToString::to_string).collect();
        let damaged = mismatches.iter().any(|m| {
            matches!(
                m,
                cpu::CpuMismatch::Count(_) | cpu::CpuMismatch::Version { .. }
            )
        });
        let exit = if damaged {
            Exit::BadImage
        } else {
            Exit::Unsupported
        };
        Failure::new(exit, anyhow::anyhow!("{}", lines.join("\n")))
    })?;
    Ok(Exit::Done)
}
