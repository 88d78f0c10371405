//! BLAKE3 of a file whose pieces are hashed as they come, in any order and by several threads.
//!
//! BLAKE3 is a tree: aligned pieces of a power of two bytes are subtrees that can be hashed alone, while
//! their bytes are in a cache, and joined at the end. The result is the ordinary hash of the whole.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard};

use blake3::Hasher;
use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

/// Bytes of a piece; only the last one of a file may be shorter.
pub const PIECE_BYTES: u64 = 256 * 1024;

/// The hashes of the pieces of one file.
#[derive(Debug, Default)]
pub struct PieceHashes {
    /// By the number of the piece: how many of its bytes were there, and their hash.
    found: Mutex<HashMap<u64, (u64, ChainingValue)>>,
}

impl PieceHashes {
    /// Hashes what is at `offset`. Nothing is noted of what does not begin a piece or is longer than one.
    pub fn note(&self, offset: u64, bytes: &[u8]) {
        let len = bytes.len() as u64;
        if !offset.is_multiple_of(PIECE_BYTES) || len == 0 || len > PIECE_BYTES {
            return;
        }
        let value = subtree(offset, bytes);
        self.found().insert(offset / PIECE_BYTES, (len, value));
    }

    /// The hash of the file of `size` bytes; pieces that were not noted whole are given by `read`.
    pub fn hash(
        &self,
        size: u64,
        read: impl Fn(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<blake3::Hash> {
        let found = self.found();
        let (mut values, mut buffer) = (Vec::new(), Vec::new());
        for number in 0..size.div_ceil(PIECE_BYTES) {
            let offset = number * PIECE_BYTES;
            let len = PIECE_BYTES.min(size - offset);
            values.push(match found.get(&number) {
                Some((noted, value)) if *noted == len => *value,
                _ => {
                    buffer.resize(len as usize, 0);
                    read(&mut buffer, offset)?;
                    subtree(offset, &buffer)
                }
            });
        }
        if values.len() < 2 {
            buffer.resize(size as usize, 0);
            read(&mut buffer, 0)?;
            return Ok(blake3::hash(&buffer));
        }
        let (left, right) = values.split_at(left_pieces(values.len()));
        Ok(merge_subtrees_root(&join(left), &join(right), Mode::Hash))
    }

    fn found(&self) -> MutexGuard<'_, HashMap<u64, (u64, ChainingValue)>> {
        let found = self.found.lock();
        found.expect("no thread panics while it holds the hashes")
    }
}

fn subtree(offset: u64, bytes: &[u8]) -> ChainingValue {
    let mut hasher = Hasher::new();
    hasher.set_input_offset(offset);
    hasher.update(bytes);
    hasher.finalize_non_root()
}

fn join(values: &[ChainingValue]) -> ChainingValue {
    match values {
        [value] => *value,
        _ => {
            let (left, right) = values.split_at(left_pieces(values.len()));
            merge_subtrees_non_root(&join(left), &join(right), Mode::Hash)
        }
    }
}

/// How many of `pieces`, which are two or more, belong to the left half: the largest power of two below.
fn left_pieces(pieces: usize) -> usize {
    1 << (pieces - 1).ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_in_any_order_give_the_ordinary_hash() {
        for size in [
            0,
            1,
            PIECE_BYTES,
            PIECE_BYTES + 1,
            3 * PIECE_BYTES,
            11 * PIECE_BYTES + 4096,
        ] {
            let bytes: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
            let hashes = PieceHashes::default();
            for (number, piece) in bytes.chunks(PIECE_BYTES as usize).enumerate().rev() {
                // The third one comes in two parts, the sixth not at all.
                let at = number as u64 * PIECE_BYTES;
                match number {
                    2 => {
                        hashes.note(at, &piece[..5000]);
                        hashes.note(at + 5000, &piece[5000..]);
                    }
                    5 => {}
                    _ => hashes.note(at, piece),
                }
            }
            let read = |buffer: &mut [u8], at: u64| {
                buffer.copy_from_slice(&bytes[at as usize..][..buffer.len()]);
                Ok(())
            };
            assert_eq!(
                hashes.hash(size, read).expect("readable"),
                blake3::hash(&bytes),
                "{size} bytes"
            );
        }
    }
}
