//! Times the restore of one address space: `memory_fill [MiB] [workers] [plain|huge|spread] [uffd|write]`.
//!
//! `plain` is one mapping with all pages, `huge` the same with `MADV_HUGEPAGE`, `spread` has every
//! fourth page only. Images are made in `/dev/shm`; three runs, since the first one touches memory that
//! the machine may have to find first.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use floe_image::messages::{MmEntry, PagemapEntry, PagemapHead, VmaEntry};
use floe_image::{ImageDir, ImageKind, ImageWriter, Sync};
use floe_inject::{ARENA_BYTES, RootSpawn, spawn_root};
use floe_kernel::ids::TaskFd;
use floe_memory::PageIndex;
use floe_restore::memory::{
    FillOptions, HostMemory, MemoryPlan, MemoryRequest, Puppet, choose_arena, fill, finish, map,
};

const BASE: u64 = 0x7000_0000_0000;
const PAGE: u64 = 4096;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let arg = |index: usize, default: &str| args.get(index).cloned().unwrap_or(default.into());
    let bytes = arg(0, "1024").parse::<u64>()? << 20;
    let workers = arg(1, "2").parse()?;
    let shape = arg(2, "plain");
    let options = FillOptions {
        workers,
        userfaultfd: arg(3, "uffd") == "uffd",
        parents: Arc::default(),
        in_order: false,
    };
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let mm = write_images(dir.path(), bytes, &shape)?;
    for _ in 0..3 {
        let times = restore(dir.path(), &mm, &options)?;
        let names = ["plan", "spawn", "map", "fill", "finish"];
        let list: Vec<String> = names
            .iter()
            .zip(times)
            .map(|(name, time)| format!("{name} {:.3} ms", time.as_secs_f64() * 1e3))
            .collect();
        let rate = bytes as f64 / times[3].as_secs_f64() / f64::from(1 << 30);
        println!("{}: {rate:.2} GiB/s", list.join(", "));
    }
    Ok(())
}

fn write_images(dir: &std::path::Path, bytes: u64, shape: &str) -> anyhow::Result<MmEntry> {
    let writer = ImageWriter::create(dir, Sync::None)?;
    let mut stream = writer.stream(ImageKind::Pagemap, 1)?;
    stream.append(&PagemapHead { pages_id: 1 })?;
    let (run, stride) = match shape {
        "spread" => (PAGE, 4 * PAGE),
        _ => (bytes, bytes),
    };
    for index in 0..bytes / run {
        stream.append(&PagemapEntry {
            vaddr: BASE + index * stride,
            flags: Some(4),
            nr_pages: Some(run / PAGE),
            ..PagemapEntry::default()
        })?;
    }
    stream.finish()?;
    let pages = writer.create_raw(ImageKind::Pages, 1)?;
    let chunk = vec![0x41; 1 << 20];
    for index in 0..bytes >> 20 {
        std::os::unix::fs::FileExt::write_all_at(&pages, &chunk, index << 20)?;
    }
    let advice = if shape == "huge" {
        1 << libc::MADV_HUGEPAGE
    } else {
        0
    };
    Ok(MmEntry {
        mm_start_code: PAGE * 16,
        mm_end_code: PAGE * 17,
        mm_start_data: PAGE * 17,
        mm_end_data: PAGE * 18,
        mm_start_brk: PAGE * 18,
        mm_brk: PAGE * 18,
        mm_start_stack: PAGE * 20,
        mm_arg_start: PAGE * 20,
        mm_arg_end: PAGE * 20,
        mm_env_start: PAGE * 20,
        mm_env_end: PAGE * 20,
        vmas: vec![VmaEntry {
            start: BASE,
            end: BASE + bytes / run * stride,
            prot: 3,
            flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32,
            status: 1 | 512,
            fd: -1,
            madv: Some(advice),
            ..VmaEntry::default()
        }],
        ..MmEntry::default()
    })
}

/// Time that all threads of this process have run: wall-clock times mean little on a busy machine.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn plan_bytes(mm: &MmEntry, pages: &PageIndex) -> u64 {
    let vmas = mm.vmas.iter();
    vmas.flat_map(|vma| pages.runs_in(vma.start..vma.end))
        .map(|run| run.len)
        .sum()
}

fn restore(
    dir: &std::path::Path,
    mm: &MmEntry,
    options: &FillOptions,
) -> anyhow::Result<[Duration; 5]> {
    let exe = File::open("/proc/self/exe")?;
    let mut at = Instant::now();
    let mut lap = || {
        let taken = at.elapsed();
        at = Instant::now();
        taken
    };
    let images = ImageDir::open(dir)?;
    let pages = Arc::new(PageIndex::read(&images, ImageKind::Pagemap, 1)?);
    let host = HostMemory::probe()?;
    let arena = choose_arena(&[mm], &host.maps, ARENA_BYTES as u64)?;
    let plan = MemoryPlan::new(MemoryRequest {
        mm,
        pages: &pages,
        parent: None,
        arena: &(arena..arena + ARENA_BYTES as u64),
        host: &host,
        segments: &std::collections::BTreeMap::new(),
    })?;
    let planned = lap();
    let spawn = RootSpawn {
        flags: 0,
        set_tid: vec![],
        exit_signal: libc::SIGCHLD,
        arena,
        arena_bytes: ARENA_BYTES,
    };
    let (arena, mut thread) = spawn_root(&spawn)?;
    let spawned = lap();
    let mut puppet = Puppet {
        arena: &arena,
        thread: &mut thread,
        first: floe_inject::Program::new(),
    };
    map(&plan, &mut puppet, &|_| None, TaskFd(exe.as_raw_fd()))?;
    let mapped = lap();
    let cpu = cpu_time();
    fill(&plan, &mut puppet, options).context("filling")?;
    let filled = lap();
    let cpu = cpu_time() - cpu;
    let rate = plan_bytes(mm, &pages) as f64 / cpu.as_secs_f64() / f64::from(1 << 30);
    print!("{rate:.2} GiB a CPU second; ");
    finish(&plan, &mut puppet)?;
    let finished = lap();
    let pid = thread.pid();
    drop(thread);
    // Its memory must be free again before the next run.
    floe_kernel::ptrace::wait(pid, 0)?;
    Ok([planned, spawned, mapped, filled, finished])
}
