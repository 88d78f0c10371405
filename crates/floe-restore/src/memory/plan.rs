//! The layout of one address space to be, decided before anything is made.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use floe_image::messages::MmEntry;
use floe_inject::TASK_SIZE;
use floe_kernel::ids::{HostPid, PAGE_SIZE, TaskAddr};
use floe_kernel::proc::{Mapping, ProcDir, parse_maps};
use floe_memory::PageIndex;

use super::attach::{self, Attachment};
use super::error::PlanError;
use super::region::{Origin, Region, Source, checked_range, status};
use super::ring::{self, RingPlan};
use super::vdso::{HostVdso, VdsoPlan};

/// Bytes that stay free on both sides of an arena, so that it never touches a mapping.
const ARENA_MARGIN: u64 = 64 * 1024;
/// Where the search for an arena begins: above what 32-bit addresses reach.
const ARENA_FLOOR: u64 = 1 << 32;
/// Where it begins when there is no hole above: `vm.mmap_min_addr` is 64 KiB by default.
const LOWEST: u64 = 64 * 1024;
const HUGE_PAGE: u64 = 2 << 20;

/// What a layout is made from.
#[derive(Clone, Copy)]
pub struct MemoryRequest<'a> {
    /// The address space as the image has it.
    pub mm: &'a MmEntry,
    /// Its content.
    pub pages: &'a Arc<PageIndex>,
    /// The layout of the parent, if the task may be forked when the parent is filled.
    pub parent: Option<&'a MemoryPlan>,
    /// Where the executor lies.
    pub arena: &'a Range<u64>,
    /// The running kernel.
    pub host: &'a HostMemory,
    /// Size in bytes of each System V segment, by its number.
    pub segments: &'a BTreeMap<u64, u64>,
}

/// What the running kernel decides.
#[derive(Clone, Debug)]
pub struct HostMemory {
    /// Our own mappings.
    pub maps: Vec<Mapping>,
    /// Its vDSO.
    pub vdso: HostVdso,
    /// Where it makes huge pages by itself.
    pub huge_pages: HugePages,
}

impl HostMemory {
    /// Reads it from `/proc/self/maps` and `/sys`.
    pub fn probe() -> Result<HostMemory, PlanError> {
        let me = HostPid(std::process::id().cast_signed());
        let proc = ProcDir::open(me).map_err(PlanError::OwnMaps)?;
        let text = proc.read("maps").map_err(PlanError::OwnMaps)?;
        let maps = parse_maps(&text)
            .map_err(|source| proc.bad(source))
            .map_err(PlanError::OwnMaps)?;
        let vdso = HostVdso::of_this_process(&maps).map_err(PlanError::OwnVdso)?;
        // Absent where the kernel has no huge pages.
        let setting = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
        Ok(HostMemory {
            maps,
            vdso,
            huge_pages: HugePages::parse(&setting.unwrap_or_default()),
        })
    }
}

/// The layout of one address space: what is kept of the parent's, mapped, filled and set.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    pub(super) regions: Vec<Region>,
    pub(super) guards: Vec<Range<u64>>,
    pub(super) vdso: Option<VdsoPlan>,
    pub(super) keeps_vdso: bool,
    pub(super) rings: Vec<RingPlan>,
    pub(super) attachments: Vec<Attachment>,
    pub(super) numbers: MmNumbers,
    pub(super) exe_file: u32,
    /// The program file that the parent already is an instance of, when forked from it.
    pub(super) parent_exe: Option<u32>,
    pub(super) thp_disabled: bool,
    pub(super) huge_pages: HugePages,
    pub(super) pages: Arc<PageIndex>,
    pub(super) parent_pages: Option<Arc<PageIndex>>,
    pub(super) arena: Range<u64>,
}

/// `/sys/kernel/mm/transparent_hugepage/enabled`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// Wherever they fit.
    Always,
    /// Where `MADV_HUGEPAGE` asks for them.
    Advised,
    /// Nowhere.
    Never,
}

impl HugePages {
    /// Reads the setting from the text of the file.
    pub fn parse(text: &str) -> HugePages {
        if text.contains("[always]") {
            HugePages::Always
        } else if text.contains("[madvise]") {
            HugePages::Advised
        } else {
            HugePages::Never
        }
    }
}

/// What `PR_SET_MM_MAP` sets, in the order of `struct prctl_mm_map`.
#[derive(Clone, Debug)]
pub(super) struct MmNumbers {
    /// `start_code` to `env_end`.
    pub addresses: [u64; 11],
    pub auxv: Vec<u64>,
}

impl MemoryPlan {
    /// Decides the layout. With a parent, [`MemoryPlan::shares_with_parent`] tells whether forking from
    /// the filled parent is worth it; if not, the layout is that of a task forked before.
    pub fn new(request: MemoryRequest<'_>) -> Result<MemoryPlan, PlanError> {
        let mm = request.mm;
        let mut regions = Vec::with_capacity(mm.vmas.len());
        let mut guards = Vec::new();
        for vma in &mm.vmas {
            if vma.status & status::GUARD != 0 {
                guards.push(checked_range(vma)?);
            } else if let Some(region) = Region::of(vma)? {
                regions.push(region);
            }
        }
        regions.sort_by_key(|region| region.range.start);
        check_disjoint(&regions, request.arena)?;
        let mut plan = MemoryPlan {
            vdso: VdsoPlan::of(mm, request.pages, &request.host.vdso, request.arena)?,
            keeps_vdso: false,
            rings: ring::plan(mm, request.pages)?,
            attachments: attach::plan(&regions, request.segments)?,
            regions,
            guards,
            numbers: MmNumbers::of(mm),
            exe_file: mm.exe_file_id,
            parent_exe: None,
            thp_disabled: mm.thp_disabled(),
            huge_pages: request.host.huge_pages,
            pages: request.pages.clone(),
            parent_pages: None,
            arena: request.arena.clone(),
        };
        plan.check_pages()?;
        if let Some(parent) = request.parent {
            plan.inherit(parent);
        }
        plan.check_attachments()?;
        Ok(plan)
    }

    /// What must be open in the task before it is mapped, beside its program file.
    pub fn sources(&self) -> BTreeSet<Source> {
        self.regions.iter().filter_map(Region::source).collect()
    }

    /// Numbers of the System V segments that must exist before it is mapped.
    pub fn system_v(&self) -> impl Iterator<Item = u64> + '_ {
        self.attachments.iter().map(|attachment| attachment.id)
    }

    /// The program file's id (`/proc/PID/exe`), which must be open for reading.
    pub fn exe_file(&self) -> u32 {
        self.exe_file
    }

    /// Whether the task is to be forked from its filled parent, so that pages which both have are
    /// shared until one writes. Otherwise it must be forked before the parent is mapped.
    pub fn shares_with_parent(&self) -> bool {
        self.parent_pages.is_some()
    }

    /// The part of each anonymous shared segment that this task maps: id and end of it, in bytes, and
    /// the flags of mmap(2) that tell the size of its pages.
    pub(super) fn segment_ends(&self) -> impl Iterator<Item = (u64, u64, i32)> + '_ {
        self.regions.iter().filter_map(|region| {
            let super::region::Backing::Shared {
                source: Source::Segment { id },
                offset,
            } = region.backing
            else {
                return None;
            };
            Some((id, offset.saturating_add(region.len()), region.flags))
        })
    }

    /// The protection with which a region is filled. Nobody can write to read-only huge pages, not even
    /// by force, so those get theirs at the end.
    pub(super) fn first_protection(&self, region: &Region) -> u32 {
        let filled = || self.pages.runs_in(region.range.clone()).next().is_some();
        if region.is_hugetlb() && region.is_private() && filled() {
            region.prot | libc::PROT_WRITE as u32
        } else {
            region.prot
        }
    }

    /// Whether the kernel may give a region huge pages when it is touched.
    pub(super) fn may_get_huge_pages(&self, region: &Region) -> bool {
        let advised = match self.huge_pages {
            HugePages::Always => !region.advised(libc::MADV_NOHUGEPAGE),
            HugePages::Advised => region.advised(libc::MADV_HUGEPAGE),
            HugePages::Never => false,
        };
        let first = region.range.start.next_multiple_of(HUGE_PAGE);
        advised
            && !self.thp_disabled
            && region.is_anonymous()
            && !region.is_hugetlb()
            && first.saturating_add(HUGE_PAGE) <= region.range.end
    }

    /// Whether the program had made a private region read-only after it wrote to it, as the dynamic
    /// linker does. The kernel remembers that by counting the region as memory in use, and keeps it
    /// apart from a neighbour that never was writable.
    pub(super) fn was_writable(&self, region: &Region) -> bool {
        let now = region.prot & (libc::PROT_WRITE | libc::PROT_EXEC) as u32;
        region.is_private()
            && now == 0
            && !region.is_hugetlb()
            && !region.droppable
            && self.pages.runs_in(region.range.clone()).next().is_some()
    }

    /// What of the parent's address space stays, in order.
    pub(super) fn kept(&self) -> Vec<Range<u64>> {
        let mut kept: Vec<Range<u64>> = self
            .regions
            .iter()
            .filter_map(|region| match &region.origin {
                Origin::Inherited { covers, .. } => Some(covers.clone()),
                Origin::New => None,
            })
            .collect();
        if self.keeps_vdso
            && let Some(vdso) = &self.vdso
        {
            kept.extend(vdso.places());
        }
        kept.push(self.arena.clone());
        kept.sort_by_key(|range| range.start);
        kept
    }

    /// Finds regions that continue one of the parent's, if any of them has content in both.
    fn inherit(&mut self, parent: &MemoryPlan) {
        let mut inherited = Vec::new();
        let mut worth_it = false;
        for (index, region) in self.regions.iter().enumerate() {
            let at = parent
                .regions
                .partition_point(|other| other.range.end <= region.range.start);
            let Some(other) = parent.regions.get(at) else {
                continue;
            };
            if !region.continues(other) {
                continue;
            }
            let covers = region.range.start..region.range.end.min(other.range.end);
            if self.guards_in(&covers) != parent.guards_in(&covers) {
                // They are inherited too, and it is simpler to map anew than to remove some.
                continue;
            }
            let has = |pages: &PageIndex| pages.runs_in(covers.clone()).next().is_some();
            worth_it |= has(&self.pages) && has(&parent.pages);
            inherited.push((
                index,
                Origin::Inherited {
                    covers,
                    prot: other.prot,
                },
            ));
        }
        if !worth_it {
            return;
        }
        for (index, origin) in inherited {
            self.regions[index].origin = origin;
        }
        self.keeps_vdso = self.vdso.is_some() && self.vdso == parent.vdso;
        self.parent_exe = Some(parent.exe_file);
        self.parent_pages = Some(parent.pages.clone());
    }

    /// What is kept and what is attached before may not lie where a segment comes to lie as a whole.
    fn check_attachments(&self) -> Result<(), PlanError> {
        let mut taken = self.kept();
        for attachment in &self.attachments {
            let (start, end) = (attachment.range.start, attachment.range.end);
            let overlaps = |other: &Range<u64>| other.start < end && start < other.end;
            if taken.iter().any(overlaps) {
                let id = attachment.id;
                return Err(PlanError::SegmentInTheWay { start, id });
            }
            taken.push(attachment.range.clone());
        }
        Ok(())
    }

    /// The guard regions of a range, cut to it.
    fn guards_in(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let cut = |guard: &Range<u64>| guard.start.max(range.start)..guard.end.min(range.end);
        let guards = self.guards.iter().map(cut);
        guards.filter(|guard| !guard.is_empty()).collect()
    }

    /// Every page of the image must have its place.
    fn check_pages(&self) -> Result<(), PlanError> {
        let mut places: Vec<Range<u64>> = self
            .regions
            .iter()
            .map(|region| region.range.clone())
            .collect();
        places.extend(self.vdso.iter().flat_map(VdsoPlan::places));
        places.sort_by_key(|range| range.start);
        for run in self.pages.runs() {
            let mut covered = run.start;
            let first = places.partition_point(|place| place.end <= run.start);
            for place in &places[first..] {
                if place.start > covered || covered >= run.end() {
                    break;
                }
                covered = place.end;
            }
            if covered < run.end() {
                return Err(PlanError::StrayPages { start: covered });
            }
        }
        Ok(())
    }
}

impl MmNumbers {
    fn of(mm: &MmEntry) -> MmNumbers {
        MmNumbers {
            addresses: [
                mm.mm_start_code,
                mm.mm_end_code,
                mm.mm_start_data,
                mm.mm_end_data,
                mm.mm_start_brk,
                mm.mm_brk,
                mm.mm_start_stack,
                mm.mm_arg_start,
                mm.mm_arg_end,
                mm.mm_env_start,
                mm.mm_env_end,
            ],
            auxv: mm.mm_saved_auxv.clone(),
        }
    }
}

fn check_disjoint(regions: &[Region], arena: &Range<u64>) -> Result<(), PlanError> {
    for pair in regions.windows(2) {
        if pair[0].range.end > pair[1].range.start {
            return Err(PlanError::Overlap {
                first: pair[0].range.start,
                second: pair[1].range.start,
            });
        }
    }
    let overlaps =
        |region: &Region| region.range.start < arena.end && arena.start < region.range.end;
    match regions.iter().find(|region| overlaps(region)) {
        Some(region) => Err(PlanError::ArenaInUse {
            start: region.range.start,
        }),
        None => Ok(()),
    }
}

/// Picks a hole of `bytes` that is free in all address spaces of the tree and in our own.
///
/// `own` are the mappings of this process; it may map more before the hole is used, so that the use can
/// still fail with `EEXIST`.
pub fn choose_arena(mms: &[&MmEntry], own: &[Mapping], bytes: u64) -> Result<u64, PlanError> {
    let wanted = bytes + 2 * ARENA_MARGIN;
    let mut used: Vec<(u64, u64)> = mms
        .iter()
        .flat_map(|mm| &mm.vmas)
        .map(|vma| (vma.start, vma.end))
        .chain(own.iter().map(|mapping| {
            let (TaskAddr(start), TaskAddr(end)) = (mapping.start, mapping.end);
            (start, end)
        }))
        .collect();
    used.sort_unstable();
    find_hole(&used, wanted)
        .map(|hole| (hole + ARENA_MARGIN).next_multiple_of(PAGE_SIZE))
        .ok_or(PlanError::NoHole { bytes })
}

/// A hole of `wanted` bytes beside `used`, which is sorted by start.
pub(super) fn find_hole(used: &[(u64, u64)], wanted: u64) -> Option<u64> {
    [ARENA_FLOOR, LOWEST]
        .into_iter()
        .find_map(|floor| first_hole(used, floor, wanted))
}

/// The lowest hole of `wanted` bytes at or above `floor`; `used` is sorted by start.
fn first_hole(used: &[(u64, u64)], floor: u64, wanted: u64) -> Option<u64> {
    let mut free_from = floor;
    for &(start, end) in used {
        if start.min(TASK_SIZE) >= free_from.saturating_add(wanted) {
            return Some(free_from);
        }
        free_from = free_from.max(end);
    }
    (free_from.saturating_add(wanted) <= TASK_SIZE).then_some(free_from)
}
