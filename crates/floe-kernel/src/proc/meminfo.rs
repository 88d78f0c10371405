//! `/proc/meminfo`: memory of the machine.

use std::io;

use super::text::{ParseError, decimal};

/// Memory that programs can still get without swapping, in bytes.
pub fn available_memory() -> io::Result<u64> {
    let text = std::fs::read("/proc/meminfo")?;
    parse_available(&text).map_err(io::Error::other)
}

fn parse_available(text: &[u8]) -> Result<u64, ParseError> {
    let mut lines = text.split(|byte| *byte == b'\n');
    let line = lines.find_map(|line| line.strip_prefix(b"MemAvailable:"));
    let number = line.and_then(|line| line.trim_ascii().strip_suffix(b" kB"));
    let kib = number.and_then(|number| decimal(number.trim_ascii()));
    let bytes = kib.and_then(|kib| kib.checked_mul(1024));
    bytes.ok_or_else(|| ParseError::new("meminfo", "MemAvailable", line.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_available_is_read_in_bytes() {
        let text = b"MemTotal:  16 kB\nMemAvailable:    12 kB\nBuffers: 1 kB\n";
        assert_eq!(parse_available(text), Ok(12 << 10));
        for text in [
            "",
            "MemAvailable: -1 kB",
            "MemAvailable: 99999999999999999999 kB",
        ] {
            assert!(parse_available(text.as_bytes()).is_err(), "{text}");
        }
        assert!(available_memory().expect("it is told") > 0);
    }
}
