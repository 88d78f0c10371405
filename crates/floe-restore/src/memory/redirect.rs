//! A vDSO of another kernel, whose functions jump to those of the running one.
//!
//! The program has pointers into the old code, so it stays where it was. Its data mappings become zeros,
//! which say "no clock can be read here": a thread that was stopped inside the old code goes on to the
//! system call.

use std::collections::BTreeMap;

/// `movabs rax, address; jmp rax`. No function takes an argument in rax, nor must it keep it.
const JUMP_BYTES: usize = 12;
/// `struct Elf64_Sym`.
const SYMBOL_BYTES: usize = 24;
/// More symbols than any vDSO has.
const MAX_SYMBOLS: usize = 4096;

/// The functions of an image by name: offset of each.
fn functions(elf: &[u8]) -> Option<BTreeMap<&[u8], usize>> {
    const PT_DYNAMIC: u32 = 2;
    const DT_STRTAB: u64 = 5;
    const DT_SYMTAB: u64 = 6;
    const STT_FUNC: u8 = 2;
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let headers = word(elf, 32)? as usize;
    let (size, count) = (half(elf, 54)?, half(elf, 56)?);
    let dynamic = (0..usize::from(count))
        .map(|index| headers.saturating_add(index * usize::from(size)))
        .find(|&at| elf.get(at..).and_then(|rest| int(rest, 0)) == Some(PT_DYNAMIC))?;
    let table = elf.get(word(elf, dynamic.checked_add(8)?)? as usize..)?;
    let entry = |tag| {
        table
            .chunks_exact(16)
            .take_while(|entry| word(entry, 0) != Some(0))
            .find(|entry| word(entry, 0) == Some(tag))
            .and_then(|entry| word(entry, 8))
    };
    let (symbols, strings) = (entry(DT_SYMTAB)? as usize, entry(DT_STRTAB)? as usize);
    // The linker puts the strings behind the symbols.
    let count = (strings.checked_sub(symbols)? / SYMBOL_BYTES).min(MAX_SYMBOLS);
    let mut found = BTreeMap::new();
    for index in 1..count {
        let symbol = elf.get(symbols + index * SYMBOL_BYTES..)?;
        let value = word(symbol, 8)? as usize;
        if symbol.get(4)? & 15 == STT_FUNC && half(symbol, 6)? != 0 && value < elf.len() {
            let name = elf.get(strings.checked_add(int(symbol, 0)? as usize)?..)?;
            found.insert(name.split(|&byte| byte == 0).next()?, value);
        }
    }
    (!found.is_empty()).then_some(found)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_le_bytes(bytes.try_into().ok()?))
}

fn int(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

/// The code of `old` with jumps to the functions of `current`, which lies at `base`; or why not.
pub(super) fn redirected(old: &[u8], current: &[u8], base: u64) -> Result<Vec<u8>, &'static str> {
    let theirs = functions(old).ok_or("the saved one cannot be read")?;
    let ours = functions(current).ok_or("the running kernel's cannot be read")?;
    let mut starts: Vec<usize> = theirs.values().copied().collect();
    starts.sort_unstable();
    let mut code = old.to_vec();
    for (name, start) in &theirs {
        let next = starts[starts.partition_point(|other| other <= start)..].first();
        let room = next.copied().unwrap_or(code.len()) - start;
        // Without its zeroed data an old function ends in the system call by itself.
        let Some(target) = ours.get(name) else {
            continue;
        };
        if room < JUMP_BYTES {
            return Err("a function in it is too short for a jump");
        }
        let jump = &mut code[*start..start + JUMP_BYTES];
        jump[..2].copy_from_slice(&[0x48, 0xb8]);
        jump[2..10].copy_from_slice(&(base + *target as u64).to_le_bytes());
        jump[10..].copy_from_slice(&[0xff, 0xe0]);
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::HostMemory;

    #[test]
    fn every_function_of_the_running_vdso_is_found_and_redirected() {
        let host = HostMemory::probe().expect("our own maps");
        let code = host.vdso.code();
        let found = functions(code).expect("a vDSO is an ELF image");
        assert!(found.contains_key(b"__vdso_clock_gettime".as_slice()));
        let moved = redirected(code, code, 0x1000).expect("room for jumps");
        for (name, at) in found {
            let name = String::from_utf8_lossy(name);
            assert_eq!(moved[at..at + 2], [0x48, 0xb8], "{name}");
            assert_eq!(word(&moved, at + 2), Some(0x1000 + at as u64), "{name}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let host = HostMemory::probe().expect("our own maps");
        let code = host.vdso.code();
        for len in (0..code.len()).step_by(7) {
            let _ = functions(&code[..len]);
        }
        assert!(redirected(b"no ELF image", code, 0).is_err());
    }
}
