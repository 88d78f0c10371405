//! How a number is shown for people: `schema/presentation.tsv` and the names behind it.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::OnceLock;

use serde_json::Value;

use crate::schema::{FieldSchema, MessageId, Schema};

/// How a field is shown in the pretty style, and may be written in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// As a number.
    Plain,
    /// In hex, and so all numbers of a message field.
    Hex,
    /// `major:minor` with 20 bits for the minor, as the kernel keeps devices.
    Device,
    /// `major:minor` as `stat(2)` gives devices.
    OldDevice,
    /// Words that make up an IP address in network order.
    Address,
    /// Bits by name.
    Flags(&'static [(&'static str, u64)]),
    /// One of some numbers by name.
    Names(&'static [(&'static str, u64)]),
    /// Bytes as quoted-printable text.
    Quoted,
}

/// Bits of a device's minor number in the kernel's own form.
const MINOR_BITS: u32 = 20;

const PROTECTIONS: &[(&str, u64)] = &[("PROT_READ", 1), ("PROT_WRITE", 2), ("PROT_EXEC", 4)];
const MAP_FLAGS: &[(&str, u64)] = &[
    ("MAP_SHARED", 0x1),
    ("MAP_PRIVATE", 0x2),
    ("MAP_DROPPABLE", 0x8),
    ("MAP_ANON", 0x20),
    ("MAP_GROWSDOWN", 0x100),
];
const MAPPING_STATUS: &[(&str, u64)] = &[
    ("VMA_AREA_NONE", 0),
    ("VMA_AREA_REGULAR", 1),
    ("VMA_AREA_STACK", 1 << 1),
    ("VMA_AREA_VSYSCALL", 1 << 2),
    ("VMA_AREA_VDSO", 1 << 3),
    ("VMA_AREA_HEAP", 1 << 5),
    ("VMA_FILE_PRIVATE", 1 << 6),
    ("VMA_FILE_SHARED", 1 << 7),
    ("VMA_ANON_SHARED", 1 << 8),
    ("VMA_ANON_PRIVATE", 1 << 9),
    ("VMA_AREA_SYSVIPC", 1 << 10),
    ("VMA_AREA_SOCKET", 1 << 11),
    ("VMA_AREA_VVAR", 1 << 12),
    ("VMA_AREA_AIORING", 1 << 13),
    ("VMA_AREA_MEMFD", 1 << 14),
    ("VMA_AREA_SHSTK", 1 << 15),
    ("VMA_AREA_UPROBES", 1 << 17),
    ("VMA_UNSUPP", 1 << 31),
];
const OPEN_FLAGS: &[(&str, u64)] = &[
    ("O_WRONLY", 0o1),
    ("O_RDWR", 0o2),
    ("O_CREAT", 0o100),
    ("O_EXCL", 0o200),
    ("O_NOCTTY", 0o400),
    ("O_TRUNC", 0o1000),
    ("O_APPEND", 0o2000),
    ("O_NONBLOCK", 0o4000),
    ("O_DSYNC", 0o10000),
    ("FASYNC", 0o20000),
    ("O_DIRECT", 0o40000),
    ("O_LARGEFILE", 0o100_000),
    ("O_DIRECTORY", 0o200_000),
    ("O_NOFOLLOW", 0o400_000),
    ("O_NOATIME", 0o1_000_000),
    ("O_CLOEXEC", 0o2_000_000),
];
const SEALS: &[(&str, u64)] = &[
    ("F_SEAL_SEAL", 0x1),
    ("F_SEAL_SHRINK", 0x2),
    ("F_SEAL_GROW", 0x4),
    ("F_SEAL_WRITE", 0x8),
    ("F_SEAL_FUTURE_WRITE", 0x10),
];
const PAGE_FLAGS: &[(&str, u64)] = &[("PE_PARENT", 1), ("PE_LAZY", 2), ("PE_PRESENT", 4)];
const TASK_STATES: &[(&str, u64)] = &[("Alive", 1), ("Zombie", 3), ("Stopped", 6)];
const FAMILIES: &[(&str, u64)] = &[
    ("UNIX", 1),
    ("INET", 2),
    ("INET6", 10),
    ("NETLINK", 16),
    ("PACKET", 17),
];
const SOCKET_TYPES: &[(&str, u64)] = &[
    ("STREAM", 1),
    ("DGRAM", 2),
    ("RAW", 3),
    ("SEQPACKET", 5),
    ("PACKET", 10),
];
const SOCKET_STATES: &[(&str, u64)] = &[
    ("ESTABLISHED", 1),
    ("SYN_SENT", 2),
    ("SYN_RECV", 3),
    ("FIN_WAIT1", 4),
    ("FIN_WAIT2", 5),
    ("TIME_WAIT", 6),
    ("CLOSE", 7),
    ("CLOSE_WAIT", 8),
    ("LAST_ACK", 9),
    ("LISTEN", 10),
];
const PROTOCOLS: &[(&str, u64)] = &[("IP", 0), ("TCP", 6), ("UDP", 17), ("UDPLITE", 136)];

fn parse_shown(text: &str) -> Shown {
    match text {
        "hex" => Shown::Hex,
        "device" => Shown::Device,
        "old-device" => Shown::OldDevice,
        "address" => Shown::Address,
        "quoted" => Shown::Quoted,
        "flags:mmap.prot" => Shown::Flags(PROTECTIONS),
        "flags:mmap.flags" => Shown::Flags(MAP_FLAGS),
        "flags:mmap.status" => Shown::Flags(MAPPING_STATUS),
        "flags:rfile.flags" => Shown::Flags(OPEN_FLAGS),
        "flags:seals.flags" => Shown::Flags(SEALS),
        "flags:pmap.flags" => Shown::Flags(PAGE_FLAGS),
        "names:task_state" => Shown::Names(TASK_STATES),
        "names:family" => Shown::Names(FAMILIES),
        "names:type" => Shown::Names(SOCKET_TYPES),
        "names:state" => Shown::Names(SOCKET_STATES),
        "names:proto" => Shown::Names(PROTOCOLS),
        _ => Shown::Plain,
    }
}

/// How this field is shown.
pub fn shown(message: MessageId, field: &FieldSchema) -> Shown {
    static TABLE: OnceLock<Vec<Vec<(u32, Shown)>>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let schema = Schema::get();
        let mut table = vec![Vec::new(); schema.messages().count()];
        for line in include_str!("../../schema/presentation.tsv")
            .lines()
            .skip(1)
        {
            let mut columns = line.split('\t');
            let (Some(message), Some(name), Some(text)) =
                (columns.next(), columns.next(), columns.next())
            else {
                continue;
            };
            let Some(id) = schema.message_id(message) else {
                continue;
            };
            if let Some(field) = schema.message(id).field_named(name) {
                table[usize::from(id.0)].push((field.number, parse_shown(text)));
            }
        }
        table
    });
    let fields = &table[usize::from(message.0)];
    let found = fields.iter().find(|(number, _)| *number == field.number);
    found.map_or(Shown::Plain, |(_, shown)| *shown)
}

/// A number in its pretty form.
pub fn show_number(shown: Shown, number: i128) -> Value {
    let bits = number as u64;
    match shown {
        Shown::Hex if number < 0 => Value::String(format!("-{:#x}", -number)),
        Shown::Hex => Value::String(format!("{number:#x}")),
        Shown::Device => Value::String(format!(
            "{}:{}",
            bits >> MINOR_BITS,
            bits & ((1 << MINOR_BITS) - 1)
        )),
        Shown::OldDevice => Value::String(format!(
            "{}:{}",
            (bits >> 8) & 0xfff | (bits >> 32) & !0xfff,
            bits & 0xff | (bits >> 12) & !0xff
        )),
        Shown::Flags(names) => Value::String(show_flags(bits, names)),
        Shown::Names(names) => match names.iter().find(|(_, value)| i128::from(*value) == number) {
            Some((name, _)) => Value::String((*name).to_string()),
            None => plain_number(number),
        },
        Shown::Plain | Shown::Address | Shown::Quoted => plain_number(number),
    }
}

/// A number as JSON has it.
pub fn plain_number(number: i128) -> Value {
    match u64::try_from(number) {
        Ok(number) => number.into(),
        Err(_) => (number as i64).into(),
    }
}

fn show_flags(mut bits: u64, names: &[(&str, u64)]) -> String {
    let mut parts: Vec<String> = names
        .iter()
        .filter(|(_, bit)| bits & bit != 0)
        .map(|(name, _)| (*name).to_string())
        .collect();
    bits &= !names.iter().fold(0, |all, (_, bit)| all | bit);
    if bits != 0 {
        parts.push(format!("{bits:#x}"));
    }
    parts.join(" | ")
}

/// The number that a text stands for, in its pretty form or any base; `None` if it is no number.
pub fn read_number(shown: Shown, text: &str) -> Option<i128> {
    match shown {
        Shown::Device => {
            let (major, minor) = read_device(text)?;
            Some(i128::from(
                u64::from(major) << MINOR_BITS | u64::from(minor),
            ))
        }
        Shown::OldDevice => {
            let (major, minor) =
                read_device(text).map(|(major, minor)| (u64::from(major), u64::from(minor)))?;
            let bits = (minor & 0xff)
                | (major & 0xfff) << 8
                | (minor & !0xff) << 12
                | (major & !0xfff) << 32;
            Some(bits.into())
        }
        Shown::Flags(_) if text.is_empty() => Some(0),
        Shown::Flags(names) => {
            let mut bits = 0;
            for part in text.split('|').map(str::trim) {
                let known = names.iter().find(|(name, _)| *name == part);
                bits |= match known {
                    Some((_, bit)) => i128::from(*bit),
                    None => read_integer(part)?,
                };
            }
            Some(bits)
        }
        Shown::Names(names) => match names.iter().find(|(name, _)| *name == text) {
            Some((_, value)) => Some((*value).into()),
            None => read_integer(text),
        },
        Shown::Plain | Shown::Hex | Shown::Address | Shown::Quoted => read_integer(text),
    }
}

fn read_device(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.trim().parse().ok()?, minor.trim().parse().ok()?))
}

/// A decimal, `0x`, `0o` or `0b` number with an optional sign.
fn read_integer(text: &str) -> Option<i128> {
    let text = text.trim();
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let (radix, digits) = match digits.get(..2) {
        Some("0x" | "0X") => (16, &digits[2..]),
        Some("0o" | "0O") => (8, &digits[2..]),
        Some("0b" | "0B") => (2, &digits[2..]),
        _ => (10, digits),
    };
    // A second sign is no number; more than 64 bits are out of every field's range.
    let number =
        Some(digits).filter(|digits| digits.starts_with(|c: char| c.is_ascii_hexdigit()))?;
    u64::from_str_radix(number, radix)
        .ok()
        .map(|number| sign * i128::from(number))
}

/// An IP address of one or four words in network order; `None` for any other number of words.
pub fn show_address(words: &[u32]) -> Option<String> {
    match words {
        [word] => Some(Ipv4Addr::from(word.to_le_bytes()).to_string()),
        [_, _, _, _] => {
            let mut bytes = [0; 16];
            for (place, word) in words.iter().enumerate() {
                bytes[4 * place..4 * place + 4].copy_from_slice(&word.to_le_bytes());
            }
            Some(Ipv6Addr::from(bytes).to_string())
        }
        _ => None,
    }
}

/// The words of an IP address in network order; `None` when the text is none.
pub fn read_address(text: &str) -> Option<Vec<u32>> {
    if let Ok(address) = text.parse::<Ipv4Addr>() {
        return Some(vec![u32::from_le_bytes(address.octets())]);
    }
    let octets = text.parse::<Ipv6Addr>().ok()?.octets();
    let words = octets.as_chunks::<4>().0.iter();
    Some(words.map(|word| u32::from_le_bytes(*word)).collect())
}
