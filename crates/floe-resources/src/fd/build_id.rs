//! The build id of a program or library (`ld --build-id`), by which restore notices another build.
//!
//! Saved:    the id in the entry of the file, of ELF files that tasks run or map.
//! Rebuilt:  compared with that of the file found at the path. Needs: the file.
//! Not kept: nothing.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

/// `e_ident` of a 64-bit little-endian file.
const MAGIC: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PT_NOTE: u32 = 4;
const NT_GNU_BUILD_ID: u32 = 3;
/// Program headers that are looked at; real files have some tens.
const MOST_HEADERS: usize = 128;
/// Bytes of a note segment that are looked at.
const MOST_NOTES: u64 = 64 * 1024;
/// Longest id that is taken; the usual ones have 20 bytes.
const MOST_ID: usize = 64;

/// The build id of an open file; `None` when it is no ELF file or has none.
pub fn read(file: impl AsFd) -> io::Result<Option<Vec<u8>>> {
    let mut header = [0u8; HEADER];
    if read_at(&file, &mut header, 0)? < HEADER || header[..6] != MAGIC {
        return Ok(None);
    }
    let count = usize::from(u16_at(&header, 56));
    if usize::from(u16_at(&header, 54)) != PROGRAM_HEADER || count > MOST_HEADERS {
        return Ok(None);
    }
    let mut table = vec![0u8; count * PROGRAM_HEADER];
    let found = read_at(&file, &mut table, u64_at(&header, 32))?;
    for entry in table[..found].chunks_exact(PROGRAM_HEADER) {
        if u32_at(entry, 0) != PT_NOTE {
            continue;
        }
        let (offset, size) = (u64_at(entry, 8), u64_at(entry, 32).min(MOST_NOTES));
        let mut notes = vec![0u8; size as usize];
        let found = read_at(&file, &mut notes, offset)?;
        if let Some(id) = find(&notes[..found]) {
            return Ok(Some(id.to_vec()));
        }
    }
    Ok(None)
}

/// The id as the images have it: words in the byte order of the machine, the last one filled up.
pub fn to_words(id: &[u8]) -> Vec<u32> {
    let word = |part: &[u8]| {
        let mut bytes = [0u8; 4];
        bytes[..part.len()].copy_from_slice(part);
        u32::from_ne_bytes(bytes)
    };
    id.chunks(4).map(word).collect()
}

/// Looks through a note segment: name size, data size, type, then both padded to four bytes.
fn find(notes: &[u8]) -> Option<&[u8]> {
    let mut at = 0usize;
    loop {
        let head = notes.get(at..at.checked_add(12)?)?;
        let (name_size, data_size) = (u32_at(head, 0) as usize, u32_at(head, 4) as usize);
        let name = padded(at + 12, name_size)?;
        let data = padded(name.end.next_multiple_of(4), data_size)?;
        let is_id = u32_at(head, 8) == NT_GNU_BUILD_ID && notes.get(name.clone())? == b"GNU\0";
        if is_id && (1..=MOST_ID).contains(&data_size) {
            return notes.get(data);
        }
        at = data.end.next_multiple_of(4);
    }
}

fn padded(start: usize, size: usize) -> Option<Range<usize>> {
    // Sizes are 32 bits wide and offsets small, so only a hostile sum overflows.
    Some(start..start.checked_add(size)?).filter(|range| range.end < usize::MAX / 2)
}

fn read_at(file: impl AsFd, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        // An absurd offset in a damaged file is past any end.
        let Some(at) = offset
            .checked_add(done as u64)
            .filter(|at| *at < i64::MAX as u64)
        else {
            break;
        };
        match rustix::io::pread(&file, &mut buffer[done..], at) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(done)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [name.len() as u32, data.len() as u32, kind] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        for part in [name, data] {
            bytes.extend_from_slice(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn the_id_is_found_behind_other_notes() {
        let notes = [
            note(b"GNU\0", 5, &[1; 16]),
            note(b"X\0", 3, &[2; 3]),
            note(b"GNU\0", 3, &[7; 20]),
        ]
        .concat();
        assert_eq!(find(&notes), Some(&[7u8; 20][..]));
        for cut in 0..notes.len() {
            assert_eq!(find(&notes[..cut]), None, "cut at {cut}");
        }
        assert_eq!(find(&[0xff; 40]), None);
    }

    #[test]
    fn programs_may_have_one_and_text_has_none() {
        assert_eq!(
            read(std::fs::File::open("/etc/passwd").expect("there")).expect("readable"),
            None
        );
        let own = read(std::fs::File::open("/proc/self/exe").expect("there")).expect("readable");
        assert!(own.is_none_or(|id| !id.is_empty()));
        assert_eq!(to_words(&[1, 0, 0, 0, 2]), [1, 2]);
    }
}
