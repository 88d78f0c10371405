//! `/proc/<pid>/maps` and `smaps`: the mappings of an address space.

use std::collections::{BTreeSet, HashMap};

use super::text::{ParseError, decimal, hex, unescape, words};
use crate::ids::{PAGE_SIZE, TaskAddr};

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub start: TaskAddr,
    pub end: TaskAddr,
    pub read: bool,
    pub write: bool,
    pub exec: bool,
    pub shared: bool,
    /// Byte offset in the mapped file.
    pub offset: u64,
    pub dev_major: u32,
    pub dev_minor: u32,
    pub inode: u64,
    /// Path or the kernel's name in brackets; empty for plain anonymous memory. ` (deleted)` is the
    /// kernel's, or part of the name: `map_files` tells.
    pub name: Vec<u8>,
    /// All clear unless the text is that of `smaps`.
    pub flags: VmFlags,
}

impl Mapping {
    /// Length in bytes.
    pub fn byte_len(&self) -> u64 {
        self.end.0 - self.start.0
    }

    /// The file's name in `/proc/<pid>/map_files`.
    pub fn map_files_name(&self) -> String {
        format!("{:x}-{:x}", self.start.0, self.end.0)
    }
}

/// The two-letter codes of `VmFlags:` in `smaps` (proc_pid_smaps(5)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmFlags {
    pub grows_down: bool,
    pub locked: bool,
    pub no_reserve: bool,
    pub hugetlb: bool,
    pub droppable: bool,
    pub io: bool,
    pub pfn_map: bool,
    pub shadow_stack: bool,
    pub sequential: bool,
    pub random: bool,
    pub dont_fork: bool,
    pub dont_dump: bool,
    pub mergeable: bool,
    pub huge_page: bool,
    pub no_huge_page: bool,
    pub wipe_on_fork: bool,
    pub uffd_missing: bool,
    pub uffd_wp: bool,
    pub uffd_minor: bool,
    /// `MADV_GUARD_INSTALL` was used here (Linux 6.17+ prints it).
    pub may_have_guards: bool,
}

impl VmFlags {
    /// Notes a code; those that nobody asks for are left out.
    pub(crate) fn set(&mut self, code: &[u8]) {
        match code {
            b"gd" => self.grows_down = true,
            b"lo" => self.locked = true,
            b"nr" => self.no_reserve = true,
            b"ht" => self.hugetlb = true,
            b"dp" => self.droppable = true,
            b"io" => self.io = true,
            b"pf" => self.pfn_map = true,
            b"ss" => self.shadow_stack = true,
            b"sr" => self.sequential = true,
            b"rr" => self.random = true,
            b"dc" => self.dont_fork = true,
            b"dd" => self.dont_dump = true,
            b"mg" => self.mergeable = true,
            b"hg" => self.huge_page = true,
            b"nh" => self.no_huge_page = true,
            b"wf" => self.wipe_on_fork = true,
            b"um" => self.uffd_missing = true,
            b"uw" => self.uffd_wp = true,
            b"ui" => self.uffd_minor = true,
            b"gu" => self.may_have_guards = true,
            _ => {}
        }
    }
}

/// Reads `maps`, or `smaps` with the flags of each mapping.
pub fn parse_maps(text: &[u8]) -> Result<Vec<Mapping>, ParseError> {
    let mut all: Vec<Mapping> = Vec::new();
    for line in text.split(|&b| b == b'\n').filter(|line| !line.is_empty()) {
        if let Some(codes) = line.strip_prefix(b"VmFlags:") {
            let last = all
                .last_mut()
                .ok_or_else(|| ParseError::new("smaps", "first mapping", line))?;
            words(codes).for_each(|code| last.flags.set(code));
        } else if line[0].is_ascii_uppercase() {
            // Counters of smaps start with a capital, mappings with a lower-case hexadecimal digit.
            continue;
        } else {
            let mapping =
                parse_line(line).ok_or_else(|| ParseError::new("maps", "mapping", line))?;
            if all.last().is_some_and(|last| last.end > mapping.start) {
                return Err(ParseError::new("maps", "order of mappings", line));
            }
            all.push(mapping);
        }
    }
    Ok(all)
}

/// The codes of mappings, by their ranges.
type CodesOfMappings = HashMap<(TaskAddr, TaskAddr), BTreeSet<[u8; 2]>>;

/// Reads the codes of each mapping in `smaps`.
pub(crate) fn parse_vm_flags(text: &[u8]) -> Result<CodesOfMappings, ParseError> {
    let mut all = HashMap::new();
    let mut range = None;
    for line in text.split(|&b| b == b'\n').filter(|line| !line.is_empty()) {
        if let Some(codes) = line.strip_prefix(b"VmFlags:") {
            let range = range.ok_or_else(|| ParseError::new("smaps", "first mapping", line))?;
            let codes = words(codes).filter_map(|code| code.try_into().ok());
            all.insert(range, codes.collect());
        } else if !line[0].is_ascii_uppercase() {
            let mapping =
                parse_line(line).ok_or_else(|| ParseError::new("smaps", "mapping", line))?;
            range = Some((mapping.start, mapping.end));
        }
    }
    Ok(all)
}

fn parse_line(line: &[u8]) -> Option<Mapping> {
    // Five fields with one blank between them, then blanks, then the name, which may hold blanks.
    let mut parts = line.splitn(6, |&b| b == b' ');
    let range = parts.next()?;
    let dash = range.iter().position(|&b| b == b'-')?;
    let (start, end) = (hex(&range[..dash])?, hex(&range[dash + 1..])?);
    let perms = parts.next().filter(|perms| perms.len() == 4)?;
    let offset = hex(parts.next()?)?;
    let dev = parts.next()?;
    let colon = dev.iter().position(|&b| b == b':')?;
    let inode = decimal(parts.next()?)?;
    let name = parts.next().unwrap_or(b"").trim_ascii_start();
    if start >= end || start % PAGE_SIZE != 0 || end % PAGE_SIZE != 0 {
        return None;
    }
    Some(Mapping {
        start: TaskAddr(start),
        end: TaskAddr(end),
        read: perms[0] == b'r',
        write: perms[1] == b'w',
        exec: perms[2] == b'x',
        shared: perms[3] == b's',
        offset,
        dev_major: u32::try_from(hex(&dev[..colon])?).ok()?,
        dev_minor: u32::try_from(hex(&dev[colon + 1..])?).ok()?,
        inode,
        // Only line feeds are escaped here (seq_file_path with "\n").
        name: if name.contains(&b'\\') {
            unescape_line_feeds(name)
        } else {
            name.to_vec()
        },
        flags: VmFlags::default(),
    })
}

fn unescape_line_feeds(name: &[u8]) -> Vec<u8> {
    // A literal `\012` in a name looks the same; the kernel gives no way to tell. `map_files` does.
    unescape(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &[u8] = b"00400000-00401000 r--p 00000000 fe:00 131 /bin/with blank (deleted)\n\
        Size:                  4 kB\nTHPeligible:    0\nVmFlags: rd mr mw me sd \n\
        7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]\n\
        Rss: 8 kB\nVmFlags: rd wr mr mw me gd ac dd lo\n";

    #[test]
    fn smaps_carries_names_with_blanks_and_flags() {
        let maps = parse_maps(SMAPS).expect("well formed");
        assert_eq!(maps.len(), 2);
        assert_eq!(
            (maps[0].name.as_slice(), maps[0].inode, maps[0].dev_major),
            (&b"/bin/with blank (deleted)"[..], 131, 0xfe)
        );
        assert!(
            maps[0].read
                && !maps[0].write
                && !maps[0].shared
                && maps[0].flags == VmFlags::default()
        );
        assert!(maps[1].flags.grows_down && maps[1].flags.locked && maps[1].flags.dont_dump);
        assert_eq!(
            (maps[1].name.as_slice(), maps[1].byte_len()),
            (&b"[stack]"[..], 0x21000)
        );
    }

    #[test]
    fn plain_maps_has_anonymous_lines_without_a_name() {
        let maps =
            parse_maps(b"7f0000000000-7f0000001000 ---s 00001000 00:01 5 \n").expect("well formed");
        assert!(maps[0].name.is_empty() && maps[0].shared && maps[0].offset == 4096);
    }

    #[test]
    fn nonsense_is_an_error() {
        for text in [
            &b"1000-0000 r--p 0 0:0 0"[..],
            b"1000-2001 r--p 0 0:0 0",
            b"zz-1000 r--p 0 0:0 0",
            b"1000-2000 r-p 0 0:0 0",
            b"1000-2000 r--p 0 00 0",
            b"VmFlags: rd\n",
            b"1000-3000 r--p 0 0:0 0\n2000-4000 r--p 0 0:0 0\n",
        ] {
            assert!(
                parse_maps(text).is_err(),
                "{}",
                String::from_utf8_lossy(text)
            );
        }
    }
}
