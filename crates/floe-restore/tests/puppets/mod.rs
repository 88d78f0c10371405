//! Images made by hand, and puppets restored from them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use floe_image::messages::{MmEntry, PagemapEntry, PagemapHead, VmaEntry};
use floe_image::{ImageDir, ImageKind, ImageWriter, Sync};
use floe_inject::{ARENA_BYTES, Arena, Arg, Program, RootSpawn, Seized, Stopped, spawn_root};
use floe_kernel::ids::{HostPid, TaskAddr, TaskFd};
use floe_kernel::proc::{Mapping, parse_maps};
use floe_kernel::ptrace;
use floe_kernel::vm;
use floe_memory::PageIndex;
use floe_restore::memory::{
    FillOptions, FillStats, HostMemory, MemoryPlan, MemoryRequest, PlanError, Puppet, Source,
    choose_arena, fill, finish, make_segment, map, plan_segments,
};

pub const PAGE: u64 = 4096;
const EXE: u32 = 1;

/// Two tests must not choose the same hole before one has mapped it.
static SPAWNING: Mutex<()> = Mutex::new(());

/// The content of the page at an address.
pub fn pattern(address: u64) -> Vec<u8> {
    address.wrapping_add(1).to_le_bytes().repeat(512)
}

/// A mapping of private anonymous memory.
pub fn anonymous(start: u64, pages: u64, prot: u32) -> VmaEntry {
    VmaEntry {
        start,
        end: start + pages * PAGE,
        prot,
        flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32,
        status: 1 | 512,
        fd: -1,
        ..VmaEntry::default()
    }
}

/// An address space as images.
pub struct Layout {
    pub mm: MmEntry,
    pages: BTreeMap<u64, Vec<u8>>,
    segments: BTreeMap<u64, BTreeMap<u64, Vec<u8>>>,
    opened: BTreeMap<Source, TaskFd>,
}

impl Layout {
    pub fn new() -> Layout {
        let mm = MmEntry {
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
            exe_file_id: EXE,
            ..MmEntry::default()
        };
        Layout {
            mm,
            pages: BTreeMap::new(),
            segments: BTreeMap::new(),
            opened: BTreeMap::new(),
        }
    }

    pub fn vma(&mut self, vma: VmaEntry) {
        self.mm.vmas.push(vma);
    }

    pub fn pages(&mut self, start: u64, pages: u64) {
        for page in (0..pages).map(|index| start + index * PAGE) {
            self.pages.insert(page, pattern(page));
        }
    }

    pub fn changed_page(&mut self, at: u64) {
        self.pages.insert(at, vec![0x5a; PAGE as usize]);
    }

    pub fn segment_pages(&mut self, id: u64, start: u64, pages: u64) {
        let segment = self.segments.entry(id).or_default();
        for page in (0..pages).map(|index| start + index * PAGE) {
            segment.insert(page, pattern(page));
        }
    }

    pub fn open(&mut self, source: Source, fd: TaskFd) {
        self.opened.insert(source, fd);
    }

    /// Adds this process's vDSO, moved to `start`; returns where its code begins.
    pub fn vdso(&mut self, start: u64) -> u64 {
        let own = HostMemory::probe().unwrap().maps;
        let mut at = start;
        let mut code = start;
        for piece in own {
            let status = match piece.name.as_slice() {
                b"[vdso]" => {
                    code = at;
                    8
                }
                name if name.starts_with(b"[vvar") => 4096,
                _ => continue,
            };
            self.vma(VmaEntry {
                start: at,
                end: at + piece.byte_len(),
                status: 1 | 512 | status,
                ..VmaEntry::default()
            });
            at += piece.byte_len();
        }
        code
    }

    /// Adds the vDSO of a kernel that differs in the last byte.
    pub fn other_vdso(&mut self, start: u64) -> u64 {
        let code = self.vdso(start);
        let own = HostMemory::probe().unwrap().maps;
        let vdso = own.iter().find(|piece| piece.name == b"[vdso]").unwrap();
        let mut bytes = vec![0; vdso.byte_len() as usize];
        let me = HostPid(std::process::id().cast_signed());
        vm::read_exact(me, TaskAddr(vdso.start.0), &mut bytes).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        for (index, page) in bytes.chunks(PAGE as usize).enumerate() {
            self.pages.insert(code + index as u64 * PAGE, page.to_vec());
        }
        code
    }

    fn write(&self, dir: &std::path::Path) -> ImageDir {
        let writer = ImageWriter::create(dir, Sync::None).unwrap();
        write_pages(&writer, (ImageKind::Pagemap, 1), 1, &self.pages);
        for (index, (id, pages)) in self.segments.iter().enumerate() {
            let pages_id = 2 + index as u32;
            write_pages(&writer, (ImageKind::ShmemPagemap, *id), pages_id, pages);
        }
        ImageDir::open(dir).unwrap()
    }

    /// Spawns a puppet of its own and restores the layout in it.
    pub fn restore(self, options: &FillOptions) -> Restored {
        let _guard = SPAWNING
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let host = HostMemory::probe().unwrap();
        let base = choose_arena(&[&self.mm], &host.maps, ARENA_BYTES as u64).unwrap();
        let spawn = RootSpawn {
            flags: 0,
            set_tid: vec![],
            exit_signal: libc::SIGCHLD,
            arena: base,
            arena_bytes: ARENA_BYTES,
        };
        let exe = File::open("/proc/self/exe").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let images = self.write(dir.path());
        let range = base..base + ARENA_BYTES as u64;
        let plan = self.plan(&images, &host, None, &range);
        let segments: BTreeMap<u64, OwnedFd> = plan_segments([&plan])
            .iter()
            .map(|segment| (segment.id, make_segment(segment, &images).unwrap()))
            .collect();
        let (arena, thread) = spawn_root(&spawn).unwrap();
        let mut restored = Restored {
            layout: self,
            plan,
            arena,
            thread,
            stats: FillStats::default(),
            host,
            segments,
            exe: exe.into(),
            _images: dir,
        };
        restored.run(options);
        restored
    }

    /// The layout's plan, with an arena out of the way.
    pub fn try_plan(&self) -> Result<MemoryPlan, PlanError> {
        let dir = tempfile::tempdir().unwrap();
        let images = self.write(dir.path());
        MemoryPlan::new(MemoryRequest {
            mm: &self.mm,
            pages: &Arc::new(PageIndex::read(&images, ImageKind::Pagemap, 1).unwrap()),
            parent: None,
            arena: &(1 << 32..1 << 33),
            host: &HostMemory::probe().unwrap(),
            segments: &BTreeMap::new(),
        })
    }

    fn plan(
        &self,
        images: &ImageDir,
        host: &HostMemory,
        parent: Option<&MemoryPlan>,
        arena: &std::ops::Range<u64>,
    ) -> MemoryPlan {
        let pages = Arc::new(PageIndex::read(images, ImageKind::Pagemap, 1).unwrap());
        MemoryPlan::new(MemoryRequest {
            mm: &self.mm,
            pages: &pages,
            parent,
            arena,
            host,
            segments: &BTreeMap::new(),
        })
        .unwrap()
    }
}

fn write_pages(
    writer: &ImageWriter,
    (kind, id): (ImageKind, u64),
    pages_id: u32,
    pages: &BTreeMap<u64, Vec<u8>>,
) {
    let mut stream = writer.stream(kind, id).unwrap();
    stream.append(&PagemapHead { pages_id }).unwrap();
    let raw = writer
        .create_raw(ImageKind::Pages, pages_id.into())
        .unwrap();
    for (index, (address, bytes)) in pages.iter().enumerate() {
        stream
            .append(&PagemapEntry {
                vaddr: *address,
                compat_nr_pages: 0,
                in_parent: None,
                flags: Some(4),
                nr_pages: Some(1),
            })
            .unwrap();
        raw.write_all_at(bytes, index as u64 * PAGE).unwrap();
    }
    stream.finish().unwrap();
}

/// A puppet with its restored address space.
pub struct Restored {
    pub layout: Layout,
    plan: MemoryPlan,
    arena: Arena,
    thread: Stopped,
    pub stats: FillStats,
    host: HostMemory,
    segments: BTreeMap<u64, OwnedFd>,
    exe: OwnedFd,
    _images: tempfile::TempDir,
}

impl Restored {
    fn run(&mut self, options: &FillOptions) {
        let mut puppet = Puppet {
            arena: &self.arena,
            thread: &mut self.thread,
            first: Program::new(),
        };
        let opened = |source: Source| match source {
            Source::Segment { id } => self.segments.get(&id).map(|fd| TaskFd(fd.as_raw_fd())),
            file => self.layout.opened.get(&file).copied(),
        };
        let exe = TaskFd(self.exe.as_raw_fd());
        map(&self.plan, &mut puppet, &opened, exe).unwrap();
        self.stats = fill(&self.plan, &mut puppet, options).unwrap();
        finish(&self.plan, &mut puppet).unwrap();
    }

    /// Forks a child from it and restores `layout` there.
    pub fn fork(&mut self, layout: Layout, options: &FillOptions) -> Restored {
        let dir = tempfile::tempdir().unwrap();
        let images = layout.write(dir.path());
        let range = self.arena.range();
        let plan = layout.plan(&images, &self.host, Some(&self.plan), &range);
        assert!(plan.shares_with_parent());
        let mut fork = Program::new();
        let mut words = [0u64; 11];
        words[0] = libc::CLONE_PTRACE as u64;
        words[4] = libc::SIGCHLD as u64;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let args = fork.buffer(&bytes);
        let args = [Arg::from(args), Arg::from(bytes.len())];
        let child = fork.call("clone3", libc::SYS_clone3, &args);
        let outcome = self.arena.run(&mut self.thread, &fork).unwrap();
        let child = HostPid(outcome.result(child) as i32);
        let mut restored = Restored {
            layout,
            plan,
            arena: self.arena.clone(),
            thread: Seized::born(child).wait_stopped().unwrap(),
            stats: FillStats::default(),
            host: self.host.clone(),
            segments: BTreeMap::new(),
            exe: self.exe.try_clone().unwrap(),
            _images: dir,
        };
        restored.run(options);
        restored
    }

    pub fn pid(&self) -> HostPid {
        self.thread.pid()
    }

    pub fn call(&mut self, number: i64, args: &[Arg]) -> i64 {
        let mut program = Program::new();
        let call = program.call("a call of the test", number, args);
        let outcome = self.arena.run(&mut self.thread, &program).unwrap();
        outcome.result(call)
    }

    /// Lets it call the function at `address`, whose argument is 0, on a stack that ends at `stack`.
    pub fn call_function(&mut self, address: u64, stack: u64) -> u64 {
        const NOWHERE: u64 = 0xdead_0000;
        let pid = self.pid();
        let top = stack - 16;
        vm::write_exact(pid, TaskAddr(top), &NOWHERE.to_le_bytes()).unwrap();
        let mut regs = ptrace::regs(pid).unwrap();
        (regs.rip, regs.rsp, regs.rdi, regs.orig_rax) = (address, top, 0, u64::MAX);
        ptrace::set_regs(pid, &regs).unwrap();
        ptrace::cont(pid, 0).unwrap();
        let (_, status) = ptrace::wait(pid, 0).unwrap().unwrap();
        assert_eq!(status, ptrace::WaitStatus::Signal(libc::SIGSEGV));
        let regs = ptrace::regs(pid).unwrap();
        assert_eq!(regs.rip, NOWHERE, "it returned");
        regs.rax
    }

    pub fn try_read(&self, at: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        vm::read_exact(self.pid(), TaskAddr(at), &mut bytes).map(|()| bytes)
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        self.try_read(at, len).unwrap()
    }

    pub fn proc_text(&self, name: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{name}", self.pid())).unwrap()
    }

    /// Its mappings without the arena and the vsyscall page.
    pub fn maps(&self) -> Vec<Mapping> {
        self.parsed("maps")
    }

    /// The same with flags.
    pub fn smaps(&self) -> Vec<Mapping> {
        self.parsed("smaps")
    }

    fn parsed(&self, name: &str) -> Vec<Mapping> {
        let mut maps = parse_maps(self.proc_text(name).as_bytes()).unwrap();
        let arena = self.arena.range();
        maps.retain(|map| map.name != b"[vsyscall]" && !arena.contains(&map.start.0));
        maps
    }

    /// Holds `/proc/PID/maps` against the image.
    pub fn check_maps(&self) {
        let found: Vec<_> = self
            .maps()
            .iter()
            .map(|map| {
                let prot = [(map.read, 1), (map.write, 2), (map.exec, 4)];
                let set = prot.iter().filter(|(set, _)| *set);
                (map.start.0, map.end.0, set.map(|(_, bit)| bit).sum::<u32>())
            })
            .collect();
        let vmas = self.layout.mm.vmas.iter();
        let wanted: Vec<_> = vmas.map(|vma| (vma.start, vma.end, vma.prot)).collect();
        assert_eq!(found, wanted, "{}", self.proc_text("maps"));
    }

    /// Holds every page that the image has against the task's.
    pub fn check_content(&self) {
        let memory = File::open(format!("/proc/{}/mem", self.pid())).unwrap();
        for (address, wanted) in &self.layout.pages {
            let mut found = vec![0; PAGE as usize];
            memory.read_exact_at(&mut found, *address).unwrap();
            assert!(found == *wanted, "page {address:#x}");
        }
    }
}

/// The offset of a function in a vDSO, found by the names of its symbols.
pub fn vdso_function(elf: &[u8], wanted: &[u8]) -> u64 {
    let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
    let int = |at: usize| u32::from_le_bytes(elf[at..at + 4].try_into().unwrap());
    let sections = word(40) as usize;
    let section = |index: usize| sections + index * 64;
    let count = usize::from(u16::from_le_bytes([elf[60], elf[61]]));
    let dynsym = (0..count)
        .map(section)
        .find(|&at| int(at + 4) == 11)
        .unwrap();
    let strings = word(section(int(dynsym + 40) as usize) + 24) as usize;
    let (start, len) = (word(dynsym + 24) as usize, word(dynsym + 32) as usize);
    let symbol = (start..start + len).step_by(24).find(|&at| {
        let name = &elf[strings + int(at) as usize..];
        name.starts_with(wanted) && name[wanted.len()] == 0
    });
    word(symbol.unwrap() + 8)
}
