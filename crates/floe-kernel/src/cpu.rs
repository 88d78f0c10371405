//! Facts about the CPU: what a checkpoint may depend on.
//!
//! The numbering of words and bits is that of CRIU's `cpuinfo` image, version 2.

/// Words of `capability` in version 2 of the image.
pub const WORDS: usize = 19;
/// Words in version 1.
pub const WORDS_V1: usize = 12;

/// A word of `capability`: the CPUID leaf (L, or X for the extended ones) and register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Word {
    L1Edx = 0,
    X1Edx = 1,
    Linux1 = 3,
    L1Ecx = 4,
    X1Ecx = 6,
    L7Ebx = 9,
    LDs1Eax = 10,
    L7Ecx = 11,
    LFs1Edx = 12,
    X8Ebx = 13,
    L6Eax = 14,
    XAEdx = 15,
    LFs0Edx = 16,
    X7Ebx = 17,
    L7Edx = 18,
}

/// Who made the CPU, as far as the image can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuVendor {
    Intel,
    /// Hygon's as well.
    Amd,
}

/// Why there are no facts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    #[error("CPU vendor `{0}` has no number in the image format")]
    Vendor(String),
    #[error("CPU facts are recorded on x86-64 only")]
    NotX86,
}

/// One CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuFacts {
    pub vendor: CpuVendor,
    pub family: u32,
    pub model: u32,
    pub stepping: u32,
    /// CPUID's registers, by [`Word`].
    pub capability: [u32; WORDS],
    /// The name that the CPU gives itself.
    pub model_id: String,
    /// User state components that the xsave area may hold and that CRIU knows.
    pub xfeatures_mask: u64,
    /// Bytes of the xsave area with the enabled components.
    pub xsave_size: u32,
    /// Bytes with every component that the CPU has.
    pub xsave_size_max: u32,
}

impl CpuFacts {
    /// Asks the CPU.
    pub fn read() -> Result<Self, CpuError> {
        crate::arch::cpu_facts()
    }

    /// Keeps of `mask` what is user state, known to CRIU, and not disabled in the plain CPUID.
    /// More would make CRIU refuse the image on the very CPU that it was made on.
    pub(crate) fn user_xfeatures(mask: u64, capability: &[u32; WORDS]) -> u64 {
        // Component, and the feature that must be there for it.
        const COMPONENTS: [(u32, Word, u32); 9] = [
            (0, Word::L1Edx, 0),  // x87: fpu
            (1, Word::L1Edx, 25), // SSE
            (2, Word::L1Ecx, 28), // AVX
            (3, Word::L7Ebx, 14), // bounds registers: MPX
            (4, Word::L7Ebx, 14), // bounds configuration: MPX
            (5, Word::L7Ebx, 16), // opmask: AVX-512F
            (6, Word::L7Ebx, 16), // upper halves: AVX-512F
            (7, Word::L7Ebx, 16), // upper registers: AVX-512F
            (9, Word::L7Ecx, 3),  // protection keys
        ];
        let present = |word: Word, bit: u32| capability[word as usize] & (1 << bit) != 0;
        let known = COMPONENTS
            .iter()
            .filter(|(_, word, bit)| present(*word, *bit));
        mask & known.fold(0, |known, (component, ..)| known | (1 << component))
    }
}

/// Instructions that a program may use, by the names of /proc/cpuinfo. What only the kernel
/// uses is not here.
pub const INSTRUCTION_FEATURES: &[(Word, u32, &str)] = &[
    (Word::L1Edx, 0, "fpu"),
    (Word::L1Edx, 4, "tsc"),
    (Word::L1Edx, 8, "cx8"),
    (Word::L1Edx, 11, "sep"),
    (Word::L1Edx, 15, "cmov"),
    (Word::L1Edx, 19, "clflush"),
    (Word::L1Edx, 23, "mmx"),
    (Word::L1Edx, 24, "fxsr"),
    (Word::L1Edx, 25, "sse"),
    (Word::L1Edx, 26, "sse2"),
    (Word::X1Edx, 11, "syscall"),
    (Word::X1Edx, 22, "mmxext"),
    (Word::X1Edx, 27, "rdtscp"),
    (Word::X1Edx, 30, "3dnowext"),
    (Word::X1Edx, 31, "3dnow"),
    (Word::L1Ecx, 0, "sse3"),
    (Word::L1Ecx, 1, "pclmulqdq"),
    (Word::L1Ecx, 9, "ssse3"),
    (Word::L1Ecx, 12, "fma"),
    (Word::L1Ecx, 13, "cx16"),
    (Word::L1Ecx, 19, "sse4_1"),
    (Word::L1Ecx, 20, "sse4_2"),
    (Word::L1Ecx, 22, "movbe"),
    (Word::L1Ecx, 23, "popcnt"),
    (Word::L1Ecx, 25, "aes"),
    (Word::L1Ecx, 26, "xsave"),
    (Word::L1Ecx, 27, "osxsave"),
    (Word::L1Ecx, 28, "avx"),
    (Word::L1Ecx, 29, "f16c"),
    (Word::L1Ecx, 30, "rdrand"),
    (Word::X1Ecx, 0, "lahf_lm"),
    (Word::X1Ecx, 5, "abm"),
    (Word::X1Ecx, 6, "sse4a"),
    (Word::X1Ecx, 7, "misalignsse"),
    (Word::X1Ecx, 8, "3dnowprefetch"),
    (Word::X1Ecx, 11, "xop"),
    (Word::X1Ecx, 16, "fma4"),
    (Word::X1Ecx, 21, "tbm"),
    (Word::L7Ebx, 0, "fsgsbase"),
    (Word::L7Ebx, 3, "bmi1"),
    (Word::L7Ebx, 4, "hle"),
    (Word::L7Ebx, 5, "avx2"),
    (Word::L7Ebx, 8, "bmi2"),
    (Word::L7Ebx, 9, "erms"),
    (Word::L7Ebx, 11, "rtm"),
    (Word::L7Ebx, 14, "mpx"),
    (Word::L7Ebx, 16, "avx512f"),
    (Word::L7Ebx, 17, "avx512dq"),
    (Word::L7Ebx, 18, "rdseed"),
    (Word::L7Ebx, 19, "adx"),
    (Word::L7Ebx, 21, "avx512ifma"),
    (Word::L7Ebx, 23, "clflushopt"),
    (Word::L7Ebx, 24, "clwb"),
    (Word::L7Ebx, 26, "avx512pf"),
    (Word::L7Ebx, 27, "avx512er"),
    (Word::L7Ebx, 28, "avx512cd"),
    (Word::L7Ebx, 29, "sha_ni"),
    (Word::L7Ebx, 30, "avx512bw"),
    (Word::L7Ebx, 31, "avx512vl"),
    (Word::LDs1Eax, 0, "xsaveopt"),
    (Word::LDs1Eax, 1, "xsavec"),
    (Word::LDs1Eax, 2, "xgetbv1"),
    (Word::L7Ecx, 1, "avx512vbmi"),
    (Word::L7Ecx, 3, "pku"),
    (Word::L7Ecx, 5, "waitpkg"),
    (Word::L7Ecx, 6, "avx512_vbmi2"),
    (Word::L7Ecx, 8, "gfni"),
    (Word::L7Ecx, 9, "vaes"),
    (Word::L7Ecx, 10, "vpclmulqdq"),
    (Word::L7Ecx, 11, "avx512_vnni"),
    (Word::L7Ecx, 12, "avx512_bitalg"),
    (Word::L7Ecx, 14, "avx512_vpopcntdq"),
    (Word::L7Ecx, 22, "rdpid"),
    (Word::L7Ecx, 27, "movdiri"),
    (Word::L7Ecx, 28, "movdir64b"),
    (Word::X8Ebx, 0, "clzero"),
    (Word::L7Edx, 2, "avx512_4vnniw"),
    (Word::L7Edx, 3, "avx512_4fmaps"),
    (Word::L7Edx, 8, "avx512_vp2intersect"),
    (Word::L7Edx, 14, "serialize"),
    (Word::L7Edx, 22, "amx_bf16"),
    (Word::L7Edx, 23, "avx512_fp16"),
    (Word::L7Edx, 24, "amx_tile"),
    (Word::L7Edx, 25, "amx_int8"),
];

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;

    /// The kernel hides some features on purpose, but shows none that are not there.
    #[test]
    fn names_agree_with_proc_cpuinfo() {
        let facts = CpuFacts::read().expect("a CPU of a known vendor");
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").expect("/proc is mounted");
        let flags = cpuinfo
            .lines()
            .find(|line| line.starts_with("flags"))
            .expect("x86 has flags");
        let flags: Vec<&str> = flags.split_whitespace().collect();
        for (word, bit, name) in INSTRUCTION_FEATURES {
            let shown = if *name == "sse3" { "pni" } else { name };
            if flags.contains(&shown) {
                assert!(facts.capability[*word as usize] & (1 << bit) != 0, "{name}");
            }
        }
        assert!(
            cpuinfo.contains(facts.model_id.trim_end()),
            "{}",
            facts.model_id
        );
        assert!(facts.xfeatures_mask & 3 == 3 && facts.xsave_size >= 576);
    }
}
