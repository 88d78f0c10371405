//! Walks protobuf's wire format against the schema, without decoding.
//!
//! prost gives a missing required field its default in silence; here it is an error that names
//! message and field. Fields that the schema does not know are stepped over.

use crate::schema::{FieldSchema, FieldType, Label, MessageId, Schema, WireType};

/// How deep messages may stand in each other: prost's own limit is 100.
pub const MAX_NESTING: u32 = 64;

/// What is wrong with a message's bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A required field is absent.
    #[error("{message} lacks its required field {field}")]
    MissingField {
        /// Message, as CRIU names it.
        message: &'static str,
        /// Field, as CRIU names it.
        field: &'static str,
    },
    /// A field's value is not of its type.
    #[error("field {field} of {message} is {found} where {expected} is expected")]
    WrongType {
        /// Message, as CRIU names it.
        message: &'static str,
        /// Field, as CRIU names it.
        field: &'static str,
        /// Wire type that the file has.
        found: &'static str,
        /// Wire type that the field has.
        expected: &'static str,
    },
    /// A text field holds bytes that are not UTF-8.
    #[error("field {field} of {message} is text but not UTF-8")]
    NotUtf8 {
        /// Message, as CRIU names it.
        message: &'static str,
        /// Field, as CRIU names it.
        field: &'static str,
    },
    /// The bytes end inside a value, or are no protobuf at all.
    #[error("{message} is damaged at its byte {at}: {what}")]
    Damaged {
        /// Message, as CRIU names it.
        message: &'static str,
        /// Offset from the start of that message.
        at: usize,
        /// What is wrong there.
        what: &'static str,
    },
    /// Messages stand in each other deeper than [`MAX_NESTING`].
    #[error("{message} is nested more than {MAX_NESTING} deep")]
    TooDeep {
        /// Message, as CRIU names it.
        message: &'static str,
    },
}

/// One field as it lies on the wire.
#[derive(Clone, Copy, Debug)]
pub struct WireField<'a> {
    /// Field number.
    pub number: u32,
    /// Its value.
    pub value: WireValue<'a>,
}

/// One value as it lies on the wire.
#[derive(Clone, Copy, Debug)]
pub enum WireValue<'a> {
    /// A variable-length integer.
    Varint(u64),
    /// Eight bytes, little endian.
    Fixed64(u64),
    /// Bytes with their length.
    Delimited(&'a [u8]),
    /// Four bytes, little endian.
    Fixed32(u32),
}

impl WireValue<'_> {
    fn name(self) -> &'static str {
        match self {
            WireValue::Varint(_) => "a varint",
            WireValue::Fixed64(_) => "64 fixed bits",
            WireValue::Delimited(_) => "a byte string",
            WireValue::Fixed32(_) => "32 fixed bits",
        }
    }
}

/// Steps over the fields of one message.
pub struct WireReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> WireReader<'a> {
    /// A reader at the start of a message's bytes.
    pub fn new(bytes: &'a [u8]) -> Self {
        WireReader { bytes, at: 0 }
    }

    /// The offset of the next field.
    pub fn offset(&self) -> usize {
        self.at
    }

    /// The next field, `None` at the end, or what is wrong at [`Self::offset`].
    pub fn next_field(&mut self) -> Result<Option<WireField<'a>>, &'static str> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).map_err(|_| "a field number out of range")?;
        if number == 0 || number > 0x1fff_ffff {
            return Err("a field number out of range");
        }
        let value = match key & 7 {
            0 => WireValue::Varint(self.varint()?),
            1 => WireValue::Fixed64(u64::from_le_bytes(self.array()?)),
            2 => {
                let length =
                    usize::try_from(self.varint()?).map_err(|_| "a length out of range")?;
                WireValue::Delimited(self.take(length)?)
            }
            5 => WireValue::Fixed32(u32::from_le_bytes(self.array()?)),
            3 | 4 => return Err("a group, which the format does not use"),
            _ => return Err("an unknown wire type"),
        };
        Ok(Some(WireField { number, value }))
    }

    /// The next varint, as in the body of a packed field.
    pub fn varint(&mut self) -> Result<u64, &'static str> {
        let rest = &self.bytes[self.at..];
        let mut value = 0u64;
        for (place, byte) in rest.iter().take(10).enumerate() {
            if place == 9 && *byte > 1 {
                return Err("a varint longer than 64 bits");
            }
            value |= u64::from(byte & 0x7f) << (7 * place);
            if byte & 0x80 == 0 {
                self.at += place + 1;
                return Ok(value);
            }
        }
        if rest.len() < 10 {
            return Err("the bytes end inside a varint");
        }
        Err("a varint longer than 64 bits")
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], &'static str> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..length).ok_or("a value reaches past the end")?;
        self.at += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| "a value reaches past the end")
    }
}

/// The last value of a varint field, as an extra's length needs it; `None` when absent.
pub fn varint_field(bytes: &[u8], number: u32) -> Option<u64> {
    let mut reader = WireReader::new(bytes);
    let mut found = None;
    while let Ok(Some(field)) = reader.next_field() {
        if let (true, WireValue::Varint(value)) = (field.number == number, field.value) {
            found = Some(value);
        }
    }
    found
}

/// Checks that `bytes` are a whole message: each required field there, each value of its type.
pub fn check(id: MessageId, bytes: &[u8]) -> Result<(), WireError> {
    check_nested(Schema::get(), id, bytes, 0)
}

fn check_nested(schema: &Schema, id: MessageId, bytes: &[u8], depth: u32) -> Result<(), WireError> {
    let message = schema.message(id);
    if depth >= MAX_NESTING {
        return Err(WireError::TooDeep {
            message: message.name,
        });
    }
    let mut reader = WireReader::new(bytes);
    let mut seen = 0u64;
    loop {
        let at = reader.offset();
        let next = reader.next_field().map_err(|what| WireError::Damaged {
            message: message.name,
            at,
            what,
        })?;
        let Some(WireField { number, value }) = next else {
            break;
        };
        let Some(field) = message.field(number) else {
            continue;
        };
        seen |= field.required_bit;
        match (field.kind, value) {
            (FieldType::Message(inner), WireValue::Delimited(body)) => {
                check_nested(schema, inner, body, depth + 1)?;
            }
            (FieldType::String, WireValue::Delimited(body))
                if std::str::from_utf8(body).is_err() =>
            {
                return Err(WireError::NotUtf8 {
                    message: message.name,
                    field: field.name,
                });
            }
            _ => check_value(message.name, field, value)?,
        }
    }
    match message.first_missing(seen) {
        None => Ok(()),
        Some(field) => Err(WireError::MissingField {
            message: message.name,
            field: field.name,
        }),
    }
}

fn check_value(
    message: &'static str,
    field: &FieldSchema,
    value: WireValue<'_>,
) -> Result<(), WireError> {
    let expected = match (field.kind.wire_type(), value) {
        (WireType::Varint, WireValue::Varint(_))
        | (WireType::Fixed64, WireValue::Fixed64(_))
        | (WireType::Fixed32, WireValue::Fixed32(_))
        | (WireType::Delimited, WireValue::Delimited(_)) => return Ok(()),
        // A repeated number may also come packed, as writers newer than proto2 do.
        (WireType::Varint, WireValue::Delimited(body)) if field.label == Label::Repeated => {
            return check_packed(message, body);
        }
        (_, WireValue::Delimited(_)) if field.label == Label::Repeated => return Ok(()),
        (WireType::Varint, _) => "a varint",
        (WireType::Fixed64, _) => "64 fixed bits",
        (WireType::Fixed32, _) => "32 fixed bits",
        (WireType::Delimited, _) => "a byte string",
    };
    Err(WireError::WrongType {
        message,
        field: field.name,
        found: value.name(),
        expected,
    })
}

fn check_packed(message: &'static str, body: &[u8]) -> Result<(), WireError> {
    let mut reader = WireReader::new(body);
    while reader.offset() < body.len() {
        let at = reader.offset();
        reader
            .varint()
            .map_err(|what| WireError::Damaged { message, at, what })?;
    }
    Ok(())
}
