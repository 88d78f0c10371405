//! Protection, `mmap` flags and `madvise` settings as the images have them.

use floe_kernel::proc::{Mapping, VmFlags};

use super::backing::Backing;

/// `PROT_*`.
pub(super) fn protection(mapping: &Mapping) -> u32 {
    let bit = |set: bool, value: i32| if set { value.cast_unsigned() } else { 0 };
    bit(mapping.read, libc::PROT_READ)
        | bit(mapping.write, libc::PROT_WRITE)
        | bit(mapping.exec, libc::PROT_EXEC)
}

/// `MAP_*`.
pub(super) fn map_flags(mapping: &Mapping, backing: &Backing) -> u32 {
    const MAP_DROPPABLE: i32 = 8;
    let flags = &mapping.flags;
    let kind = if mapping.shared {
        libc::MAP_SHARED
    } else if flags.droppable {
        // Its own type, beside private and shared.
        MAP_DROPPABLE
    } else {
        libc::MAP_PRIVATE
    };
    let bits = [
        (!backing.is_file(), libc::MAP_ANONYMOUS),
        (flags.grows_down, libc::MAP_GROWSDOWN),
        (flags.locked, libc::MAP_LOCKED),
        (flags.no_reserve, libc::MAP_NORESERVE),
        (flags.hugetlb, libc::MAP_HUGETLB),
    ];
    let set = bits
        .into_iter()
        .filter(|(set, _)| *set)
        .fold(kind, |all, (_, bit)| all | bit);
    set.cast_unsigned() | backing.huge_size
}

/// One bit for each `MADV_*` in force.
pub(super) fn advice(flags: &VmFlags) -> Option<u64> {
    let bits = [
        (flags.sequential, libc::MADV_SEQUENTIAL),
        (flags.random, libc::MADV_RANDOM),
        (flags.dont_fork, libc::MADV_DONTFORK),
        (flags.dont_dump, libc::MADV_DONTDUMP),
        (flags.mergeable, libc::MADV_MERGEABLE),
        (flags.huge_page, libc::MADV_HUGEPAGE),
        (flags.no_huge_page, libc::MADV_NOHUGEPAGE),
        (flags.wipe_on_fork, libc::MADV_WIPEONFORK),
    ];
    let all = bits
        .into_iter()
        .filter(|(set, _)| *set)
        .fold(0, |all, (_, bit)| all | 1u64 << bit);
    (all != 0).then_some(all)
}
