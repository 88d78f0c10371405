//! The flags of a task's mappings without `smaps`, by a BPF iterator (`task_vma`, Linux 5.13+).
//!
//! For its counters `smaps` walks every page of a mapping, 20 ms for a GiB, and no other file tells the
//! flags. A program of a few instructions that the kernel runs for each mapping does, in microseconds.
//!
//! Contract relied on: that of [`crate::bpf`]; the verifier lets the program read nothing but the mapping
//! that it is shown.

mod btf;
mod codes;
mod samples;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};

use crate::bpf;
use crate::ids::{HostPid, TaskAddr};
use crate::proc::{Mapping, ProcDir, parse_maps, parse_vm_flags};
use btf::Btf;
use codes::{Code, Codes};
use samples::Samples;

const BTF_OF_KERNEL: &str = "/sys/kernel/btf/vmlinux";

const BPF_PROG_LOAD: i32 = 5;
const BPF_LINK_CREATE: i32 = 28;
const BPF_ITER_CREATE: i32 = 33;
const BPF_PROG_TYPE_TRACING: u32 = 26;
const BPF_TRACE_ITER: u32 = 28;
const BPF_FUNC_SEQ_WRITE: i32 = 127;
/// As much as the kernel gives at once.
const BUFFER: usize = 32 << 10;

/// Reads the flags of mappings; made before a tree is stopped.
pub struct FlagReader {
    program: OwnedFd,
    codes: Codes,
}

/// A mapping as the program wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RawMapping {
    start: u64,
    end: u64,
    flags: u64,
}

impl RawMapping {
    fn from_bytes(record: &[u8]) -> RawMapping {
        let word = |at: usize| {
            let bytes = record[at..at + 8].try_into();
            u64::from_ne_bytes(bytes.expect("the program writes records of three words"))
        };
        RawMapping {
            start: word(0),
            end: word(8),
            flags: word(16),
        }
    }
}

/// One instruction (`struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    value: i32,
}

impl FlagReader {
    /// Loads the program and learns the bits from mappings of our own: some milliseconds. Fails where BPF
    /// is not there or not permitted, or the bits cannot be told apart.
    pub fn load() -> io::Result<FlagReader> {
        let unsupported = || io::Error::from(io::ErrorKind::Unsupported);
        let bytes = std::fs::read(BTF_OF_KERNEL)?;
        let btf = Btf::parse(&bytes).ok_or_else(unsupported)?;
        let code = program(&btf).ok_or_else(unsupported)?;
        let target = btf.function("bpf_iter_task_vma").ok_or_else(unsupported)?;
        let program = load_program(&code, target)?;
        let codes = learn(&program)?.ok_or_else(unsupported)?;
        Ok(FlagReader { program, codes })
    }

    /// The mappings of a stopped task with their flags, as `smaps` would give them. `Ok(None)` when a
    /// mapping has a flag that was not learned: only `smaps` tells then.
    pub fn mappings(&self, proc: &ProcDir) -> io::Result<Option<Vec<Mapping>>> {
        let text = proc.read("maps").map_err(io::Error::other)?;
        let mut mappings = parse_maps(&text).map_err(io::Error::other)?;
        let raw = read(&self.program, proc.pid())?;
        let mut raw = raw.iter().peekable();
        for mapping in &mut mappings {
            // The same in all tasks, and not one of the address space's own.
            if mapping.name == b"[vsyscall]" {
                continue;
            }
            let same = |raw: &&RawMapping| (raw.start, raw.end) == (mapping.start.0, mapping.end.0);
            let flags = raw
                .next_if(same)
                .and_then(|raw| self.codes.flags(raw.flags));
            let Some(flags) = flags else {
                return Ok(None);
            };
            mapping.flags = flags;
        }
        Ok(raw.next().is_none().then_some(mappings))
    }
}

/// For each mapping: `bpf_seq_write(meta->seq, {vm_start, vm_end, vm_flags}, 24)`.
fn program(btf: &Btf<'_>) -> Option<Vec<Instruction>> {
    const LOAD: u8 = 0x79;
    const STORE: u8 = 0x7b;
    const COPY: u8 = 0xbf;
    const SET: u8 = 0xb7;
    const ADD: u8 = 0x07;
    const IF_ZERO: u8 = 0x15;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    let op = |code: u8, to: u8, from: u8, offset: i16, value: i32| Instruction {
        code,
        registers: to | from << 4,
        offset,
        value,
    };
    let context = |name| btf.member("bpf_iter__task_vma", name);
    let vma = |name| btf.member("vm_area_struct", name);
    let seq = btf.member("bpf_iter_meta", "seq")?;
    let mut code = vec![
        op(COPY, 6, 1, 0, 0),
        op(LOAD, 7, 6, context("vma")?, 0),
        // After the last mapping there is none: to the end, ten instructions further.
        op(IF_ZERO, 7, 0, 12, 0),
    ];
    for (index, name) in ["vm_start", "vm_end", "vm_flags"].into_iter().enumerate() {
        code.push(op(LOAD, 2, 7, vma(name)?, 0));
        code.push(op(STORE, 10, 2, -24 + 8 * index as i16, 0));
    }
    code.extend([
        op(LOAD, 6, 6, context("meta")?, 0),
        op(LOAD, 1, 6, seq, 0),
        op(COPY, 2, 10, 0, 0),
        op(ADD, 2, 0, 0, -24),
        op(SET, 3, 0, 0, 24),
        op(CALL, 0, 0, 0, BPF_FUNC_SEQ_WRITE),
        op(SET, 0, 0, 0, 0),
        op(EXIT, 0, 0, 0, 0),
    ]);
    Some(code)
}

/// The part of `union bpf_attr` that loading reads.
#[repr(C)]
#[derive(Default)]
struct LoadArgument {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
    attach_prog_fd: u32,
    core_relo_cnt: u32,
}

fn load_program(code: &[Instruction], target: u32) -> io::Result<OwnedFd> {
    // `bpf_seq_write` is for programs that declare a license compatible with the kernel's.
    let license = c"Dual MIT/GPL";
    let mut argument = LoadArgument {
        prog_type: BPF_PROG_TYPE_TRACING,
        insn_cnt: u32::try_from(code.len()).map_err(io::Error::other)?,
        insns: code.as_ptr() as u64,
        license: license.as_ptr() as u64,
        prog_name: *b"floe_vma_flags\0\0",
        expected_attach_type: BPF_TRACE_ITER,
        attach_btf_id: target,
        ..LoadArgument::default()
    };
    // SAFETY: `insns` and `insn_cnt` span the live slice, whose elements have the kernel's layout;
    // `license` is a live string that ends with zero. The command gives a descriptor.
    unsafe { bpf::open(BPF_PROG_LOAD, &mut argument) }
}

#[repr(C)]
struct LinkArgument {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    iter_info: u64,
    iter_info_len: u32,
    padding: u32,
}

#[repr(C)]
struct IterArgument {
    link_fd: u32,
    flags: u32,
}

/// Runs the program over the mappings of one task.
fn read(program: &OwnedFd, pid: HostPid) -> io::Result<Vec<RawMapping>> {
    // `union bpf_iter_link_info`: the thread, whose address space is that of its process.
    let info: [u32; 4] = [pid.0.cast_unsigned(), 0, 0, 0];
    let mut argument = LinkArgument {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        target_fd: 0,
        attach_type: BPF_TRACE_ITER,
        flags: 0,
        iter_info: info.as_ptr() as u64,
        iter_info_len: size_of_val(&info) as u32,
        padding: 0,
    };
    // SAFETY: `iter_info` and its length span the live array; the command gives a descriptor.
    let link = unsafe { bpf::open(BPF_LINK_CREATE, &mut argument)? };
    let mut argument = IterArgument {
        link_fd: link.as_raw_fd().cast_unsigned(),
        flags: 0,
    };
    // SAFETY: the argument names no buffer, and the command gives a descriptor.
    let run = unsafe { bpf::open(BPF_ITER_CREATE, &mut argument)? };
    let mut run = File::from(run);
    let mut found: Vec<RawMapping> = Vec::new();
    let mut bytes = vec![0; BUFFER];
    loop {
        let len = run.read(&mut bytes)?;
        let before = found.len();
        for record in bytes[..len].chunks_exact(size_of::<RawMapping>()) {
            let mapping = RawMapping::from_bytes(record);
            // A read after the end gives the last mapping again, for ever (seen on Linux 6.18).
            if found.last().is_none_or(|last| last.start < mapping.start) {
                found.push(mapping);
            }
        }
        if found.len() == before {
            return Ok(found);
        }
    }
}

/// Learns the bits from our own address space, with one mapping for each thing that can be set. The bits
/// are read before and after the codes: what changed meanwhile is left out.
fn learn(program: &OwnedFd) -> io::Result<Option<Codes>> {
    let samples = Samples::make();
    let own = HostPid(std::process::id().cast_signed());
    let before = read(program, own)?;
    let text = std::fs::read("/proc/self/smaps")?;
    let after: std::collections::HashSet<_> = read(program, own)?
        .iter()
        .map(|raw| (raw.start, raw.end, raw.flags))
        .collect();
    drop(samples);
    let Ok(known) = parse_vm_flags(&text) else {
        return Ok(None);
    };
    let mut learned: Vec<(u64, BTreeSet<Code>)> = Vec::new();
    for raw in before {
        let range = (TaskAddr(raw.start), TaskAddr(raw.end));
        if let (true, Some(codes)) = (
            after.contains(&(raw.start, raw.end, raw.flags)),
            known.get(&range),
        ) {
            learned.push((raw.flags, codes.clone()));
        }
    }
    Ok(Codes::learn(&learned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_tells_what_smaps_tells() {
        let reader = match FlagReader::load() {
            Ok(reader) => reader,
            Err(error) => {
                println!("skipped: no BPF iterators: {error}");
                return;
            }
        };
        // Of a child, which stands still while both are read.
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("started");
        let proc = ProcDir::open(HostPid(child.id().cast_signed())).expect("alive");
        while proc.read("comm").expect("alive") != b"sleep\n" {
            std::thread::yield_now();
        }
        let settled = || {
            let maps = proc.read("maps").expect("readable");
            std::thread::sleep(std::time::Duration::from_millis(20));
            maps == proc.read("maps").expect("readable") && maps.windows(7).any(|w| w == b"libc.so")
        };
        while !settled() {}
        let expected = parse_maps(&proc.read("smaps").expect("readable")).expect("understood");
        let found = reader.mappings(&proc).expect("readable");
        child.kill().expect("our own");
        child.wait().expect("our own");
        assert_eq!(found.as_ref(), Some(&expected));
        assert!(expected.iter().any(|mapping| mapping.flags.pfn_map));
    }
}
