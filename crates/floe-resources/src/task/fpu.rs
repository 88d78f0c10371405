//! Extended processor state of a thread: x87, SSE, AVX, AVX-512, protection keys.
//!
//! Saved:    the xsave area, component by component.
//! Rebuilt:  put into an area of this CPU's layout, which ptrace sets. Needs: nothing.
//! Not kept: components of a CPU that this one lacks, while they hold nothing; others are refused.

use floe_image::messages::{UserX86FpregsEntry, UserX86XsaveEntry};
use floe_kernel::xsave::{XsaveComponent, component_range};

use super::rebuild::TaskContext;
use super::word;
use crate::restore::PlanError;

/// Offset of the header, which begins with the mask of components in use.
const HEADER: usize = 512;
/// Offset of the first component after the header.
const EXTENDED: usize = 576;
/// x87 and SSE, which have fixed places in front of the header.
const LEGACY: u64 = 0b11;
/// Tile configuration and data, for which CRIU's format has no field.
const AMX: u64 = 0b11 << 17;
/// Components that have a field in the images.
const NAMED: [(XsaveComponent, &str); 7] = [
    (XsaveComponent::Ymm, "AVX"),
    (XsaveComponent::BndRegs, "MPX bounds"),
    (XsaveComponent::BndCsr, "MPX configuration"),
    (XsaveComponent::Opmask, "AVX-512 masks"),
    (XsaveComponent::ZmmHi256, "AVX-512 upper halves"),
    (XsaveComponent::Hi16Zmm, "AVX-512 upper registers"),
    (XsaveComponent::Pkru, "protection keys"),
];

/// Whether the area holds tiles (AMX), for which the images have no place.
pub fn holds_tiles(area: &[u8]) -> bool {
    word(area, HEADER) & AMX != 0
}

/// The state in the words of the images, from what [`floe_kernel::ptrace::xstate`] gave.
pub fn to_image(area: &[u8]) -> UserX86FpregsEntry {
    let half = |at: usize| u32::from(u16::from_ne_bytes([area[at], area[at + 1]]));
    let single = |at: usize| u32::from_ne_bytes(area[at..at + 4].try_into().expect("four bytes"));
    UserX86FpregsEntry {
        cwd: half(0),
        swd: half(2),
        twd: half(4),
        fop: half(6),
        rip: word(area, 8),
        rdp: word(area, 16),
        mxcsr: single(24),
        mxcsr_mask: single(28),
        st_space: singles(&area[32..160]),
        xmm_space: singles(&area[160..416]),
        padding: Vec::new(),
        xsave: Some(extended_state(area)),
    }
}

/// The components as CRIU names them; those that this CPU lacks stay empty.
fn extended_state(area: &[u8]) -> UserX86XsaveEntry {
    let component = |which| {
        component_range(which)
            .and_then(|range| area.get(range))
            .unwrap_or(&[])
    };
    UserX86XsaveEntry {
        xstate_bv: word(area, HEADER),
        ymmh_space: singles(component(XsaveComponent::Ymm)),
        bndreg_state: words(component(XsaveComponent::BndRegs)),
        bndcsr_state: words(component(XsaveComponent::BndCsr)),
        opmask_reg: words(component(XsaveComponent::Opmask)),
        zmm_upper: words(component(XsaveComponent::ZmmHi256)),
        hi16_zmm: words(component(XsaveComponent::Hi16Zmm)),
        pkru: singles(component(XsaveComponent::Pkru)),
        cet: None,
    }
}

fn singles(bytes: &[u8]) -> Vec<u32> {
    bytes
        .chunks_exact(4)
        .map(|part| u32::from_ne_bytes(part.try_into().expect("four bytes")))
        .collect()
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|part| word(part, 0)).collect()
}

/// Puts the state into `area`, which holds what [`floe_kernel::ptrace::xstate`] gave for any thread on
/// this machine, for [`floe_kernel::ptrace::set_xstate`].
pub fn from_image(
    entry: &UserX86FpregsEntry,
    area: &mut [u8],
    context: &TaskContext<'_>,
) -> Result<(), PlanError> {
    if area.len() < EXTENDED {
        return Err(PlanError::Missing {
            object: format!("the FPU state of thread {}", context.tid),
            feature: "XSAVE".to_string(),
        });
    }
    put_legacy(entry, area, context)?;
    area[HEADER..].fill(0);
    let mut used = LEGACY;
    if let Some(xsave) = &entry.xsave {
        used |= put_components(xsave, area, context)?;
    }
    area[HEADER..HEADER + 8].copy_from_slice(&used.to_le_bytes());
    Ok(())
}

fn put_legacy(
    entry: &UserX86FpregsEntry,
    area: &mut [u8],
    context: &TaskContext<'_>,
) -> Result<(), PlanError> {
    let mut put = |at: usize, bytes: &[u8]| area[at..at + bytes.len()].copy_from_slice(bytes);
    // 16-bit registers that the images hold in 32 bits.
    for (at, word) in [
        (0, entry.cwd),
        (2, entry.swd),
        (4, entry.twd),
        (6, entry.fop),
    ] {
        put(at, &(word as u16).to_le_bytes());
    }
    put(8, &entry.rip.to_le_bytes());
    put(16, &entry.rdp.to_le_bytes());
    put(24, &entry.mxcsr.to_le_bytes());
    if (entry.st_space.len(), entry.xmm_space.len()) != (32, 64) {
        return Err(context.damaged("its FPU registers are incomplete"));
    }
    put(32, &bytes32(&entry.st_space));
    put(160, &bytes32(&entry.xmm_space));
    let mask = u32::from_le_bytes(area[28..32].try_into().expect("four bytes"));
    if mask != 0 && entry.mxcsr & !mask != 0 {
        return Err(PlanError::Missing {
            object: format!("the FPU state of thread {}", context.tid),
            feature: format!("MXCSR bits {:#x}", entry.mxcsr & !mask),
        });
    }
    Ok(())
}

/// Puts the components after the header and answers the mask of those in use.
fn put_components(
    xsave: &UserX86XsaveEntry,
    area: &mut [u8],
    context: &TaskContext<'_>,
) -> Result<u64, PlanError> {
    if xsave.cet.as_ref().is_some_and(|cet| cet.cet != 0) {
        let remedy = "run the program without them (GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)";
        return Err(context.unsupported("the shadow stack", remedy));
    }
    if xsave.xstate_bv & AMX != 0 {
        let remedy = "the image has no place for them; let the program release them (TILERELEASE)";
        return Err(context.unsupported("the AMX tiles", remedy));
    }
    let (mut used, mut lacking) = (0, Vec::new());
    for (component, name) in NAMED {
        let bit = 1u64 << component as u32;
        let data = component_data(xsave, component);
        // Images of kernels that knew less announce components that they do not hold.
        if xsave.xstate_bv & bit == 0 || data.is_empty() {
            continue;
        }
        match component_range(component).filter(|range| range.end <= area.len()) {
            Some(range) if range.len() == data.len() => {
                area[range].copy_from_slice(&data);
                used |= bit;
            }
            Some(range) => {
                let (got, want) = (data.len(), range.len());
                return Err(context.damaged(format!("{name} has {got} bytes, not {want}")));
            }
            None if data.iter().all(|byte| *byte == 0) => {}
            None => lacking.push(name),
        }
    }
    if lacking.is_empty() {
        return Ok(used);
    }
    Err(PlanError::Missing {
        object: format!("thread {}", context.tid),
        feature: format!("the CPU state of {}", lacking.join(", ")),
    })
}

fn component_data(xsave: &UserX86XsaveEntry, component: XsaveComponent) -> Vec<u8> {
    match component {
        XsaveComponent::Ymm => bytes32(&xsave.ymmh_space),
        XsaveComponent::BndRegs => bytes64(&xsave.bndreg_state),
        XsaveComponent::BndCsr => bytes64(&xsave.bndcsr_state),
        XsaveComponent::Opmask => bytes64(&xsave.opmask_reg),
        XsaveComponent::ZmmHi256 => bytes64(&xsave.zmm_upper),
        XsaveComponent::Hi16Zmm => bytes64(&xsave.hi16_zmm),
        XsaveComponent::Pkru => bytes32(&xsave.pkru),
    }
}

fn bytes32(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn bytes64(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
