//! Attaching System V segments.
//!
//! `shmat(2)` maps whole segments only, so a segment of which the program had unmapped a part comes
//! before everything else is mapped, and what is too much of it goes at once.

use std::collections::BTreeMap;
use std::ops::Range;

use floe_inject::{Arg, Program};
use floe_kernel::ids::PAGE_SIZE;

use super::error::PlanError;
use super::region::{Backing, Region};

/// One call of `shmat`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attachment {
    pub id: u64,
    /// Where the whole segment comes to lie.
    pub range: Range<u64>,
    writable: bool,
    executable: bool,
    /// Parts that stay, with their protection, in order.
    parts: Vec<(Range<u64>, u32)>,
}

/// The attachments behind the regions, which are in order; `sizes` are those of segments in bytes.
pub(super) fn plan(
    regions: &[Region],
    sizes: &BTreeMap<u64, u64>,
) -> Result<Vec<Attachment>, PlanError> {
    let mut attachments: Vec<Attachment> = Vec::new();
    for region in regions {
        let Backing::SystemV {
            id,
            offset,
            writable,
        } = region.backing
        else {
            continue;
        };
        let (start, end) = (region.range.start, region.range.end);
        let damaged = || PlanError::Segment { start, id };
        let size = sizes.get(&id).ok_or_else(damaged)?;
        let len = size.checked_next_multiple_of(PAGE_SIZE);
        let base = start.checked_sub(offset).ok_or_else(damaged)?;
        let whole = len.and_then(|len| base.checked_add(len));
        let range = base..whole.ok_or_else(damaged)?;
        if end > range.end {
            return Err(damaged());
        }
        let part = (region.range.clone(), region.prot);
        let executable = region.prot & libc::PROT_EXEC as u32 != 0;
        match attachments.last_mut() {
            Some(last) if (last.id, &last.range) == (id, &range) => {
                last.writable |= writable;
                last.executable |= executable;
                last.parts.push(part);
            }
            _ => attachments.push(Attachment {
                id,
                range,
                writable,
                executable,
                parts: vec![part],
            }),
        }
    }
    Ok(attachments)
}

impl Attachment {
    /// Parts of the segment that the program had unmapped.
    pub fn holes(&self) -> Vec<Range<u64>> {
        let mut holes = Vec::new();
        let mut free_from = self.range.start;
        let end = self.range.end;
        let parts = self.parts.iter().map(|(part, _)| part.clone());
        for part in parts.chain(std::iter::once(end..end)) {
            if part.start > free_from {
                holes.push(free_from..part.start);
            }
            free_from = part.end;
        }
        holes
    }

    /// Adds the calls.
    pub fn map(&self, program: &mut Program) {
        let (id, start) = (self.id, self.range.start);
        let flag = |set, flag: i32| if set { flag } else { 0 };
        let flags = flag(!self.writable, libc::SHM_RDONLY)
            | flag(self.executable, libc::SHM_EXEC)
            | libc::SHM_REMAP;
        let args = [id, start, flags as u64].map(Arg::from);
        let label = format!("shmat of segment {id} at {start:#x}");
        program.call(label, libc::SYS_shmat, &args);
        for hole in self.holes() {
            let label = format!("munmap of a part of segment {id} at {:#x}", hole.start);
            let args = [hole.start, hole.end - hole.start].map(Arg::from);
            program.call(label, libc::SYS_munmap, &args);
        }
        let given = libc::PROT_READ
            | flag(self.writable, libc::PROT_WRITE)
            | flag(self.executable, libc::PROT_EXEC);
        for (part, prot) in &self.parts {
            if *prot != given as u32 {
                let label = format!("mprotect of segment {id} at {:#x}", part.start);
                let args = [part.start, part.end - part.start, u64::from(*prot)].map(Arg::from);
                program.call(label, libc::SYS_mprotect, &args);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use floe_image::messages::VmaEntry;

    fn region(start: u64, pages: u64, pgoff: u64) -> Region {
        let vma = VmaEntry {
            start,
            end: start + pages * PAGE_SIZE,
            pgoff,
            shmid: 5,
            prot: 3,
            status: 1 | 256 | 1024,
            ..VmaEntry::default()
        };
        let region = Region::of(&vma).expect("a possible mapping");
        region.expect("a mapping of the program's")
    }

    #[test]
    fn parts_of_one_attachment_are_attached_together() {
        let regions = [
            region(0x11000, 1, 0x1000),
            region(0x13000, 1, 0x3000),
            region(0x20000, 6, 0),
        ];
        let sizes = BTreeMap::from([(5, 0x5001)]);
        let plan = plan(&regions, &sizes).expect("coherent");
        assert_eq!(plan.len(), 2);
        assert_eq!(plan[0].range, 0x10000..0x16000);
        let holes = [0x10000..0x11000, 0x12000..0x13000, 0x14000..0x16000];
        assert_eq!(plan[0].holes(), holes);
        assert_eq!(plan[1].holes(), []);
    }

    #[test]
    fn a_mapping_beyond_its_segment_is_damage() {
        let sizes = BTreeMap::from([(5, 0x1000)]);
        assert!(plan(&[region(0x10000, 2, 0)], &sizes).is_err());
        assert!(plan(&[region(0x1000, 1, 0x2000)], &sizes).is_err());
        assert!(plan(&[region(0x10000, 1, 0)], &BTreeMap::new()).is_err());
    }
}
