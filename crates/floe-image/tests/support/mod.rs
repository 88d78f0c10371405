//! Makes messages and images of every kind from the schema, the same ones in every run.
#![allow(dead_code)]

use floe_image::catalogue::Extra;
use floe_image::framing::entry_message;
use floe_image::schema::{FieldSchema, FieldType, Label, MessageId, Schema};
use floe_image::{ImageKind, wire};

/// Marsaglia's xorshift.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// A number of any magnitude.
    pub fn number(&mut self) -> u64 {
        let shift = self.below(64);
        self.next() >> shift
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }
}

pub fn put_varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

pub fn put_delimited(number: u32, body: &[u8], out: &mut Vec<u8>) {
    put_varint(u64::from(number) << 3 | 2, out);
    put_varint(body.len() as u64, out);
    out.extend(body);
}

/// Fields that say how many bytes or entries follow.
fn is_length(message: &str, field: &str) -> bool {
    matches!(
        field,
        "inq_len"
            | "outq_len"
            | "bytes"
            | "length"
            | "keys_bytes"
            | "values_bytes"
            | "nsems"
            | "qnum"
            | "msize"
            | "len"
    ) || (message, field) == ("ipc_shm_entry", "size")
}

/// A whole message with all its required fields and some of the others.
pub fn message(id: MessageId, random: &mut Random, depth: usize) -> Vec<u8> {
    let schema = Schema::get().message(id);
    let mut fields: Vec<&FieldSchema> = schema.fields.iter().collect();
    fields.sort_by_key(|field| field.number);
    let mut out = Vec::new();
    for field in fields {
        let count = match field.label {
            Label::Required => 1,
            _ if depth > 3 => 0,
            Label::Optional => random.below(2),
            Label::Repeated => random.below(4),
        };
        for _ in 0..count {
            if is_length(schema.name, field.name) {
                put_varint(u64::from(field.number) << 3, &mut out);
                put_varint(random.below(9) as u64, &mut out);
            } else {
                value(field, random, depth, &mut out);
            }
        }
    }
    out
}

fn value(field: &FieldSchema, random: &mut Random, depth: usize, out: &mut Vec<u8>) {
    let key = u64::from(field.number) << 3;
    let varint = match field.kind {
        FieldType::Message(inner) => {
            let body = message(inner, random, depth + 1);
            return put_delimited(field.number, &body, out);
        }
        FieldType::String => {
            let texts = [
                "",
                "a",
                "/usr/bin/\u{e9}",
                "quote \" and \\ and \n",
                "\u{1d11e}",
            ];
            let text = texts[random.below(texts.len())];
            return put_delimited(field.number, text.as_bytes(), out);
        }
        FieldType::Bytes => {
            let length = random.below(100);
            let bytes = random.bytes(length);
            return put_delimited(field.number, &bytes, out);
        }
        FieldType::Fixed32 => {
            put_varint(key | 5, out);
            return out.extend((random.number() as u32).to_le_bytes());
        }
        FieldType::Fixed64 => {
            put_varint(key | 1, out);
            return out.extend(random.number().to_le_bytes());
        }
        FieldType::Bool => random.next() & 1,
        FieldType::Uint32 | FieldType::Sint32 => u64::from(random.number() as u32),
        FieldType::Uint64 | FieldType::Int64 | FieldType::Sint64 => random.number(),
        FieldType::Int32 => i64::from(random.number() as i32) as u64,
        FieldType::Enum(id) => {
            let values = &Schema::get().enumeration(id).values;
            values[random.below(values.len())].1 as u64
        }
    };
    put_varint(key, out);
    put_varint(varint, out);
}

pub fn put_entry(body: &[u8], out: &mut Vec<u8>) {
    out.extend((body.len() as u32).to_le_bytes());
    out.extend(body);
}

pub fn named(name: &str) -> MessageId {
    Schema::get()
        .message_id(name)
        .expect("a name of the tables")
}

pub fn header(kind: ImageKind) -> Vec<u8> {
    let mut out = Vec::new();
    if let Some(magic) = kind.first_magic() {
        out.extend(magic.to_le_bytes());
    }
    out.extend(kind.magic().to_le_bytes());
    out
}

/// Every kind whose files have entries.
pub fn kinds() -> Vec<ImageKind> {
    ImageKind::all()
        .filter(|kind| !kind.is_raw() && kind.entry().is_some())
        .collect()
}

/// A whole image of a kind with up to `entries` entries and all that follows them.
pub fn image(kind: ImageKind, random: &mut Random, entries: usize) -> Vec<u8> {
    let mut out = header(kind);
    if kind.extra() == Extra::Ghost {
        return ghost(random, out);
    }
    for index in 0..entries {
        let body = message(
            entry_message(kind, index as u64).expect("entries"),
            random,
            0,
        );
        put_entry(&body, &mut out);
        let field = |number| wire::varint_field(&body, number).unwrap_or(0) as usize;
        match kind.extra() {
            Extra::None | Extra::PagemapTail | Extra::Ghost => {}
            Extra::Counted { fields, unit, pad } => {
                let count: usize = fields.iter().map(|number| field(*number)).sum();
                padded(count * unit as usize, pad as usize, random, &mut out);
            }
            Extra::SharedMemory if field(3) != 0 => {}
            Extra::SharedMemory => padded(field(2), 4, random, &mut out),
            Extra::MessageQueue => {
                for _ in 0..field(3) {
                    let body = message(named("ipc_msg"), random, 0);
                    put_entry(&body, &mut out);
                    let length = wire::varint_field(&body, 2).unwrap_or(0) as usize;
                    padded(length, 8, random, &mut out);
                }
            }
        }
    }
    out
}

fn padded(length: usize, pad: usize, random: &mut Random, out: &mut Vec<u8>) {
    out.extend(random.bytes(length));
    out.resize(out.len() + length.next_multiple_of(pad) - length, 0);
}

fn ghost(random: &mut Random, mut out: Vec<u8>) -> Vec<u8> {
    let body = message(named("ghost_file_entry"), random, 0);
    put_entry(&body, &mut out);
    if wire::varint_field(&body, 9).unwrap_or(0) == 0 {
        out.extend(random.bytes(50));
        return out;
    }
    for _ in 0..2 {
        let body = message(named("ghost_chunk_entry"), random, 0);
        put_entry(&body, &mut out);
        let length = wire::varint_field(&body, 1).unwrap_or(0) as usize;
        out.extend(random.bytes(length));
    }
    out
}
