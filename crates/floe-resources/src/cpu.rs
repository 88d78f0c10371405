//! CPU capabilities (`cpuinfo.img`).
//!
//! Saved:    CPUID, xsave components and sizes of the CPU that the tasks ran on.
//! Rebuilt:  nothing; the restoring CPU is compared with them.
//! Not kept: capabilities of this machine that no program can see.

use floe_image::messages::{CpuinfoEntry, CpuinfoX86Entry, CpuinfoX86EntryVendor};
use floe_kernel::cpu::{CpuFacts, CpuVendor, INSTRUCTION_FEATURES, WORDS, WORDS_V1};
use floe_options::CpuCapabilities;

/// CRIU 4.2 leaves out components 1 and 3 (it clears the number of HDC, 10, where it means its
/// mask) and refuses an image that names them.
const COMPONENTS_CRIU_REFUSES: u64 = 0b1010;

/// The image of a CPU.
pub fn encode(facts: &CpuFacts) -> CpuinfoEntry {
    let vendor = match facts.vendor {
        CpuVendor::Intel => CpuinfoX86EntryVendor::Intel,
        CpuVendor::Amd => CpuinfoX86EntryVendor::Amd,
    };
    let entry = CpuinfoX86Entry {
        vendor_id: vendor.into(),
        cpu_family: facts.family,
        model: facts.model,
        stepping: facts.stepping,
        capability_ver: 2,
        capability: facts.capability.to_vec(),
        model_id: (!facts.model_id.is_empty()).then(|| facts.model_id.clone()),
        xfeatures_mask: Some(facts.xfeatures_mask & !COMPONENTS_CRIU_REFUSES),
        xsave_size: Some(facts.xsave_size),
        xsave_size_max: Some(facts.xsave_size_max),
    };
    CpuinfoEntry {
        x86_entry: vec![entry],
        ..CpuinfoEntry::default()
    }
}

/// Why the tasks of an image cannot run here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuMismatch {
    /// The image is damaged.
    #[error("cpuinfo has {0} entries for x86-64, one is expected")]
    Count(usize),
    /// The image is damaged, or newer than we are.
    #[error("cpuinfo has capabilities of version {version} with {words} words, which is unknown")]
    Version { version: u32, words: usize },
    /// The CPU lacks instructions.
    #[error("This CPU lacks {}, which the tasks may use (restore anyway with --cpu-cap=none)", .0.join(", "))]
    Instructions(Vec<&'static str>),
    /// The xsave area cannot hold the state.
    #[error(
        "This CPU lacks xsave components {0:#x} of the saved one (restore anyway with --cpu-cap=none)"
    )]
    StateComponents(u64),
    /// Programs that looked up the size will use the old one.
    #[error(
        "The xsave area has {here} bytes here and had {saved} (restore anyway with --cpu-cap=none)"
    )]
    StateSize { saved: u32, here: u32 },
    /// `--cpu-cap=cpu` was asked for.
    #[error(
        "This CPU's capabilities are not exactly those of the saved one, as --cpu-cap=cpu demands"
    )]
    NotEqual,
}

/// Compares an image with a CPU, as far as `wanted` says; every mismatch is in the list.
pub fn compare(
    image: &CpuinfoEntry,
    here: &CpuFacts,
    wanted: CpuCapabilities,
) -> Result<(), Vec<CpuMismatch>> {
    let [saved] = image.x86_entry.as_slice() else {
        return Err(vec![CpuMismatch::Count(image.x86_entry.len())]);
    };
    let words = match (saved.capability_ver, saved.capability.len()) {
        (1, WORDS_V1) => WORDS_V1,
        (2, WORDS) => WORDS,
        (version, words) => return Err(vec![CpuMismatch::Version { version, words }]),
    };
    let mut found = Vec::new();
    if wanted.instructions {
        let lacks = |word: usize, bit: u32| {
            word < words
                && saved.capability[word] & (1 << bit) != 0
                && here.capability[word] & (1 << bit) == 0
        };
        let missing: Vec<_> = INSTRUCTION_FEATURES
            .iter()
            .filter(|(word, bit, _)| lacks(*word as usize, *bit))
            .map(|(.., name)| *name)
            .collect();
        if !missing.is_empty() {
            found.push(CpuMismatch::Instructions(missing));
        }
    }
    if wanted.fpu {
        compare_state(saved, here, &mut found);
    }
    if wanted.exact && saved.capability[..] != here.capability[..words] {
        found.push(CpuMismatch::NotEqual);
    }
    if found.is_empty() { Ok(()) } else { Err(found) }
}

fn compare_state(saved: &CpuinfoX86Entry, here: &CpuFacts, found: &mut Vec<CpuMismatch>) {
    // Fields that an old image lacks cannot be compared.
    let missing = saved.xfeatures_mask.unwrap_or(0) & !here.xfeatures_mask;
    if missing != 0 {
        found.push(CpuMismatch::StateComponents(missing));
    }
    let sizes = [
        (saved.xsave_size, here.xsave_size),
        (saved.xsave_size_max, here.xsave_size_max),
    ];
    for (saved, here) in sizes {
        if let Some(saved) = saved.filter(|saved| *saved != here) {
            found.push(CpuMismatch::StateSize { saved, here });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use floe_kernel::cpu::Word;

    fn facts() -> CpuFacts {
        let mut capability = [0; WORDS];
        capability[Word::L1Edx as usize] = 0x0780_0001;
        capability[Word::L7Ebx as usize] = 1 << 5;
        CpuFacts {
            vendor: CpuVendor::Intel,
            family: 6,
            model: 85,
            stepping: 7,
            capability,
            model_id: "A CPU".into(),
            xfeatures_mask: 7,
            xsave_size: 832,
            xsave_size_max: 832,
        }
    }

    #[test]
    fn the_same_cpu_matches_in_every_way() {
        assert_eq!(
            compare(&encode(&facts()), &facts(), CpuCapabilities::ALL),
            Ok(())
        );
    }

    #[test]
    fn a_smaller_cpu_is_refused_with_the_list_unless_told_otherwise() {
        let mut here = facts();
        here.capability[Word::L7Ebx as usize] = 0;
        here.xfeatures_mask = 3;
        here.xsave_size = 576;
        let image = encode(&facts());
        let found = compare(&image, &here, CpuCapabilities::DEFAULT).expect_err("AVX2 is missing");
        assert_eq!(
            found,
            [
                CpuMismatch::Instructions(vec!["avx2"]),
                CpuMismatch::StateComponents(4),
                CpuMismatch::StateSize {
                    saved: 832,
                    here: 576
                },
            ]
        );
        assert_eq!(compare(&image, &here, CpuCapabilities::NONE), Ok(()));
    }

    #[test]
    fn a_bigger_cpu_is_fine_unless_equality_is_asked_for() {
        let mut here = facts();
        here.capability[Word::L7Ebx as usize] |= 1 << 16;
        let image = encode(&facts());
        assert_eq!(compare(&image, &here, CpuCapabilities::DEFAULT), Ok(()));
        assert_eq!(
            compare(&image, &here, CpuCapabilities::ALL),
            Err(vec![CpuMismatch::NotEqual])
        );
    }

    #[test]
    fn damaged_images_are_named() {
        let empty = CpuinfoEntry::default();
        assert_eq!(
            compare(&empty, &facts(), CpuCapabilities::ALL),
            Err(vec![CpuMismatch::Count(0)])
        );
        let mut short = encode(&facts());
        short.x86_entry[0].capability.truncate(3);
        let expected = CpuMismatch::Version {
            version: 2,
            words: 3,
        };
        assert_eq!(
            compare(&short, &facts(), CpuCapabilities::ALL),
            Err(vec![expected])
        );
    }
}
