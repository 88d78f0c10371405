//! Layout of the extended processor state that ptrace gives (CPUID leaf 0xD).

use std::arch::x86_64::__cpuid_count;
use std::ops::Range;

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
pub fn component_range(component: XsaveComponent) -> Option<Range<usize>> {
    let bit = component as u32;
    if enabled_features() & (1 << bit) == 0 {
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
