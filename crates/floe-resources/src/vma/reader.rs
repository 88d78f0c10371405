//! Reading the mappings of a stopped task, with their flags.
//!
//! For each mapping `smaps` walks all of its pages, about 20 ms for a GiB, only to print counters that
//! nobody asked for. So a BPF iterator tells the flags where the kernel permits it. Else, for big tasks, a
//! thread of its own reads `smaps` while the tree's descriptors and threads are collected.

use std::collections::HashMap;
use std::thread::JoinHandle;

use floe_kernel::ids::{HostPid, PAGE_SIZE};
use floe_kernel::proc::{Mapping, ProcDir, ProcError, parse_maps};
use floe_kernel::vma_flags::FlagReader;

/// Smaller address spaces are read faster than a thread starts.
const WORTHWHILE: u64 = (16 << 20) / PAGE_SIZE;
/// Threads at most; each keeps a core busy.
const THREADS: usize = 2;

/// Reads mappings; put into the collector's cache by the dump.
#[derive(Default)]
pub struct MappingReader {
    flags: Option<FlagReader>,
    /// What is being read, by task.
    ahead: HashMap<HostPid, JoinHandle<Result<Vec<u8>, ProcError>>>,
}

impl MappingReader {
    /// Gets ready for big tasks, before they are stopped: takes some milliseconds.
    pub fn prepare() -> MappingReader {
        let flags = FlagReader::load();
        if let Err(error) = &flags {
            tracing::debug!("no BPF iterator, flags of mappings come from smaps: {error}");
        }
        MappingReader {
            flags: flags.ok(),
            ahead: HashMap::new(),
        }
    }

    /// Begins to read the big ones of these stopped tasks, where that takes long.
    pub fn start<'a>(&mut self, tasks: impl Iterator<Item = &'a ProcDir>) {
        if self.flags.is_some() {
            return;
        }
        let big = tasks.filter(|proc| resident(proc) >= WORTHWHILE);
        let begin = |proc: &ProcDir| {
            let pid = proc.pid();
            let read = move || ProcDir::open(pid)?.read("smaps");
            let thread = std::thread::Builder::new().name("floe-smaps".into());
            Some((pid, thread.spawn(read).ok()?))
        };
        self.ahead.extend(big.take(THREADS).filter_map(begin));
    }

    /// The mappings of a stopped task.
    pub(super) fn read(&mut self, proc: &ProcDir) -> Result<Vec<Mapping>, ProcError> {
        match self.flags.as_ref().map(|flags| flags.mappings(proc)) {
            Some(Ok(Some(mappings))) => return Ok(mappings),
            Some(Ok(None)) => {
                tracing::debug!(pid = proc.pid().0, "an unknown flag: reading smaps");
            }
            Some(Err(error)) => tracing::debug!(pid = proc.pid().0, "reading smaps: {error}"),
            None => {}
        }
        let text = match self.ahead.remove(&proc.pid()) {
            Some(thread) => thread.join().expect("reading a file does not panic"),
            None => proc.read("smaps"),
        };
        parse_maps(&text?).map_err(|error| proc.bad(error))
    }
}

/// Pages in memory; 0 where that cannot be told.
fn resident(proc: &ProcDir) -> u64 {
    let text = proc.read_record("statm").unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let pages = text.split_ascii_whitespace().nth(1);
    pages.and_then(|pages| pages.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A child that stands still in a system call.
    struct Child(std::process::Child);

    impl Child {
        fn start() -> (Child, ProcDir) {
            let child = std::process::Command::new("cat")
                .stdin(std::process::Stdio::piped())
                .spawn()
                .expect("started");
            let proc = ProcDir::open(HostPid(child.id().cast_signed())).expect("alive");
            // Waiting in read(2), number 0 or 63.
            while !proc
                .read("syscall")
                .is_ok_and(|text| text.starts_with(b"0 0x0 ") || text.starts_with(b"63 0x0 "))
            {
                std::thread::yield_now();
            }
            (Child(child), proc)
        }
    }

    impl Drop for Child {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn all_ways_to_read_give_the_same() {
        let (_child, proc) = Child::start();
        let expected = MappingReader::default().read(&proc).expect("readable");
        assert!(expected.iter().any(|mapping| mapping.flags.pfn_map));
        let read = |mut reader: MappingReader| reader.read(&proc).expect("readable");
        assert_eq!(read(MappingReader::prepare()), expected);
        let mut ahead = MappingReader::default();
        let task = ProcDir::open(proc.pid()).expect("alive");
        let text = std::thread::spawn(move || task.read("smaps"));
        ahead.ahead.insert(proc.pid(), text);
        assert_eq!(read(ahead), expected);
    }
}
