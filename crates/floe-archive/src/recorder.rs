//! The beginning of a stream, kept until it is known whether all of it must be.

use std::fs::File;
use std::io::{self, Read, Write};
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

    /// Writes what was read and what will come to a file without a name.
    pub(crate) fn keep_all(&self) -> io::Result<File> {
        let mut shared = lock(&self.0);
        let mut file = Scratch::open().file(u64::MAX)?;
        file.write_all(&shared.kept.take().unwrap_or_default())?;
        io::copy(&mut shared.source, &mut file)?;
        Ok(file)
    }
}
