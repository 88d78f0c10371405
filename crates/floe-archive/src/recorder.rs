//! The beginning of a stream, kept until it is known whether all of it must be.

use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::held::Scratch;

struct Shared {
    source: Box<dyn Read + Send>,
    kept: Option<Vec<u8>>,
}

/// A stream whose bytes are kept until [`Recorded::stop`].
pub(crate) struct Recorder(Arc<Mutex<Shared>>);

/// The other end of a [`Recorder`].
pub(crate) struct Recorded(Arc<Mutex<Shared>>);

impl Recorder {
    pub(crate) fn new(source: Box<dyn Read + Send>) -> (Recorder, Recorded) {
        let kept = Some(Vec::new());
        let shared = Arc::new(Mutex::new(Shared { source, kept }));
        (Recorder(shared.clone()), Recorded(shared))
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    let shared = shared.lock();
    shared.expect("nobody panics while reading the stream")
}

impl Read for Recorder {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut shared = lock(&self.0);
        let read = shared.source.read(buffer)?;
        if let Some(kept) = &mut shared.kept {
            kept.extend_from_slice(&buffer[..read]);
        }
        Ok(read)
    }
}

impl Recorded {
    /// From now on nothing is kept.
    pub(crate) fn stop(&self) {
        lock(&self.0).kept = None;
    }

    /// Keeps what was read and what will come: in memory if half of what is available is enough.
    pub(crate) fn keep_all(&self) -> io::Result<File> {
        let mut shared = lock(&self.0);
        let kept = shared.kept.take().unwrap_or_default();
        let in_memory = floe_kernel::proc::available_memory()? / 2;
        Scratch::open().keep(kept.chain(&mut shared.source), in_memory)
    }
}
