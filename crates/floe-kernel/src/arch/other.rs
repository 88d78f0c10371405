//! Architectures on which no CPU facts are recorded.

use crate::cpu::{CpuError, CpuFacts};

/// Says that there are none here.
pub(crate) fn cpu_facts() -> Result<CpuFacts, CpuError> {
    Err(CpuError::NotX86)
}
