//! The layout of an address space (`prctl(PR_SET_MM)`).
//!
//! Saved:    program, bounds of code, data, stack, arguments and environment, brk, auxiliary vector,
//!           mappings, dumpable, THP setting.
//! Rebuilt:  set at once with `PR_SET_MM_MAP`. Needs: the mappings.
//! Not kept: nothing.

use floe_image::messages::MmEntry;
use floe_kernel::proc::{ProcDir, Stat};
use rustix::fs::OFlags;

use super::attributes::TaskAttributeValues;
use crate::collect::{CollectError, Collector, PathFile};

/// The entry without its mappings and without what only the task can tell ([`complete`]).
pub fn collect_memory_map(
    proc: &ProcDir,
    stat: &Stat,
    collector: &mut Collector<'_>,
) -> Result<MmEntry, CollectError> {
    let program = PathFile::new(
        proc.pid(),
        "the program",
        proc.open_file("exe", OFlags::PATH)?,
    )?;
    let auxv = proc.read("auxv")?;
    Ok(MmEntry {
        mm_start_code: stat.start_code.0,
        mm_end_code: stat.end_code.0,
        mm_start_data: stat.start_data.0,
        mm_end_data: stat.end_data.0,
        mm_start_stack: stat.start_stack.0,
        mm_start_brk: stat.start_brk.0,
        mm_arg_start: stat.arg_start.0,
        mm_arg_end: stat.arg_end.0,
        mm_env_start: stat.env_start.0,
        mm_env_end: stat.env_end.0,
        exe_file_id: program.collect(collector)?.0,
        mm_saved_auxv: auxiliary_vector(&auxv),
        ..MmEntry::default()
    })
}

/// The pairs before the one that ends them: what is not set at restore is zero, and zero ends them.
fn auxiliary_vector(bytes: &[u8]) -> Vec<u64> {
    /// CRIU refuses more words than this.
    const MOST: usize = 44;
    let pairs = bytes
        .chunks_exact(16)
        .map(|pair| [super::word(pair, 0), super::word(pair, 8)]);
    pairs
        .take_while(|[key, _]| *key != 0)
        .take(MOST / 2)
        .flatten()
        .collect()
}

/// Fills in what only the task can tell.
pub fn complete(entry: &mut MmEntry, attributes: &TaskAttributeValues) {
    entry.mm_brk = attributes.brk;
    entry.dumpable = Some(attributes.dumpable);
    entry.thp_disabled = Some(attributes.thp_disabled);
}
