//! Address spaces rebuilt in puppets, held against what the images say.

mod puppets;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use floe_image::messages::VmaEntry;
use floe_inject::Arg;
use floe_kernel::ids::TaskFd;
use floe_restore::memory::{FillOptions, Source};
use puppets::{Layout, PAGE, anonymous, pattern};

const BASE: u64 = 0x7000_0000_0000;
const RW: u32 = (libc::PROT_READ | libc::PROT_WRITE) as u32;
const R: u32 = libc::PROT_READ as u32;
const NONE: u32 = libc::PROT_NONE as u32;

fn with_userfaultfd() -> FillOptions {
    FillOptions {
        workers: 2,
        userfaultfd: true,
        parents: Arc::default(),
        in_order: false,
    }
}

fn without_userfaultfd() -> FillOptions {
    FillOptions {
        userfaultfd: false,
        ..with_userfaultfd()
    }
}

/// Anonymous memory of every protection, large enough for userfaultfd.
fn all_protections() -> Layout {
    let mut layout = Layout::new();
    let mut start = BASE;
    for prot in [RW, R, NONE, R | libc::PROT_EXEC as u32] {
        for pages in [2, 300] {
            layout.vma(anonymous(start, pages, prot));
            layout.pages(start + PAGE, 1);
            if pages > 2 {
                layout.pages(start + 20 * PAGE, 200);
            }
            start += (pages + 1) * PAGE;
        }
    }
    layout
}

#[test]
fn memory_of_every_protection_gets_its_content() {
    for options in [with_userfaultfd(), without_userfaultfd()] {
        let mut layout = all_protections();
        let mut stack = anonymous(0x7ffc_0000_0000, 33, RW);
        stack.flags |= libc::MAP_GROWSDOWN as u32;
        layout.vma(stack);
        layout.pages(0x7ffc_0000_0000 + 30 * PAGE, 3);
        let puppet = layout.restore(&options);
        puppet.check_maps();
        puppet.check_content();
    }
}

#[test]
fn a_private_file_mapping_keeps_its_copied_pages() {
    let file = tempfile::tempfile().unwrap();
    rustix::io::pwrite(&file, &vec![7; 8 * PAGE as usize], 0).unwrap();
    let mut layout = Layout::new();
    let source = Source::File { id: 9, flags: 0 };
    layout.open(source, TaskFd(file.as_raw_fd()));
    for (index, prot) in [RW, R].into_iter().enumerate() {
        let start = BASE + index as u64 * 16 * PAGE;
        layout.vma(VmaEntry {
            pgoff: PAGE,
            shmid: 9,
            flags: libc::MAP_PRIVATE as u32,
            status: 1 | 64,
            fdflags: Some(0),
            ..anonymous(start, 4, prot)
        });
        layout.pages(start + 2 * PAGE, 1);
    }
    let puppet = layout.restore(&with_userfaultfd());
    puppet.check_content();
    assert_eq!(puppet.read(BASE + PAGE, 16), [7; 16], "the file's page");
    let maps = puppet.maps();
    assert_eq!(maps[0].offset, PAGE);
    assert_eq!(maps.len(), 2);
}

#[test]
fn relocated_data_stays_apart_from_its_read_only_neighbour() {
    let file = tempfile::tempfile().unwrap();
    rustix::io::pwrite(&file, &vec![7; 8 * PAGE as usize], 0).unwrap();
    let mut layout = Layout::new();
    let source = Source::File { id: 9, flags: 0 };
    layout.open(source, TaskFd(file.as_raw_fd()));
    for part in 0..2 {
        layout.vma(VmaEntry {
            pgoff: part * 4 * PAGE,
            shmid: 9,
            flags: libc::MAP_PRIVATE as u32,
            status: 1 | 64,
            fdflags: Some(0),
            ..anonymous(BASE + part * 4 * PAGE, 4, R)
        });
    }
    layout.pages(BASE + 5 * PAGE, 1);
    let puppet = layout.restore(&with_userfaultfd());
    puppet.check_maps();
    puppet.check_content();
}

#[test]
fn advice_locks_and_guards_are_set() {
    let mut layout = Layout::new();
    let mut advised = anonymous(BASE, 4, RW);
    advised.madv = Some(1 << libc::MADV_DONTDUMP | 1 << libc::MADV_DONTFORK);
    layout.vma(advised);
    layout.pages(BASE, 1);
    let mut locked = anonymous(BASE + 8 * PAGE, 4, RW);
    locked.flags |= libc::MAP_LOCKED as u32;
    layout.vma(locked);
    layout.vma(anonymous(BASE + 16 * PAGE, 4, RW));
    layout.vma(VmaEntry {
        start: BASE + 17 * PAGE,
        end: BASE + 18 * PAGE,
        status: 65536,
        ..VmaEntry::default()
    });
    let puppet = layout.restore(&with_userfaultfd());
    puppet.check_content();
    let smaps = puppet.smaps();
    assert!(smaps[0].flags.dont_dump && smaps[0].flags.dont_fork && !smaps[0].flags.locked);
    assert!(smaps[1].flags.locked);
    assert!(puppet.try_read(BASE + 17 * PAGE, 1).is_err(), "a guard");
    assert!(puppet.try_read(BASE + 16 * PAGE, 1).is_ok());
}

#[test]
fn a_huge_page_is_filled_whole_and_a_sparse_one_stays_sparse() {
    const HUGE: u64 = 2 << 20;
    let thp = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    if thp.is_ok_and(|text| text.contains("[never]")) {
        println!("skipped: no huge pages");
        return;
    }
    let mut layout = Layout::new();
    let mut vma = anonymous(BASE, 3 * 512, RW);
    vma.madv = Some(1 << libc::MADV_HUGEPAGE);
    layout.vma(vma);
    layout.pages(BASE, 512);
    layout.pages(BASE + HUGE + 5 * PAGE, 1);
    let puppet = layout.restore(&with_userfaultfd());
    puppet.check_content();
    puppet.check_maps();
    let text = puppet.proc_text("smaps");
    assert!(text.contains("Rss:                2052 kB"), "{text}");
    assert!(text.contains("AnonHugePages:      2048 kB"), "{text}");
}

#[test]
fn shared_memory_is_shared_and_named_as_before() {
    let mut layout = Layout::new();
    for start in [BASE, BASE + 32 * PAGE] {
        layout.vma(VmaEntry {
            shmid: 77,
            flags: (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u32,
            status: 1 | 256,
            ..anonymous(start, 16, RW)
        });
    }
    layout.segment_pages(77, 3 * PAGE, 2);
    let puppet = layout.restore(&with_userfaultfd());
    for start in [BASE, BASE + 32 * PAGE] {
        assert_eq!(puppet.read(start + 3 * PAGE, 4096), pattern(3 * PAGE));
        assert_eq!(puppet.read(start, 8), [0; 8]);
    }
    let maps = puppet.maps();
    assert!(
        maps.iter()
            .all(|map| map.name == b"/dev/zero (deleted)" && map.shared)
    );
}

#[test]
fn a_child_shares_what_its_parent_has() {
    let mut parent = Layout::new();
    parent.vma(anonymous(BASE, 600, RW));
    parent.pages(BASE, 500);
    let mut parent = parent.restore(&with_userfaultfd());
    let mut child = Layout::new();
    // Longer than the parent's, with a part of another protection.
    child.vma(anonymous(BASE, 100, R));
    child.vma(anonymous(BASE + 100 * PAGE, 600, RW));
    child.pages(BASE, 300);
    child.changed_page(BASE + 7 * PAGE);
    let child = parent.fork(child, &with_userfaultfd());
    child.check_content();
    child.check_maps();
    assert_eq!(child.stats.shared, 299);
    assert_eq!(child.stats.restored, 1);
    let dropped = child.read(BASE + 400 * PAGE, 8);
    assert_eq!(dropped, [0; 8], "the child had dropped it");
    parent.check_content();
}

#[test]
fn a_child_has_none_of_its_parents_guards() {
    let mut parent = Layout::new();
    parent.vma(anonymous(BASE, 8, RW));
    parent.vma(anonymous(BASE + 16 * PAGE, 8, RW));
    parent.pages(BASE, 1);
    parent.pages(BASE + 16 * PAGE, 2);
    parent.vma(VmaEntry {
        start: BASE + 4 * PAGE,
        end: BASE + 5 * PAGE,
        status: 65536,
        ..VmaEntry::default()
    });
    let mut parent = parent.restore(&with_userfaultfd());
    assert!(parent.try_read(BASE + 4 * PAGE, 1).is_err());
    let mut child = Layout::new();
    child.vma(anonymous(BASE, 8, RW));
    child.vma(anonymous(BASE + 16 * PAGE, 8, RW));
    child.pages(BASE, 1);
    child.pages(BASE + 16 * PAGE, 2);
    let child = parent.fork(child, &with_userfaultfd());
    child.check_content();
    assert!(child.try_read(BASE + 4 * PAGE, 1).is_ok());
    assert_eq!(child.stats.shared, 2);
}

#[test]
fn the_numbers_of_an_address_space_are_set() {
    let mut layout = Layout::new();
    layout.vma(anonymous(BASE, 4, RW));
    layout.mm.mm_start_brk = BASE;
    layout.mm.mm_brk = BASE + 4 * PAGE;
    layout.mm.mm_arg_start = BASE;
    layout.mm.mm_arg_end = BASE + 3;
    layout.mm.mm_env_start = BASE + 3;
    layout.mm.mm_env_end = BASE + 3;
    // More words than any kernel keeps.
    layout.mm.mm_saved_auxv = [6, 4096].into_iter().chain([0; 100]).collect();
    layout.pages(BASE, 1);
    let mut puppet = layout.restore(&with_userfaultfd());
    assert_eq!(puppet.maps()[0].name, b"[heap]");
    assert_eq!(puppet.proc_text("cmdline").len(), 3);
    let brk = puppet.call(libc::SYS_brk, &[Arg::from(0)]);
    assert_eq!(brk as u64, BASE + 4 * PAGE);
    let exe = std::fs::read_link(format!("/proc/{}/exe", puppet.pid())).unwrap();
    assert_eq!(exe, std::env::current_exe().unwrap());
}

#[test]
fn the_vdso_lands_where_the_image_has_it() {
    let mut layout = Layout::new();
    layout.vdso(BASE);
    layout.vma(anonymous(BASE + 100 * PAGE, 1, RW));
    let puppet = layout.restore(&with_userfaultfd());
    let maps = puppet.maps();
    assert_eq!(maps[0].start.0, BASE);
    assert!(maps.iter().any(|map| map.name == b"[vdso]"), "{maps:?}");
}

#[test]
fn the_vdso_of_another_kernel_jumps_to_the_running_one() {
    let mut layout = Layout::new();
    let code = layout.other_vdso(BASE);
    layout.vma(anonymous(BASE + 100 * PAGE, 4, RW));
    let mut puppet = layout.restore(&with_userfaultfd());
    let maps = puppet.maps();
    let current = maps.iter().find(|map| map.name == b"[vdso]").unwrap();
    assert_ne!(current.start.0, code);
    let old = maps.iter().find(|map| map.start.0 == code).unwrap();
    assert!(old.exec && !old.write && old.name.is_empty());
    // Programs call the functions of the old place, which they found by name.
    let time = puppets::vdso_function(&puppet.read(code, old.byte_len() as usize), b"__vdso_time");
    let seconds = puppet.call_function(code + time, BASE + 104 * PAGE);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(seconds.abs_diff(now) < 10, "{seconds} is not {now}");
}

#[test]
fn impossible_mappings_are_refused() {
    let ring = |start: u64, end: u64| VmaEntry {
        start,
        end,
        status: 1 | 8192,
        ..VmaEntry::default()
    };
    for (what, vma) in [
        ("reversed", ring(2 * PAGE, PAGE)),
        ("not aligned", anonymous(BASE + 1, 1, RW)),
        ("beyond the address space", ring(u64::MAX - 4095, u64::MAX)),
        ("a ring without a head", ring(BASE, BASE + PAGE)),
        (
            "a reversed guard",
            VmaEntry {
                status: 65536,
                ..ring(2 * PAGE, PAGE)
            },
        ),
        (
            "a reversed vDSO",
            VmaEntry {
                status: 1 | 8,
                ..ring(2 * PAGE, PAGE)
            },
        ),
        (
            "a huge vDSO",
            VmaEntry {
                status: 1 | 8,
                ..ring(PAGE, 1 << 40)
            },
        ),
        (
            "of no kind",
            VmaEntry {
                status: 1,
                ..anonymous(BASE, 1, RW)
            },
        ),
        (
            "shared memory of System V",
            VmaEntry {
                status: 1 | 1024,
                ..anonymous(BASE, 1, RW)
            },
        ),
    ] {
        let mut layout = Layout::new();
        layout.vma(vma);
        assert!(layout.try_plan().is_err(), "{what}");
    }
    let mut stray = Layout::new();
    stray.vma(anonymous(BASE, 2, RW));
    stray.pages(BASE + PAGE, 2);
    assert!(stray.try_plan().is_err(), "a page outside of all mappings");
    let mut overlap = Layout::new();
    overlap.vma(anonymous(BASE, 2, RW));
    overlap.vma(anonymous(BASE + PAGE, 2, RW));
    assert!(overlap.try_plan().is_err(), "overlapping mappings");
}
