//! Content of parents, kept for a while: many children are held against the same pages.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use floe_memory::{PageIndex, StoredRun};

use super::error::MemoryError;

/// Bytes of a pages file that are read at once.
const BLOCK_BYTES: u64 = 256 * 1024;
/// Bytes that are kept.
const KEPT_BYTES: usize = 16 << 20;

/// Which block: the address of its index, the number of its file there, its offset in blocks.
type Key = (usize, u32, u64);

/// Blocks of pages files, the oldest of which goes first.
#[derive(Debug, Default)]
pub struct ParentPages(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    blocks: HashMap<Key, Arc<Vec<u8>>>,
    order: VecDeque<Key>,
    bytes: usize,
}

impl ParentPages {
    /// Calls `see` with the content of a run: offset in it, and bytes, part by part.
    pub(super) fn read(
        &self,
        index: &Arc<PageIndex>,
        run: &StoredRun,
        mut see: impl FnMut(usize, &[u8]),
    ) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < run.len {
            let offset = run.offset + done;
            let block = self.block(index, run.file, offset / BLOCK_BYTES)?;
            let from = (offset % BLOCK_BYTES) as usize;
            let len = (block.len().saturating_sub(from) as u64).min(run.len - done);
            if len == 0 {
                return Err(MemoryError::ReadPages {
                    offset,
                    bytes: (run.len - done) as usize,
                    source: std::io::ErrorKind::UnexpectedEof.into(),
                });
            }
            see(done as usize, &block[from..from + len as usize]);
            done += len;
        }
        Ok(())
    }

    fn block(
        &self,
        index: &Arc<PageIndex>,
        file: u32,
        number: u64,
    ) -> Result<Arc<Vec<u8>>, MemoryError> {
        let key = (Arc::as_ptr(index).addr(), file, number);
        let lock = || {
            self.0
                .lock()
                .expect("nothing panics while it holds the blocks")
        };
        if let Some(block) = lock().blocks.get(&key) {
            return Ok(block.clone());
        }
        let block = Arc::new(read_block(index, file, number * BLOCK_BYTES)?);
        let mut kept = lock();
        kept.bytes += block.len();
        kept.order.push_back(key);
        if let Some(twice) = kept.blocks.insert(key, block.clone()) {
            kept.bytes -= twice.len();
        }
        while kept.bytes > KEPT_BYTES
            && let Some(oldest) = kept.order.pop_front()
        {
            let gone = kept.blocks.remove(&oldest);
            kept.bytes -= gone.map_or(0, |block| block.len());
        }
        Ok(block)
    }
}

fn read_block(index: &PageIndex, file: u32, offset: u64) -> Result<Vec<u8>, MemoryError> {
    let pages = index.open(file)?;
    let failed = |source| MemoryError::ReadPages {
        offset,
        bytes: BLOCK_BYTES as usize,
        source,
    };
    let left = pages.size().map_err(failed)?.saturating_sub(offset);
    let mut bytes = vec![0; BLOCK_BYTES.min(left) as usize];
    pages.read_exact_at(&mut bytes, offset).map_err(failed)?;
    Ok(bytes)
}
