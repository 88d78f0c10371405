//! Layout of the extended processor state that ptrace gives (CPUID leaf 0xD).

use std::arch::x86_64::__cpuid_count;
use std::ops::Range;
use std::sync::OnceLock;

/// A component of the xsave area, by its bit in XCR0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XsaveComponent {
    Ymm = 2,
    BndRegs = 3,
    BndCsr = 4,
    Opmask = 5,
    ZmmHi256 = 6,
    Hi16Zmm = 7,
    Pkru = 9,
}

/// Where a component lies in the standard (not compacted) format; `None` when this CPU or kernel does
/// not have it. The offsets differ between makers: only CPUID tells.
///
/// Asked once and kept: the instruction is slow in virtual machines, and the answer never changes.
pub fn component_range(component: XsaveComponent) -> Option<Range<usize>> {
    static KNOWN: OnceLock<[Option<Range<usize>>; COMPONENTS]> = OnceLock::new();
    let known = KNOWN.get_or_init(|| {
        let enabled = enabled_features();
        std::array::from_fn(|bit| ask_range(enabled, bit as u32))
    });
    known[component as usize].clone()
}

/// More than the highest component.
const COMPONENTS: usize = 10;

/// x87 and SSE have fixed places, which this leaf does not tell.
const FIRST: u32 = 2;

fn ask_range(enabled: u64, bit: u32) -> Option<Range<usize>> {
    if bit < FIRST || enabled & (1 << bit) == 0 {
        return None;
    }
    let leaf = cpuid(0xd, bit);
    let (size, offset) = (leaf.0 as usize, leaf.1 as usize);
    (size > 0).then_some(offset..offset + size)
}

/// XCR0 as CPUID reports the features that the kernel may enable.
pub fn enabled_features() -> u64 {
    let leaf = cpuid(0xd, 0);
    u64::from(leaf.0) | u64::from(leaf.2) << 32
}

/// EAX, EBX and EDX of a leaf.
#[allow(unused_unsafe, reason = "the intrinsic became safe in later compilers")]
fn cpuid(leaf: u32, index: u32) -> (u32, u32, u32) {
    // SAFETY: every x86-64 processor has the instruction; unknown leaves answer zeros.
    let result = unsafe { __cpuid_count(leaf, index) };
    (result.eax, result.ebx, result.edx)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ymm_follows_the_header_when_present() {
        match component_range(XsaveComponent::Ymm) {
            Some(range) => assert_eq!((range.start, range.len()), (576, 256)),
            None => println!("skipped: no AVX"),
        }
    }
}
