//! Extended records of archives (pax), with values of any bytes.
//!
//! The `tar` crate takes records apart at line ends, which values of extended attributes may hold. So its
//! input goes through here: records are kept as they are, and line ends in values are hidden from the crate.

use std::cell::RefCell;
use std::io::{self, Read};
use std::rc::Rc;

const BLOCK: usize = 512;
/// Largest set of records of one file: attributes have 64 KiB each at most.
const LARGEST: u64 = 16 << 20;
/// Where a header has its parts (`tar(5)`).
const SIZE: std::ops::Range<usize> = 124..136;
const TYPE: usize = 156;
/// Whether more maps of holes follow: in a header, and in each further block.
const MORE_IN_HEADER: usize = 482;
const MORE_IN_BLOCK: usize = 504;

/// The records of the entry that is read next.
#[derive(Clone, Debug, Default)]
pub struct Records(Rc<RefCell<Vec<u8>>>);

impl Records {
    /// Takes them, for the entry that was just begun.
    pub fn take(&self) -> Vec<u8> {
        self.0.take()
    }
}

/// What stands in front of the `tar` crate.
#[derive(Debug)]
pub struct RecordReader<R> {
    input: R,
    records: Records,
    /// Headers to be handed on, and how much of them was.
    ready: Vec<u8>,
    at: usize,
    /// Bytes of content that follow, up to the end of a block.
    content: u64,
    /// The size that records give the next file.
    size: Option<u64>,
}

impl<R: Read> RecordReader<R> {
    /// Reads an archive that is not compressed.
    pub fn new(input: R, records: Records) -> Self {
        RecordReader {
            input,
            records,
            ready: Vec::new(),
            at: 0,
            content: 0,
            size: None,
        }
    }

    /// Reads the next header, and what belongs to it.
    fn header(&mut self) -> io::Result<()> {
        self.at = 0;
        self.ready = self.block()?;
        if self.ready.len() < BLOCK {
            return Ok(());
        }
        let size = number(&self.ready[SIZE]);
        match self.ready[TYPE] {
            b'x' => {
                let mut records = Vec::new();
                if size > LARGEST {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "too many records",
                    ));
                }
                let padded = size.next_multiple_of(BLOCK as u64);
                self.input.by_ref().take(padded).read_to_end(&mut records)?;
                let mut hidden = records.clone();
                records.truncate(size as usize);
                for (key, value) in parse(&records)? {
                    if key == b"size" {
                        self.size = std::str::from_utf8(&records[value])
                            .ok()
                            .and_then(|size| size.parse().ok());
                    } else {
                        let value = &mut hidden[value];
                        value
                            .iter_mut()
                            .filter(|byte| **byte == b'\n')
                            .for_each(|byte| *byte = b' ');
                    }
                }
                self.ready.append(&mut hidden);
                self.records.0.replace(records);
                return Ok(());
            }
            // Long names, and what is for all files.
            b'L' | b'K' | b'g' => self.content = size,
            kind => {
                self.content = self.size.take().unwrap_or(size);
                let mut more = kind == b'S' && self.ready[MORE_IN_HEADER] != 0;
                while more {
                    let block = self.block()?;
                    more = block.get(MORE_IN_BLOCK).is_some_and(|more| *more != 0);
                    self.ready.extend(block);
                }
            }
        }
        self.content = self.content.next_multiple_of(BLOCK as u64);
        Ok(())
    }

    /// The next block; shorter at the end of the input.
    fn block(&mut self) -> io::Result<Vec<u8>> {
        let mut block = Vec::with_capacity(BLOCK);
        self.input
            .by_ref()
            .take(BLOCK as u64)
            .read_to_end(&mut block)?;
        Ok(block)
    }
}

impl<R: Read> Read for RecordReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.ready.len() && self.content == 0 {
            self.header()?;
        }
        let ready = &self.ready[self.at..];
        if !ready.is_empty() {
            let count = ready.len().min(buffer.len());
            buffer[..count].copy_from_slice(&ready[..count]);
            self.at += count;
            return Ok(count);
        }
        let count = self.content.min(buffer.len() as u64) as usize;
        let read = self.input.read(&mut buffer[..count])?;
        self.content -= read as u64;
        Ok(read)
    }
}

/// A number of a header: octal digits, or binary behind a set first bit.
fn number(field: &[u8]) -> u64 {
    if field[0] & 0x80 != 0 {
        let tail = &field[field.len() - 8..];
        return tail
            .iter()
            .fold(0, |number, byte| number << 8 | u64::from(*byte));
    }
    let digits = field.iter().skip_while(|byte| **byte == b' ');
    let digits = digits.take_while(|byte| matches!(byte, b'0'..=b'7'));
    digits.fold(0, |number, digit| number << 3 | u64::from(digit - b'0'))
}

/// Names of records and where their values are: `LENGTH NAME=VALUE` and a line end each, all of it counted.
pub fn parse(records: &[u8]) -> io::Result<Vec<(&[u8], std::ops::Range<usize>)>> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed record");
    let mut all = Vec::new();
    let mut start = 0;
    while start < records.len() && records[start] != 0 {
        let rest = &records[start..];
        let space = rest
            .iter()
            .position(|byte| *byte == b' ')
            .ok_or_else(malformed)?;
        let length = std::str::from_utf8(&rest[..space])
            .ok()
            .and_then(|text| text.parse().ok());
        let record = length.and_then(|length: usize| rest.get(..length));
        let record = record.filter(|record| record.len() > space && record.ends_with(b"\n"));
        let record = record.ok_or_else(malformed)?;
        let equals = record
            .iter()
            .position(|byte| *byte == b'=')
            .filter(|at| *at > space);
        let equals = equals.ok_or_else(malformed)?;
        let value = start + equals + 1..start + record.len() - 1;
        all.push((&rest[space + 1..equals], value));
        start += record.len();
    }
    Ok(all)
}
