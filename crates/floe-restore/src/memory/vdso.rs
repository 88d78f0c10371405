//! The kernel's own code in a task: the vDSO and the data pages that it reads.
//!
//! Saved:    place and size of the vDSO and its data mappings; CRIU also saves the code.
//! Rebuilt:  mapped by `arch_prctl(ARCH_MAP_VDSO_64)` where it was. Needs: the same vDSO, since the
//!           program has pointers into it.
//! Not kept: the data pages, which are the running kernel's.

use std::ops::Range;

use floe_image::messages::MmEntry;
use floe_inject::read_memory;
use floe_kernel::ids::{HostPid, TaskAddr};
use floe_kernel::proc::Mapping;
use floe_memory::PageIndex;

use super::error::PlanError;
use super::region::status;

/// The vDSO of the running kernel, as this process has it.
#[derive(Clone, Debug, Default)]
pub struct HostVdso {
    /// Bytes of data mappings before the code.
    data_len: u64,
    /// The code's bytes; empty when this process has none.
    code: Vec<u8>,
}

/// Where the vDSO of a task goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct VdsoPlan {
    /// Data and code, which the kernel maps together.
    pub range: Range<u64>,
    /// What the image has of it; the program may have unmapped the rest.
    pub wanted: Vec<Range<u64>>,
}

impl HostVdso {
    /// Reads it from our own address space, whose mappings are `own`.
    pub fn of_this_process(own: &[Mapping]) -> std::io::Result<HostVdso> {
        let named = |mapping: &&Mapping| {
            mapping.name.starts_with(b"[vvar") || mapping.name.as_slice() == b"[vdso]"
        };
        let pieces: Vec<&Mapping> = own.iter().filter(named).collect();
        let Some(code) = pieces.iter().find(|piece| piece.name == b"[vdso]") else {
            return Ok(HostVdso::default());
        };
        let TaskAddr(code_start) = code.start;
        let first = pieces.iter().map(|piece| piece.start.0).min();
        let mut bytes = vec![0; code.byte_len() as usize];
        let me = HostPid(std::process::id().cast_signed());
        read_memory(me, code_start, &mut bytes)?;
        Ok(HostVdso {
            data_len: code_start - first.unwrap_or(code_start),
            code: bytes,
        })
    }
}

impl VdsoPlan {
    /// The place of the vDSO in the image; `None` when the task had none.
    pub fn of(
        mm: &MmEntry,
        pages: &PageIndex,
        host: &HostVdso,
    ) -> Result<Option<VdsoPlan>, PlanError> {
        let pieces = |bit: u32| {
            mm.vmas
                .iter()
                .filter(move |vma| vma.status & bit != 0)
                .map(|vma| vma.start..vma.end)
        };
        let Some(code) = pieces(status::VDSO).next() else {
            return Ok(None);
        };
        let data: Vec<Range<u64>> = pieces(status::VVAR).collect();
        let data_start = data.iter().map(|piece| piece.start).min();
        let data_len = data_start.map_or(host.data_len, |start| code.start.wrapping_sub(start));
        let foreign = |problem: String| PlanError::ForeignVdso { problem };
        let code_len = code.end - code.start;
        if code_len != host.code.len() as u64 {
            return Err(foreign(format!(
                "its code has {code_len} bytes, here {}",
                host.code.len()
            )));
        }
        if data_len != host.data_len {
            return Err(foreign(format!(
                "its data has {data_len} bytes, here {}",
                host.data_len
            )));
        }
        if !same_code(&code, pages, host) {
            return Err(foreign("its code differs".into()));
        }
        let wanted = data.into_iter().chain([code.clone()]).collect();
        Ok(Some(VdsoPlan {
            range: code.start - data_len..code.end,
            wanted,
        }))
    }
}

/// Whether the image's vDSO, as far as it is saved, is that of the running kernel.
fn same_code(code: &Range<u64>, pages: &PageIndex, host: &HostVdso) -> bool {
    pages.runs_in(code.clone()).all(|run| {
        let mut saved = vec![0; run.len as usize];
        let read = pages
            .open(run.file)
            .is_ok_and(|file| file.read_exact_at(&mut saved, run.offset).is_ok());
        let at = (run.start - code.start) as usize;
        read && saved == host.code[at..at + saved.len()]
    })
}
