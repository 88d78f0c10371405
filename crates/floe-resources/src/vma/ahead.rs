//! Reading `smaps` beside other work.
//!
//! For each mapping the kernel walks all of its pages, about 20 ms for a GiB, only to print counters that
//! nobody asked for; but nothing else tells the flags of a mapping. So for big tasks a thread of its own
//! reads it while the tree's descriptors and threads are collected.

use std::collections::HashMap;
use std::thread::JoinHandle;

use floe_kernel::ids::{HostPid, PAGE_SIZE};
use floe_kernel::proc::{ProcDir, ProcError};

/// Smaller address spaces are read faster than a thread starts.
const WORTHWHILE: u64 = (16 << 20) / PAGE_SIZE;
/// Threads at most; each keeps a core busy.
const THREADS: usize = 2;

/// What is being read, by task; put into the collector's cache by the dump.
#[derive(Debug, Default)]
pub struct SmapsAhead(HashMap<HostPid, JoinHandle<Result<Vec<u8>, ProcError>>>);

impl SmapsAhead {
    /// Begins to read the big ones of these stopped tasks.
    pub fn start<'a>(tasks: impl Iterator<Item = &'a ProcDir>) -> SmapsAhead {
        let big = tasks.filter(|proc| resident(proc) >= WORTHWHILE);
        let begin = |proc: &ProcDir| {
            let pid = proc.pid();
            let read = move || ProcDir::open(pid)?.read("smaps");
            let thread = std::thread::Builder::new().name("floe-smaps".into());
            Some((pid, thread.spawn(read).ok()?))
        };
        SmapsAhead(big.take(THREADS).filter_map(begin).collect())
    }

    /// The text of a task, read now where that was not begun before.
    pub(super) fn read(&mut self, proc: &ProcDir) -> Result<Vec<u8>, ProcError> {
        match self.0.remove(&proc.pid()) {
            Some(thread) => thread.join().expect("reading a file does not panic"),
            None => proc.read("smaps"),
        }
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

    #[test]
    fn what_is_read_ahead_is_what_is_read_now() {
        let memory = vec![1u8; 32 << 20];
        let own = HostPid(std::process::id().cast_signed());
        let proc = ProcDir::open(own).expect("our own");
        let mut ahead = SmapsAhead::start(std::iter::once(&proc));
        assert_eq!(ahead.0.len(), 1);
        let mappings = |text: Vec<u8>| text.windows(9).filter(|word| word == b"\nVmFlags:").count();
        assert!(mappings(ahead.read(&proc).expect("readable")) > 3);
        assert!(ahead.0.is_empty());
        assert!(mappings(ahead.read(&proc).expect("readable")) > 3);
        std::hint::black_box(&memory);
    }
}
