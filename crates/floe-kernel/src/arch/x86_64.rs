//! CPUID of x86-64.
//!
//! CPUID is an unprivileged instruction without side effects; a hypervisor may filter it, and
//! what it shows is what programs decide by.

use core::arch::x86_64::{__cpuid_count, CpuidResult};

use crate::cpu::{CpuError, CpuFacts, CpuVendor, WORDS, Word};

const XSAVE: u32 = 26;
const REP_GOOD: u32 = 16;
const NOPL: u32 = 20;
const CPUID: u32 = 25;

fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

/// Asks the CPU that we run on.
pub(crate) fn cpu_facts() -> Result<CpuFacts, CpuError> {
    let first = cpuid(0, 0);
    let vendor = vendor(first)?;
    let (level, extended) = (first.eax, cpuid(0x8000_0000, 0).eax);
    let signature = cpuid(1, 0).eax;
    let base_family = (signature >> 8) & 0xf;
    let family = if base_family == 0xf {
        base_family + ((signature >> 20) & 0xff)
    } else {
        base_family
    };
    let high_model = if family >= 6 {
        ((signature >> 16) & 0xf) << 4
    } else {
        0
    };
    let mut capability = words(level, extended);
    adjust(&mut capability, vendor, family, level);
    let xstate = (level >= 0xd && capability[Word::L1Ecx as usize] & (1 << XSAVE) != 0)
        .then(|| cpuid(0xd, 0));
    let user_mask = xstate.map_or(0, |leaf| u64::from(leaf.eax) | (u64::from(leaf.edx) << 32));
    Ok(CpuFacts {
        vendor,
        family,
        model: ((signature >> 4) & 0xf) + high_model,
        stepping: signature & 0xf,
        xfeatures_mask: CpuFacts::user_xfeatures(user_mask, &capability),
        capability,
        model_id: if extended >= 0x8000_0004 {
            model_id()
        } else {
            String::new()
        },
        xsave_size: xstate.map_or(0, |leaf| leaf.ebx),
        xsave_size_max: xstate.map_or(0, |leaf| leaf.ecx),
    })
}

fn vendor(leaf: CpuidResult) -> Result<CpuVendor, CpuError> {
    let bytes: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    match bytes.as_slice() {
        b"GenuineIntel" => Ok(CpuVendor::Intel),
        b"AuthenticAMD" | b"HygonGenuine" => Ok(CpuVendor::Amd),
        other => Err(CpuError::Vendor(
            String::from_utf8_lossy(other).into_owned(),
        )),
    }
}

/// The words of CRIU's image, as far as the CPU has their leaves.
fn words(level: u32, extended: u32) -> [u32; WORDS] {
    let mut words = [0; WORDS];
    let mut set = |word: Word, value: u32| words[word as usize] = value;
    let leaf = cpuid(1, 0);
    set(Word::L1Edx, leaf.edx);
    set(Word::L1Ecx, leaf.ecx);
    if level >= 6 {
        set(Word::L6Eax, cpuid(6, 0).eax);
    }
    if level >= 7 {
        let leaf = cpuid(7, 0);
        set(Word::L7Ebx, leaf.ebx);
        set(Word::L7Ecx, leaf.ecx);
        set(Word::L7Edx, leaf.edx);
    }
    if level >= 0xd {
        set(Word::LDs1Eax, cpuid(0xd, 1).eax);
    }
    if level >= 0xf {
        const LAST_LEVEL_CACHE: u32 = 1 << 1;
        let leaf = cpuid(0xf, 0);
        set(Word::LFs0Edx, leaf.edx);
        if leaf.edx & LAST_LEVEL_CACHE != 0 {
            set(Word::LFs1Edx, cpuid(0xf, 1).edx);
        }
    }
    if extended >= 0x8000_0001 {
        let leaf = cpuid(0x8000_0001, 0);
        set(Word::X1Ecx, leaf.ecx);
        set(Word::X1Edx, leaf.edx);
    }
    if extended >= 0x8000_0007 {
        set(Word::X7Ebx, cpuid(0x8000_0007, 0).ebx);
    }
    if extended >= 0x8000_0008 {
        set(Word::X8Ebx, cpuid(0x8000_0008, 0).ebx);
    }
    if extended >= 0x8000_000a {
        set(Word::XAEdx, cpuid(0x8000_000a, 0).edx);
    }
    words
}

/// The kernel's own bits of word 3 and its corrections, which CRIU's image holds as well.
fn adjust(words: &mut [u32; WORDS], vendor: CpuVendor, family: u32, level: u32) {
    words[Word::Linux1 as usize] |= (1 << CPUID) | (1 << NOPL);
    if level < 0xd {
        words[Word::L1Ecx as usize] &= !(1 << XSAVE);
    }
    let rep_good = match vendor {
        CpuVendor::Intel => family == 6,
        CpuVendor::Amd => {
            // Bit 31 means 3DNow! in the extended leaf only.
            words[Word::L1Edx as usize] &= !(1 << 31);
            family >= 0x10
        }
    };
    if rep_good {
        words[Word::Linux1 as usize] |= 1 << REP_GOOD;
    }
}

fn model_id() -> String {
    let leaves = [0x8000_0002, 0x8000_0003, 0x8000_0004].map(|leaf| cpuid(leaf, 0));
    let bytes: Vec<u8> = leaves
        .iter()
        .flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
        .flat_map(u32::to_le_bytes)
        .take_while(|byte| *byte != 0)
        .collect();
    // Intel pads on the left.
    String::from_utf8_lossy(&bytes)
        .trim_start_matches(' ')
        .to_owned()
}
