//! Every kind of image file: its name, magic and entry, from `schema/files.tsv`.

use crate::schema::{MessageId, Schema};

/// First magic of an image since version 2 of the format.
pub const IMAGE_MAGIC: u32 = 0x5456_4319;
/// First magic of a service file (statistics, path cache).
pub const SERVICE_MAGIC: u32 = 0x5510_5940;
/// Id of `stats-dump`: [`ImageKind::Stats`] has two files.
pub const STATS_DUMP: u64 = 0;
/// Id of `stats-restore`.
pub const STATS_RESTORE: u64 = 1;

struct Row {
    kind: ImageKind,
    name: &'static str,
    pattern: &'static str,
    magic: u32,
    entry: &'static str,
    raw: bool,
}

include!(concat!(env!("OUT_DIR"), "/catalogue.rs"));

/// The bytes that follow each entry of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extra {
    /// Nothing.
    None,
    /// The first entry is a `pagemap_head`, every later one a `pagemap_entry`.
    PagemapTail,
    /// `unit` bytes for each count in the sum of these fields, padded to `pad` bytes.
    Counted {
        /// Numbers of the fields with the counts.
        fields: &'static [u32],
        /// Bytes a count.
        unit: u64,
        /// What the length is rounded up to.
        pad: u64,
    },
    /// A SysV segment: `size` bytes padded to 4, unless its pages are in a pagemap.
    SharedMemory,
    /// A SysV queue: `qnum` messages, each an entry of its own and padded bytes.
    MessageQueue,
    /// A deleted file's content: the rest of the file, or chunks of it.
    Ghost,
}

/// How a file name's number is written.
enum Number {
    None,
    Decimal,
    Hexadecimal,
}

/// Whether a file of this name is an image that a dump makes, compressed or not.
pub fn is_image_name(name: &str) -> bool {
    let plain = name.trim_end_matches(".zst").trim_end_matches(".lz4");
    let kind = ImageKind::of_file_name(plain).map(|(kind, _)| kind);
    // Another command makes that one, before the dump.
    plain.ends_with(".img") && kind.is_some_and(|kind| kind != ImageKind::Cpuinfo)
}

impl ImageKind {
    /// All kinds, in the order of the table.
    pub fn all() -> impl Iterator<Item = ImageKind> {
        ROWS.iter().map(|row| row.kind)
    }

    fn row(self) -> &'static Row {
        &ROWS[self as usize]
    }

    /// CRIU's name of the kind, such as `CORE`: what its JSON form calls `magic`.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The magic of this kind; 0 for a raw file.
    pub fn magic(self) -> u32 {
        self.row().magic
    }

    /// Whether the file has no header and no entries.
    pub fn is_raw(self) -> bool {
        self.row().raw
    }

    /// Whether this is a service file, which has a first magic of its own and no `.img` ending.
    pub fn is_service(self) -> bool {
        matches!(self, ImageKind::Stats | ImageKind::IrmapCache)
    }

    /// The first magic that a file of this kind has; `None` for the inventory and raw files.
    pub fn first_magic(self) -> Option<u32> {
        match self {
            ImageKind::Inventory => None,
            _ if self.is_raw() => None,
            _ if self.is_service() => Some(SERVICE_MAGIC),
            _ => Some(IMAGE_MAGIC),
        }
    }

    /// Name of the message in each entry (of the first entry for a pagemap); `None` for raw files.
    pub fn entry_name(self) -> Option<&'static str> {
        match self {
            // The table leaves these open.
            ImageKind::BinfmtMisc | ImageKind::BinfmtMiscOld => Some("binfmt_misc_entry"),
            ImageKind::Pidfd => Some("pidfd_entry"),
            ImageKind::Signal | ImageKind::Psignal => Some("siginfo_entry"),
            _ => Some(self.row().entry).filter(|entry| !entry.is_empty()),
        }
    }

    /// The message in each entry (of the first entry for a pagemap); `None` for raw files.
    pub fn entry(self) -> Option<MessageId> {
        Schema::get().message_id(self.entry_name()?)
    }

    /// What follows each entry.
    pub fn extra(self) -> Extra {
        match self {
            ImageKind::Pagemap | ImageKind::ShmemPagemap => Extra::PagemapTail,
            // pipe_data_entry.bytes, sk_packet_entry.length
            ImageKind::PipesData | ImageKind::FifoData | ImageKind::SkQueues => Extra::Counted {
                fields: &[2],
                unit: 1,
                pad: 1,
            },
            // tcp_stream_entry.inq_len and outq_len
            ImageKind::TcpStream => Extra::Counted {
                fields: &[1, 3],
                unit: 1,
                pad: 1,
            },
            // bpfmap_data_entry.keys_bytes and values_bytes
            ImageKind::BpfmapData => Extra::Counted {
                fields: &[2, 3],
                unit: 1,
                pad: 1,
            },
            // ipc_sem_entry.nsems
            ImageKind::IpcnsSem => Extra::Counted {
                fields: &[2],
                unit: 2,
                pad: 8,
            },
            ImageKind::IpcnsShm => Extra::SharedMemory,
            ImageKind::IpcnsMsg => Extra::MessageQueue,
            ImageKind::GhostFile => Extra::Ghost,
            _ => Extra::None,
        }
    }

    /// Whether the file's name carries a number.
    pub fn has_id(self) -> bool {
        self.row().pattern.contains('%') || self == ImageKind::Stats
    }

    /// The file name; `id` counts only where the name has a number (see [`STATS_DUMP`]).
    pub fn file_name(self, id: u64) -> String {
        if self == ImageKind::Stats {
            return if id == STATS_RESTORE {
                "stats-restore"
            } else {
                "stats-dump"
            }
            .to_string();
        }
        let (prefix, number, suffix) = self.pattern();
        let ending = if self.is_service() { "" } else { ".img" };
        match number {
            Number::None => format!("{prefix}{ending}"),
            Number::Decimal => format!("{prefix}{id}{suffix}{ending}"),
            Number::Hexadecimal => format!("{prefix}{id:x}{suffix}{ending}"),
        }
    }

    /// The kind and the number that a file name stands for; `None` when it is no image's.
    pub fn of_file_name(name: &str) -> Option<(ImageKind, Option<u64>)> {
        match name {
            "stats-dump" => return Some((ImageKind::Stats, Some(STATS_DUMP))),
            "stats-restore" => return Some((ImageKind::Stats, Some(STATS_RESTORE))),
            _ => {}
        }
        ImageKind::all().find_map(|kind| kind.number_in(name).map(|id| (kind, id)))
    }

    /// Name up to the number, how the number is written, and name after it.
    fn pattern(self) -> (&'static str, Number, &'static str) {
        let pattern = self.row().pattern;
        // The two service files say "(no .img)".
        let pattern = pattern.split(" (").next().unwrap_or(pattern);
        let Some((prefix, rest)) = pattern.split_once('%') else {
            return (pattern, Number::None, "");
        };
        let verb = rest.find(['u', 'd', 'x']).unwrap_or(0);
        let number = match rest.as_bytes().get(verb) {
            Some(b'x') => Number::Hexadecimal,
            _ => Number::Decimal,
        };
        (prefix, number, rest.get(verb + 1..).unwrap_or(""))
    }

    fn number_in(self, name: &str) -> Option<Option<u64>> {
        let (prefix, number, suffix) = self.pattern();
        let name = if self.is_service() {
            name
        } else {
            name.strip_suffix(".img")?
        };
        let middle = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
        let radix = match number {
            Number::None => return middle.is_empty().then_some(None),
            Number::Decimal => 10,
            Number::Hexadecimal => 16,
        };
        // `from_str_radix` alone would take "+1".
        if !middle.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let id = u64::from_str_radix(middle, radix).ok()?;
        Some(Some(id))
    }
}
