//! Which bits of a mapping's flags are which two-letter codes of `smaps`.
//!
//! The kernel prints a code for each bit that is set (`show_smap_vma_flags`), and which bit is which
//! changes between versions and architectures. So this is learned: of mappings whose bits and codes are
//! both known, a code belongs to the bits that are set in just the mappings that have it.

use std::collections::{BTreeSet, HashMap};

use crate::proc::VmFlags;

/// A code of `VmFlags:`.
pub(super) type Code = [u8; 2];

/// Bits that were always set together, and their codes.
struct Class {
    bits: u64,
    codes: Vec<Code>,
}

/// What was learned.
pub(super) struct Codes {
    classes: Vec<Class>,
    known: u64,
}

impl Codes {
    /// Learns of mappings' bits and codes; `None` where a code belongs to no bit.
    pub(super) fn learn(samples: &[(u64, BTreeSet<Code>)]) -> Option<Codes> {
        let where_bit = |bit: u32| -> Vec<bool> {
            samples.iter().map(|(raw, _)| raw >> bit & 1 != 0).collect()
        };
        let mut classes: HashMap<Vec<bool>, Class> = HashMap::new();
        for bit in 0..u64::BITS {
            let pattern = where_bit(bit);
            if pattern.contains(&true) {
                let codes = Vec::new();
                let class = classes.entry(pattern).or_insert(Class { bits: 0, codes });
                class.bits |= 1 << bit;
            }
        }
        let all: BTreeSet<Code> = samples
            .iter()
            .flat_map(|(_, codes)| codes)
            .copied()
            .collect();
        for code in all {
            let has = |(_, codes): &(u64, BTreeSet<Code>)| codes.contains(&code);
            let pattern: Vec<bool> = samples.iter().map(has).collect();
            classes.get_mut(&pattern)?.codes.push(code);
        }
        let classes: Vec<Class> = classes.into_values().collect();
        let known = classes.iter().fold(0, |all, class| all | class.bits);
        Some(Codes { classes, known })
    }

    /// The flags of a mapping with these bits; `None` when one of them was never seen, or only together
    /// with others that are not set here.
    pub(super) fn flags(&self, raw: u64) -> Option<VmFlags> {
        if raw & !self.known != 0 {
            return None;
        }
        let mut flags = VmFlags::default();
        for class in &self.classes {
            let set = raw & class.bits;
            let before = flags;
            class.codes.iter().for_each(|code| flags.set(code));
            if flags != before && set != class.bits {
                // Codes that nobody asks for need not be told apart.
                flags = (set == 0).then_some(before)?;
            }
        }
        Some(flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(raw: u64, codes: &[&Code]) -> (u64, BTreeSet<Code>) {
        (raw, codes.iter().map(|code| **code).collect())
    }

    #[test]
    fn bits_are_told_by_the_mappings_that_have_them() {
        // Bit 8 has no code, bits 1 and 3 are not told apart.
        let codes = Codes::learn(&[
            sample(0b1, &[b"rd"]),
            sample(0b1011, &[b"rd", b"lo"]),
            sample(0b1_0001, &[b"rd", b"mr"]),
            sample(0b1_0001_0001, &[b"rd", b"mr"]),
            sample(0b110_0001, &[b"rd", b"me", b"mw"]),
        ])
        .expect("learned");
        let locked = VmFlags {
            locked: true,
            ..VmFlags::default()
        };
        assert_eq!(codes.flags(0b1011), Some(locked));
        assert_eq!(codes.flags(0b1_0001_0000), Some(VmFlags::default()));
        assert_eq!(codes.flags(0b0011), None, "half of what belongs together");
        assert_eq!(
            codes.flags(0b10_0001),
            Some(VmFlags::default()),
            "of no use"
        );
        assert_eq!(codes.flags(0b1000_0001), None, "never seen");
    }

    #[test]
    fn a_code_without_a_bit_teaches_nothing() {
        let samples = [sample(1, &[b"rd"]), sample(1, &[b"rd", b"lo"])];
        assert!(Codes::learn(&samples).is_none());
    }
}
