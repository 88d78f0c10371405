//! Settings of the kernel (`/proc/sys`).

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// The longest setting: the kernel shows a page at most.
const PAGE: usize = 4096;

/// Reads a setting at once. Of lists of numbers the kernel shows nothing behind the first read, however
/// short that was, so reading in parts would cut them.
pub fn read_setting(path: impl AsRef<Path>) -> io::Result<String> {
    let mut text = vec![0; PAGE];
    let len = File::open(path)?.read(&mut text)?;
    text.truncate(len);
    String::from_utf8(text).map_err(|_| io::ErrorKind::InvalidData.into())
}
