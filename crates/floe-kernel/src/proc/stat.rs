//! `/proc/<pid>/stat`: state, parentage, sessions and the layout of the address space.

use super::text::{ParseError, decimal, signed};
use crate::ids::{HostPid, TaskAddr};

/// What a dump needs of `/proc/<pid>/stat` (proc_pid_stat(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The name, at most 15 bytes, any bytes.
    pub comm: Vec<u8>,
    /// `R`, `S`, `D`, `T`, `t`, `Z`, `X`, `I`.
    pub state: u8,
    pub ppid: HostPid,
    pub pgid: HostPid,
    pub sid: HostPid,
    /// Device number of the controlling terminal, 0 for none.
    pub tty: u32,
    /// Foreground group of that terminal; -1 for none.
    pub tty_group: i32,
    /// `PF_*` of the kernel.
    pub flags: u32,
    pub threads: u32,
    /// Clock ticks since boot.
    pub start_time: u64,
    pub start_code: TaskAddr,
    pub end_code: TaskAddr,
    pub start_stack: TaskAddr,
    pub start_data: TaskAddr,
    pub end_data: TaskAddr,
    pub start_brk: TaskAddr,
    pub arg_start: TaskAddr,
    pub arg_end: TaskAddr,
    pub env_start: TaskAddr,
    pub env_end: TaskAddr,
    /// As `waitpid` would report it; only of a zombie, or of one's own tracee.
    pub exit_code: u32,
}

/// Index of the first field after the name, `state`, in the man page's numbering.
const STATE_FIELD: usize = 3;

/// Reads one `stat` line.
pub fn parse_stat(text: &[u8]) -> Result<Stat, ParseError> {
    let bad = |field| ParseError::new("stat", field, text);
    let open = text
        .iter()
        .position(|&b| b == b'(')
        .ok_or_else(|| bad("comm"))?;
    // The name may hold `)` and blanks: the last `)` ends it, as all later fields are numbers.
    let close = text
        .iter()
        .rposition(|&b| b == b')')
        .ok_or_else(|| bad("comm"))?;
    let comm = text
        .get(open + 1..close)
        .ok_or_else(|| bad("comm"))?
        .to_vec();
    let rest: Vec<&[u8]> = text[close + 1..]
        .split(|b| b.is_ascii_whitespace())
        .filter(|word| !word.is_empty())
        .collect();
    let field = |number: usize, name| {
        rest.get(number - STATE_FIELD)
            .copied()
            .ok_or_else(|| bad(name))
    };
    let number =
        |n: usize, name| field(n, name).and_then(|text| decimal(text).ok_or_else(|| bad(name)));
    let pid = |n: usize, name| {
        let value = field(n, name).and_then(|text| signed(text).ok_or_else(|| bad(name)))?;
        i32::try_from(value).map(HostPid).map_err(|_| bad(name))
    };
    let short =
        |n: usize, name| number(n, name).and_then(|v| u32::try_from(v).map_err(|_| bad(name)));
    let addr = |n: usize, name| number(n, name).map(TaskAddr);
    Ok(Stat {
        comm,
        state: *field(3, "state")?.first().ok_or_else(|| bad("state"))?,
        ppid: pid(4, "ppid")?,
        pgid: pid(5, "pgrp")?,
        sid: pid(6, "session")?,
        tty: pid(7, "tty_nr")?.0.cast_unsigned(),
        tty_group: pid(8, "tpgid")?.0,
        flags: short(9, "flags")?,
        threads: short(20, "num_threads")?,
        start_time: number(22, "starttime")?,
        start_code: addr(26, "startcode")?,
        end_code: addr(27, "endcode")?,
        start_stack: addr(28, "startstack")?,
        start_data: addr(45, "start_data")?,
        end_data: addr(46, "end_data")?,
        start_brk: addr(47, "start_brk")?,
        arg_start: addr(48, "arg_start")?,
        arg_end: addr(49, "arg_end")?,
        env_start: addr(50, "env_start")?,
        env_end: addr(51, "env_end")?,
        exit_code: short(52, "exit_code")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(comm: &str) -> Vec<u8> {
        let tail = "S 1 5 6 34816 7 4194304 1 2 3 4 5 6 7 8 20 0 3 0 999 1000 10 \
                    18446744073709551615 4096 8192 140000 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0 \
                    12288 16384 20480 21 22 23 24 256\n";
        format!("42 ({comm}) {tail}").into_bytes()
    }

    #[test]
    fn fields_are_found_by_their_number() {
        let stat = parse_stat(&line("sh")).expect("well formed");
        assert_eq!(
            (stat.ppid, stat.pgid, stat.sid, stat.tty),
            (HostPid(1), HostPid(5), HostPid(6), 34816)
        );
        assert_eq!(
            (stat.flags, stat.threads, stat.start_time),
            (4194304, 3, 999)
        );
        assert_eq!(
            (stat.start_code, stat.end_code, stat.start_stack),
            (TaskAddr(4096), TaskAddr(8192), TaskAddr(140000))
        );
        assert_eq!(
            (stat.start_brk, stat.env_end, stat.exit_code),
            (TaskAddr(20480), TaskAddr(24), 256)
        );
    }

    #[test]
    fn a_name_full_of_parentheses_does_not_shift_fields() {
        for name in ["a) R 9 (b", ")", "((", "x\ny) Z"] {
            let stat = parse_stat(&line(name)).expect("well formed");
            assert_eq!(
                (stat.comm.as_slice(), stat.state, stat.ppid),
                (name.as_bytes(), b'S', HostPid(1))
            );
        }
    }

    #[test]
    fn every_truncation_is_an_error_or_the_whole() {
        let whole = line("sh");
        for end in 0..whole.len() - 4 {
            assert!(parse_stat(&whole[..end]).is_err(), "cut at {end}");
        }
    }
}
