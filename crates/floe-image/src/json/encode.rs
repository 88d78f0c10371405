//! JSON to image.

use serde_json::{Map, Value};

use super::present::{self, Shown};
use super::{EXTRA, JsonError, PADDING, UNKNOWN_FIELDS, text};
use crate::catalogue::{Extra, ImageKind};
use crate::framing;
use crate::schema::{FieldSchema, FieldType, Label, MessageId, MessageSchema, Schema, WireType};
use crate::wire::{self, MAX_NESTING, WireError};

/// Longest piece of JSON in an error message, in characters.
const SHORTENED: usize = 60;

/// The bytes of the image that this JSON describes, as [`super::decode_to_json`] gives it in
/// either style.
pub fn encode_from_json(image: &Value) -> Result<Vec<u8>, JsonError> {
    let name = image.get("magic").and_then(Value::as_str);
    let name = name.ok_or_else(|| wrong("magic", "the name of an image", image.get("magic")))?;
    let kind = ImageKind::all()
        .find(|kind| kind.name() == name && !kind.is_raw() && kind.entry().is_some())
        .ok_or_else(|| JsonError::UnknownMagic {
            name: name.to_string(),
        })?;
    let entries = image.get("entries").and_then(Value::as_array);
    let entries = entries.ok_or_else(|| wrong("entries", "a list", image.get("entries")))?;
    let mut bytes = Vec::new();
    if let Some(magic) = kind.first_magic() {
        bytes.extend(magic.to_le_bytes());
    }
    bytes.extend(kind.magic().to_le_bytes());
    for (index, entry) in entries.iter().enumerate() {
        encode_entry(kind, index, entry, &mut bytes)?;
    }
    Ok(bytes)
}

fn encode_entry(
    kind: ImageKind,
    index: usize,
    entry: &Value,
    out: &mut Vec<u8>,
) -> Result<(), JsonError> {
    let schema = Schema::get();
    let at = format!("entries[{index}]");
    let id = match (kind.extra(), index) {
        (Extra::Ghost, 1..) => schema.message_id("ghost_chunk_entry"),
        _ => framing::entry_message(kind, index as u64),
    };
    let id = id.expect("every kind with a magic has an entry message");
    frame(id, entry, &at, out)?;
    let message = as_object(entry, &at)?;
    let extra = message.get(EXTRA);
    let at = format!("{at}.{EXTRA}");
    let pad = match kind.extra() {
        Extra::None | Extra::PagemapTail => {
            return extra.map_or(Ok(()), |extra| Err(wrong(&at, "nothing", Some(extra))));
        }
        Extra::MessageQueue => return encode_queue(extra, &at, out),
        Extra::Ghost => 1,
        Extra::SharedMemory => 4,
        Extra::Counted { pad, .. } => pad,
    };
    let start = out.len();
    match (kind, extra) {
        (_, None) => {}
        (ImageKind::TcpStream, Some(queues)) => {
            for name in ["inq", "outq"] {
                let queue = queues.get(name);
                out.extend(bytes_of(queue, &format!("{at}.{name}"))?);
            }
        }
        (ImageKind::IpcnsSem, Some(Value::Array(values))) => {
            for value in values {
                let number = value.as_u64().and_then(|value| u16::try_from(value).ok());
                let number = number.ok_or_else(|| wrong(&at, "16-bit numbers", Some(value)))?;
                out.extend(number.to_le_bytes());
            }
        }
        (_, extra) => out.extend(bytes_of(extra, &at)?),
    }
    let length = (out.len() - start) as u64;
    let padding = length.next_multiple_of(pad) - length;
    out.extend(padding_of(message, padding, &at)?);
    Ok(())
}

/// A queue's messages: entry, text, entry, text.
fn encode_queue(extra: Option<&Value>, at: &str, out: &mut Vec<u8>) -> Result<(), JsonError> {
    let id = Schema::get()
        .message_id("ipc_msg")
        .expect("the tables have it");
    let list = match extra {
        None => return Ok(()),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(at, "a list", Some(other))),
    };
    for (place, pair) in list.chunks(2).enumerate() {
        let at = format!("{at}[{}]", 2 * place);
        frame(id, &pair[0], &at, out)?;
        let text = bytes_of(pair.get(1), &at)?;
        let length = text.len() as u64;
        out.extend(text);
        let padding = length.next_multiple_of(8) - length;
        out.extend(padding_of(as_object(&pair[0], &at)?, padding, &at)?);
    }
    Ok(())
}

fn frame(id: MessageId, entry: &Value, at: &str, out: &mut Vec<u8>) -> Result<(), JsonError> {
    let mut body = Vec::new();
    let message = as_object(entry, at)?;
    encode_message(id, message, &Place { at, depth: 0 }, &mut body)?;
    if let Err(source) = wire::check(id, &body) {
        return Err(JsonError::Wire {
            at: at.to_string(),
            source,
        });
    }
    let size = u32::try_from(body.len());
    let size = size.map_err(|_| wrong(at, "an entry below 4 GiB", None))?;
    out.extend(size.to_le_bytes());
    out.extend(body);
    Ok(())
}

/// Where in the JSON a message stands.
struct Place<'a> {
    at: &'a str,
    depth: u32,
}

fn encode_message(
    id: MessageId,
    object: &Map<String, Value>,
    place: &Place<'_>,
    out: &mut Vec<u8>,
) -> Result<(), JsonError> {
    let message = Schema::get().message(id);
    let at = place.at;
    if place.depth >= MAX_NESTING {
        let source = WireError::TooDeep {
            message: message.name,
        };
        return Err(JsonError::Wire {
            at: at.to_string(),
            source,
        });
    }
    refuse_unknown_keys(message, object, place)?;
    let mut fields: Vec<(&FieldSchema, &Value)> = message
        .fields
        .iter()
        .filter_map(|field| object.get(field.name).map(|value| (field, value)))
        .collect();
    fields.sort_by_key(|(field, _)| field.number);
    for (field, value) in fields {
        let at = format!("{at}.{}", field.name);
        let place = Place {
            at: &at,
            depth: place.depth,
        };
        let shown = present::shown(id, field);
        match (field.label, value) {
            (Label::Repeated, Value::Array(values)) => {
                let words = match (shown, values.first()) {
                    (Shown::Address, Some(Value::String(address))) => {
                        present::read_address(address)
                    }
                    _ => None,
                };
                for word in words.iter().flatten() {
                    put_number(field, i128::from(*word), &place, out)?;
                }
                for value in values.iter().filter(|_| words.is_none()) {
                    encode_value(field, shown, value, (&place, out))?;
                }
            }
            (Label::Repeated, other) => return Err(wrong(&at, "a list", Some(other))),
            (_, value) => encode_value(field, shown, value, (&place, out))?,
        }
    }
    if let Some(unknown) = object.get(UNKNOWN_FIELDS) {
        out.extend(bytes_of(Some(unknown), at)?);
    }
    Ok(())
}

fn refuse_unknown_keys(
    message: &MessageSchema,
    object: &Map<String, Value>,
    place: &Place<'_>,
) -> Result<(), JsonError> {
    for key in object.keys() {
        let ours = match key.as_str() {
            UNKNOWN_FIELDS => true,
            EXTRA | PADDING => place.depth == 0,
            _ => false,
        };
        if !ours && message.field_named(key).is_none() {
            let (at, key) = (place.at.to_string(), key.clone());
            return Err(JsonError::UnknownKey {
                at,
                message: message.name,
                key,
            });
        }
    }
    Ok(())
}

fn encode_value(
    field: &FieldSchema,
    shown: Shown,
    value: &Value,
    (place, out): (&Place<'_>, &mut Vec<u8>),
) -> Result<(), JsonError> {
    let at = place.at;
    match (field.kind, value) {
        (FieldType::Message(inner), value) => {
            let mut body = Vec::new();
            let place = Place {
                at,
                depth: place.depth + 1,
            };
            encode_message(inner, as_object(value, at)?, &place, &mut body)?;
            put_delimited(field, &body, out);
        }
        (FieldType::String, Value::String(text)) => put_delimited(field, text.as_bytes(), out),
        (FieldType::String, other) => return Err(wrong(at, "text", Some(other))),
        (FieldType::Bytes, Value::String(text)) if shown == Shown::Quoted => {
            let bytes = text::from_quoted(text);
            let bytes = bytes.ok_or_else(|| wrong(at, "quoted-printable text", Some(value)))?;
            put_delimited(field, &bytes, out);
        }
        (FieldType::Bytes, value) => put_delimited(field, &bytes_of(Some(value), at)?, out),
        (FieldType::Bool, Value::Bool(set)) => put_number(field, i128::from(*set), place, out)?,
        (FieldType::Enum(id), Value::String(name)) => {
            let names = Schema::get().enumeration(id);
            let number = names.value_of(name);
            let number = number
                .ok_or_else(|| wrong(at, &format!("a name of {}", names.name), Some(value)))?;
            put_number(field, number.into(), place, out)?;
        }
        (_, Value::String(text)) => {
            let number = present::read_number(shown, text);
            let number = number.ok_or_else(|| wrong(at, "a number", Some(value)))?;
            put_number(field, number, place, out)?;
        }
        (_, Value::Number(number)) => {
            let number = number
                .as_u64()
                .map(i128::from)
                .or(number.as_i64().map(i128::from));
            let number = number.ok_or_else(|| wrong(at, "a whole number", Some(value)))?;
            put_number(field, number, place, out)?;
        }
        (_, other) => return Err(wrong(at, "a number", Some(other))),
    }
    Ok(())
}

fn put_number(
    field: &FieldSchema,
    number: i128,
    place: &Place<'_>,
    out: &mut Vec<u8>,
) -> Result<(), JsonError> {
    let range = match field.kind {
        FieldType::Bool => 0..=1,
        FieldType::Uint32 | FieldType::Fixed32 => 0..=i128::from(u32::MAX),
        FieldType::Int32 | FieldType::Sint32 | FieldType::Enum(_) => {
            i128::from(i32::MIN)..=i128::from(i32::MAX)
        }
        FieldType::Int64 | FieldType::Sint64 => i128::from(i64::MIN)..=i128::from(i64::MAX),
        _ => 0..=i128::from(u64::MAX),
    };
    if !range.contains(&number) {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        return Err(wrong(
            place.at,
            &expected,
            Some(&Value::String(number.to_string())),
        ));
    }
    match field.kind.wire_type() {
        WireType::Fixed32 => {
            put_varint(u64::from(field.number) << 3 | 5, out);
            out.extend((number as u32).to_le_bytes());
        }
        WireType::Fixed64 => {
            put_varint(u64::from(field.number) << 3 | 1, out);
            out.extend((number as u64).to_le_bytes());
        }
        WireType::Varint | WireType::Delimited => {
            put_varint(u64::from(field.number) << 3, out);
            let signed = number as i64;
            let zigzag = matches!(field.kind, FieldType::Sint32 | FieldType::Sint64);
            let bits = if zigzag {
                (signed << 1 ^ signed >> 63) as u64
            } else {
                number as u64
            };
            put_varint(bits, out);
        }
    }
    Ok(())
}

fn put_delimited(field: &FieldSchema, body: &[u8], out: &mut Vec<u8>) {
    put_varint(u64::from(field.number) << 3 | 2, out);
    put_varint(body.len() as u64, out);
    out.extend_from_slice(body);
}

fn put_varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn as_object<'a>(value: &'a Value, at: &str) -> Result<&'a Map<String, Value>, JsonError> {
    value
        .as_object()
        .ok_or_else(|| wrong(at, "an object", Some(value)))
}

fn bytes_of(value: Option<&Value>, at: &str) -> Result<Vec<u8>, JsonError> {
    let bytes = value.and_then(Value::as_str).and_then(text::from_base64);
    bytes.ok_or_else(|| wrong(at, "bytes in base64", value))
}

fn padding_of(message: &Map<String, Value>, length: u64, at: &str) -> Result<Vec<u8>, JsonError> {
    let length = usize::try_from(length).expect("less than 8");
    match message.get(PADDING) {
        None => Ok(vec![0; length]),
        Some(padding) => match bytes_of(Some(padding), at)? {
            bytes if bytes.len() == length => Ok(bytes),
            _ => Err(wrong(
                at,
                &format!("padding of {length} bytes"),
                Some(padding),
            )),
        },
    }
}

fn wrong(at: &str, expected: &str, found: Option<&Value>) -> JsonError {
    let found = found.map_or("nothing".to_string(), |found| match found {
        Value::Array(_) => "a list".to_string(),
        Value::Object(_) => "an object".to_string(),
        other => other.to_string().chars().take(SHORTENED).collect(),
    });
    JsonError::Value {
        at: at.to_string(),
        expected: expected.to_string(),
        found,
    }
}
