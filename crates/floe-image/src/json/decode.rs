//! Image to JSON.

use std::io::{Read, Seek};

use serde_json::{Map, Value};

use super::present::{self, Shown};
use super::{EXTRA, JsonOptions, PADDING, Payload, Style, UNKNOWN_FIELDS, text};
use crate::catalogue::{Extra, ImageKind};
use crate::error::ImageError;
use crate::framing::{self, EntryPlace, ImageReader};
use crate::schema::{FieldType, Label, MessageId, Schema};
use crate::wire::{self, WireReader, WireValue};

/// `ghost_file_entry.chunks`
const GHOST_CHUNKS: u32 = 9;
/// `ghost_chunk_entry.len`
const CHUNK_LENGTH: u32 = 1;
/// `ipc_msg_entry.qnum`
const QUEUE_LENGTH: u32 = 3;
/// `ipc_msg.msize`
const MESSAGE_SIZE: u32 = 2;

/// What an image file holds, in short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// Its kind.
    pub kind: ImageKind,
    /// Number of its entries (the head of a pagemap does not count).
    pub count: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// An opened image as JSON: `{"magic": "CORE", "entries": [...]}`.
pub fn decode_image<R: Read + Seek>(
    mut reader: ImageReader<R>,
    options: JsonOptions,
) -> Result<Value, ImageError> {
    let mut entries = Vec::new();
    while let Some((entry, _)) = decode_entry(&mut reader, &entries, options)? {
        entries.push(entry);
    }
    let mut image = Map::new();
    image.insert("magic".to_string(), reader.kind().name().into());
    image.insert("entries".to_string(), entries.into());
    Ok(image.into())
}

/// Magic, entries and size of an opened image. Entries are framed but not decoded.
pub fn info<R: Read + Seek>(mut reader: ImageReader<R>) -> Result<ImageInfo, ImageError> {
    let (kind, size) = (reader.kind(), reader.offset() + reader.left());
    let mut count = 0u64;
    let mut chunks = false;
    while let Some((place, bytes)) = reader.next_entry()? {
        let field = |number| wire::varint_field(bytes, number).unwrap_or(0);
        match (kind.extra(), place.index) {
            (Extra::Ghost, 0) => {
                chunks = field(GHOST_CHUNKS) != 0;
                if !chunks {
                    let left = reader.left();
                    reader.skip("the deleted file", left)?;
                }
            }
            (Extra::Ghost, _) => {
                let length = field(CHUNK_LENGTH);
                reader.skip("a chunk of the deleted file", length)?;
            }
            (Extra::MessageQueue, _) => {
                for _ in 0..field(QUEUE_LENGTH) {
                    let Some((_, message)) = reader.next_entry()? else {
                        return Err(no_message(&reader));
                    };
                    let length = wire::varint_field(message, MESSAGE_SIZE).unwrap_or(0);
                    reader.skip("a message", padded(length, 8))?;
                }
            }
            _ => {
                let (_, length) = reader.extra_length();
                reader.skip("an entry's data", length)?;
            }
        }
        count += 1;
    }
    if kind.extra() == Extra::PagemapTail || chunks {
        count = count.saturating_sub(1);
    }
    Ok(ImageInfo { kind, count, size })
}

fn padded(length: u64, pad: u64) -> u64 {
    length.checked_next_multiple_of(pad).unwrap_or(u64::MAX)
}

/// The next entry with all that follows it; `done` are the entries before it.
fn decode_entry<R: Read + Seek>(
    reader: &mut ImageReader<R>,
    done: &[Value],
    options: JsonOptions,
) -> Result<Option<(Value, EntryPlace)>, ImageError> {
    let kind = reader.kind();
    // A ghost's later entries are its chunks.
    let is_chunk = kind.extra() == Extra::Ghost && !done.is_empty();
    let id = match is_chunk {
        true => Schema::get().message_id("ghost_chunk_entry"),
        false => framing::entry_message(kind, done.len() as u64),
    };
    let id = id.expect("every kind with a magic has an entry message");
    let Some((place, bytes)) = reader.next_entry()? else {
        return Ok(None);
    };
    let chunked = wire::varint_field(bytes, GHOST_CHUNKS).unwrap_or(0) != 0;
    let chunk_length = wire::varint_field(bytes, CHUNK_LENGTH).unwrap_or(0);
    let queue_length = wire::varint_field(bytes, QUEUE_LENGTH).unwrap_or(0);
    let mut entry = match decode_message(id, bytes, options.style) {
        Ok(entry) => entry,
        Err(source) => return Err(reader.entry_error(place, source.into())),
    };
    match kind.extra() {
        Extra::None | Extra::PagemapTail => {}
        Extra::Ghost if is_chunk => ghost_data(reader, &mut entry, chunk_length, options)?,
        Extra::Ghost if chunked => {}
        Extra::Ghost => {
            let length = reader.left();
            ghost_data(reader, &mut entry, length, options)?;
        }
        Extra::MessageQueue => {
            let messages = decode_queue(reader, queue_length, options)?;
            entry.insert(EXTRA.to_string(), messages);
        }
        Extra::Counted { .. } | Extra::SharedMemory => decode_extra(reader, &mut entry, options)?,
    }
    Ok(Some((entry.into(), place)))
}

fn ghost_data<R: Read + Seek>(
    reader: &mut ImageReader<R>,
    entry: &mut Map<String, Value>,
    length: u64,
    options: JsonOptions,
) -> Result<(), ImageError> {
    match options.payload {
        Payload::Omit => reader.skip("the deleted file", length),
        Payload::Keep => {
            let data = reader.read_payload(length)?;
            entry.insert(EXTRA.to_string(), text::to_base64(&data).into());
            Ok(())
        }
    }
}

fn decode_extra<R: Read + Seek>(
    reader: &mut ImageReader<R>,
    entry: &mut Map<String, Value>,
    options: JsonOptions,
) -> Result<(), ImageError> {
    let (size, padded) = reader.extra_length();
    if options.payload == Payload::Omit {
        reader.skip("an entry's data", padded)?;
        entry.insert(EXTRA.to_string(), omitted(size));
        return Ok(());
    }
    let receive_queue = entry.get("inq_len").and_then(Value::as_u64);
    let data = reader.read_payload(size)?;
    let extra = match reader.kind() {
        ImageKind::TcpStream => {
            let middle = receive_queue.and_then(|length| usize::try_from(length).ok());
            let (receive, send) = data.split_at(middle.unwrap_or(0).min(data.len()));
            let mut queues = Map::new();
            queues.insert("inq".to_string(), text::to_base64(receive).into());
            queues.insert("outq".to_string(), text::to_base64(send).into());
            queues.into()
        }
        ImageKind::IpcnsSem => {
            let values = data.as_chunks::<2>().0.iter();
            values
                .map(|value| Value::from(u16::from_le_bytes(*value)))
                .collect()
        }
        _ => Value::from(text::to_base64(&data)),
    };
    entry.insert(EXTRA.to_string(), extra);
    let padding = reader.read_payload(padded - size)?;
    keep_padding(entry, &padding);
    Ok(())
}

fn keep_padding(entry: &mut Map<String, Value>, padding: &[u8]) {
    if padding.iter().any(|byte| *byte != 0) {
        entry.insert(PADDING.to_string(), text::to_base64(padding).into());
    }
}

fn no_message<R: Read + Seek>(reader: &ImageReader<R>) -> ImageError {
    let path = reader.path().to_path_buf();
    ImageError::Empty {
        path,
        expected: "ipc_msg",
    }
}

/// The messages of a queue, each as its entry and then its text.
fn decode_queue<R: Read + Seek>(
    reader: &mut ImageReader<R>,
    length: u64,
    options: JsonOptions,
) -> Result<Value, ImageError> {
    let id = Schema::get()
        .message_id("ipc_msg")
        .expect("the tables have it");
    let mut messages = Vec::new();
    let mut total = 0u64;
    for _ in 0..length {
        let Some((place, bytes)) = reader.next_entry()? else {
            return Err(no_message(reader));
        };
        let size = wire::varint_field(bytes, MESSAGE_SIZE).unwrap_or(0);
        total = total
            .saturating_add(size)
            .saturating_add(bytes.len() as u64);
        let mut message = match decode_message(id, bytes, Style::Plain) {
            Ok(message) => message,
            Err(source) => return Err(reader.entry_error(place, source.into())),
        };
        if options.payload == Payload::Omit {
            reader.skip("a message", padded(size, 8))?;
            continue;
        }
        let data = reader.read_payload(size)?;
        let padding = reader.read_payload(padded(size, 8) - size)?;
        keep_padding(&mut message, &padding);
        messages.push(message.into());
        messages.push(Value::from(text::to_base64(&data)));
    }
    if options.payload == Payload::Omit {
        return Ok(omitted(total));
    }
    Ok(messages.into())
}

/// `... <12KB>`
fn omitted(size: u64) -> Value {
    let mut number = size as f64;
    let mut units = ["", "K", "M", "G", "T", "P"].into_iter();
    let mut unit = units.next().unwrap_or("");
    for larger in units {
        if number < 1024.0 {
            break;
        }
        number /= 1024.0;
        unit = larger;
    }
    let digits = if number.fract() == 0.0 { 0 } else { 1 };
    format!("... <{number:.digits$}{unit}B>").into()
}

/// One message, checked against the schema first.
fn decode_message(
    id: MessageId,
    bytes: &[u8],
    style: Style,
) -> Result<Map<String, Value>, wire::WireError> {
    wire::check(id, bytes)?;
    Ok(Decoder {
        schema: Schema::get(),
        pretty: style == Style::Pretty,
    }
    .message(id, bytes, false))
}

struct Decoder {
    schema: &'static Schema,
    pretty: bool,
}

impl Decoder {
    /// A message that [`wire::check`] has passed; `hex` is inherited from the field it is in.
    fn message(&self, id: MessageId, bytes: &[u8], hex: bool) -> Map<String, Value> {
        let message = self.schema.message(id);
        let mut values: Vec<(u32, Value)> = Vec::with_capacity(message.fields.len());
        let mut unknown = Vec::new();
        let mut reader = WireReader::new(bytes);
        let mut start = 0;
        while let Ok(Some(found)) = reader.next_field() {
            let raw = &bytes[start..reader.offset()];
            start = reader.offset();
            let Some(field) = message.field(found.number) else {
                unknown.extend_from_slice(raw);
                continue;
            };
            let shown = match present::shown(id, field) {
                _ if hex => Shown::Hex,
                shown => shown,
            };
            let place = match values.binary_search_by_key(&found.number, |(number, _)| *number) {
                Ok(place) => place,
                Err(place) => {
                    let empty = if field.label == Label::Repeated {
                        Value::Array(Vec::new())
                    } else {
                        Value::Null
                    };
                    values.insert(place, (found.number, empty));
                    place
                }
            };
            match &mut values[place].1 {
                Value::Array(list) if field.label == Label::Repeated => {
                    self.values(field.kind, shown, found.value, list);
                }
                // Of a field that stands twice the last counts.
                slot => *slot = self.value(field.kind, shown, found.value),
            }
        }
        let mut map = Map::new();
        for (number, value) in values {
            let Some(field) = message.field(number) else {
                continue;
            };
            let is_address = self.pretty && present::shown(id, field) == Shown::Address;
            let value = if is_address { address(value) } else { value };
            map.insert(field.name.to_string(), value);
        }
        if !unknown.is_empty() {
            map.insert(UNKNOWN_FIELDS.to_string(), text::to_base64(&unknown).into());
        }
        map
    }

    /// One value of a repeated field, or all of a packed one.
    fn values(&self, kind: FieldType, shown: Shown, value: WireValue<'_>, list: &mut Vec<Value>) {
        let (WireValue::Delimited(body), true) = (value, is_number(kind)) else {
            list.push(self.value(kind, shown, value));
            return;
        };
        match kind {
            FieldType::Fixed32 => {
                let words = body.as_chunks::<4>().0.iter();
                list.extend(words.map(|word| {
                    self.value(kind, shown, WireValue::Fixed32(u32::from_le_bytes(*word)))
                }));
            }
            FieldType::Fixed64 => {
                let words = body.as_chunks::<8>().0.iter();
                list.extend(words.map(|word| {
                    self.value(kind, shown, WireValue::Fixed64(u64::from_le_bytes(*word)))
                }));
            }
            _ => {
                let mut packed = WireReader::new(body);
                while packed.offset() < body.len() {
                    let Ok(number) = packed.varint() else { break };
                    list.push(self.value(kind, shown, WireValue::Varint(number)));
                }
            }
        }
    }

    fn value(&self, kind: FieldType, shown: Shown, value: WireValue<'_>) -> Value {
        match (kind, value) {
            (FieldType::Message(inner), WireValue::Delimited(body)) => {
                self.message(inner, body, shown == Shown::Hex).into()
            }
            (FieldType::String, WireValue::Delimited(body)) => String::from_utf8_lossy(body).into(),
            (_, WireValue::Delimited(body)) if shown == Shown::Quoted => {
                text::to_quoted(body).into()
            }
            (_, WireValue::Delimited(body)) => text::to_base64(body).into(),
            (_, WireValue::Fixed32(number)) => self.number(shown, number.into()),
            (_, WireValue::Fixed64(number)) => self.number(shown, number.into()),
            (FieldType::Bool, WireValue::Varint(number)) => (number != 0).into(),
            (FieldType::Enum(id), WireValue::Varint(number)) => {
                let number = number as i32;
                match self.schema.enumeration(id).name_of(number) {
                    Some(name) => name.into(),
                    None => number.into(),
                }
            }
            (_, WireValue::Varint(number)) => self.number(shown, integer(kind, number)),
        }
    }

    fn number(&self, shown: Shown, number: i128) -> Value {
        match self.pretty {
            true => present::show_number(shown, number),
            false => present::plain_number(number),
        }
    }
}

fn is_number(kind: FieldType) -> bool {
    !matches!(
        kind,
        FieldType::String | FieldType::Bytes | FieldType::Message(_)
    )
}

/// What a varint means for a field of this type; bits that it has no room for are dropped, as
/// every reader does.
fn integer(kind: FieldType, number: u64) -> i128 {
    let zigzag = |number: u64| (number >> 1) as i64 ^ -((number & 1) as i64);
    match kind {
        FieldType::Uint32 => i128::from(number as u32),
        FieldType::Int32 => i128::from(number as i32),
        FieldType::Int64 => i128::from(number as i64),
        FieldType::Sint32 => i128::from(zigzag(u64::from(number as u32)) as i32),
        FieldType::Sint64 => i128::from(zigzag(number)),
        _ => i128::from(number),
    }
}

/// The words of an address as one text, where they make one.
fn address(value: Value) -> Value {
    let words: Option<Vec<u32>> = match &value {
        Value::Array(words) => {
            let words = words.iter();
            words
                .map(|word| word.as_u64().and_then(|word| u32::try_from(word).ok()))
                .collect()
        }
        _ => None,
    };
    match words.and_then(|words| present::show_address(&words)) {
        Some(address) => vec![address].into(),
        None => value,
    }
}
