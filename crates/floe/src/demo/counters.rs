//! What the demo's programs tell the one that watches: a few numbers in a file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// One number in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Counter {
    /// Pages that the server has filled.
    Filled = 0,
    /// Answers that the client has checked.
    Answers = 1,
    /// Answers that were wrong or did not come.
    Wrong = 2,
    /// The longest time between two answers, in microseconds, by the client's clock.
    LongestGap = 3,
    /// The client's port.
    ClientPort = 4,
    /// The server's port.
    ServerPort = 5,
    /// Another number lets the client measure its longest wait anew.
    Phase = 6,
    /// The phase that the client measures.
    PhaseSeen = 7,
}

/// The file.
#[derive(Debug)]
pub struct Counters(File);

impl Counters {
    const NAME: &str = "counters";
    const COUNT: u64 = 8;

    /// Makes the file with all numbers zero.
    pub fn create(directory: &Path) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(directory.join(Self::NAME))?;
        file.set_len(Self::COUNT * 8)?;
        Ok(Self(file))
    }

    /// Opens the file that [`Counters::create`] made.
    pub fn open(directory: &Path) -> io::Result<Self> {
        File::options()
            .read(true)
            .write(true)
            .open(directory.join(Self::NAME))
            .map(Self)
    }

    /// Reads one number.
    pub fn get(&self, counter: Counter) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, counter as u64 * 8)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes one number.
    pub fn set(&self, counter: Counter, value: u64) -> io::Result<()> {
        self.0
            .write_all_at(&value.to_le_bytes(), counter as u64 * 8)
    }
}
