//! The kernel's own code in a task: the vDSO and the data pages that it reads.
//!
//! Saved:    place and size of the vDSO and its data mappings; CRIU also saves the code.
//! Rebuilt:  mapped by `arch_prctl(ARCH_MAP_VDSO_64)` where it was. If it was another kernel's, its
//!           saved code stays where it was, with jumps to the running one's, which is put into a hole.
//!           Needs: in that case, the code in the image.
//! Not kept: the data pages, which are the running kernel's.

use std::ops::Range;

use floe_image::messages::MmEntry;
use floe_kernel::ids::{HostPid, TaskAddr};
use floe_kernel::proc::Mapping;
use floe_kernel::vm;
use floe_memory::PageIndex;

use super::error::PlanError;
use super::plan::find_hole;
use super::redirect::redirected;
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
    /// Data and code of the running kernel, which it maps together.
    pub range: Range<u64>,
    /// What the image has of that; the program may have unmapped the rest.
    pub wanted: Vec<Range<u64>>,
    /// What the image has of another kernel's.
    pub old: Option<OldVdso>,
}

/// The vDSO of the kernel of the dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OldVdso {
    /// Where its code lies.
    pub code: Range<u64>,
    /// Where its data lies.
    pub data: Vec<Range<u64>>,
    /// The code, with jumps to the running kernel's.
    pub bytes: Vec<u8>,
}

/// Why a vDSO is not the running kernel's.
struct Differs(String);

impl HostVdso {
    /// Its code.
    #[cfg(test)]
    pub(super) fn code(&self) -> &[u8] {
        &self.code
    }

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
        vm::read_exact(me, TaskAddr(code_start), &mut bytes)?;
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
        arena: &Range<u64>,
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
        match compare((&code, data_len), pages, host) {
            Ok(()) => Ok(Some(VdsoPlan {
                range: code.start - data_len..code.end,
                wanted: data.into_iter().chain([code]).collect(),
                old: None,
            })),
            Err(Differs(problem)) => {
                let old = (code, data);
                VdsoPlan::redirected((mm, pages), old, host, arena)
                    .map(Some)
                    .map_err(|why| PlanError::ForeignVdso {
                        problem: format!("{problem}, and {why}"),
                    })
            }
        }
    }

    fn redirected(
        (mm, pages): (&MmEntry, &PageIndex),
        (code, data): (Range<u64>, Vec<Range<u64>>),
        host: &HostVdso,
        arena: &Range<u64>,
    ) -> Result<VdsoPlan, &'static str> {
        let saved = saved_code(&code, pages).ok_or("its code is not in the image")?;
        let len = host.data_len + host.code.len() as u64;
        let mut used: Vec<(u64, u64)> = mm.vmas.iter().map(|vma| (vma.start, vma.end)).collect();
        used.push((arena.start, arena.end));
        used.sort_unstable();
        let hole = find_hole(&used, len).ok_or("there is no hole for the running kernel's")?;
        let bytes = redirected(&saved, &host.code, hole + host.data_len)?;
        let range = hole..hole + len;
        Ok(VdsoPlan {
            wanted: vec![range.clone()],
            range,
            old: Some(OldVdso { code, data, bytes }),
        })
    }

    /// Everything that it takes in the address space.
    pub fn places(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let old = self.old.iter();
        let old = old.flat_map(|old| old.data.iter().chain([&old.code]).cloned());
        std::iter::once(self.range.clone()).chain(old)
    }
}

fn compare(
    (code, data_len): (&Range<u64>, u64),
    pages: &PageIndex,
    host: &HostVdso,
) -> Result<(), Differs> {
    let code_len = code.end - code.start;
    if code_len != host.code.len() as u64 {
        let here = host.code.len();
        return Err(Differs(format!(
            "its code has {code_len} bytes, here {here}"
        )));
    }
    if data_len != host.data_len {
        let here = host.data_len;
        return Err(Differs(format!(
            "its data has {data_len} bytes, here {here}"
        )));
    }
    if !same_code(code, pages, host) {
        return Err(Differs("its code differs".into()));
    }
    Ok(())
}

/// All of the image's code; `None` when a page of it is missing.
fn saved_code(code: &Range<u64>, pages: &PageIndex) -> Option<Vec<u8>> {
    /// More than any kernel's, in bytes.
    const LIMIT: u64 = 1 << 20;
    if code.end - code.start > LIMIT {
        return None;
    }
    let mut bytes = Vec::new();
    for run in pages.runs_in(code.clone()) {
        if run.start != code.start + bytes.len() as u64 {
            return None;
        }
        let at = bytes.len();
        bytes.resize(at + run.len as usize, 0);
        let file = pages.open(run.file).ok()?;
        file.read_exact_at(&mut bytes[at..], run.offset).ok()?;
    }
    (bytes.len() as u64 == code.end - code.start).then_some(bytes)
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
