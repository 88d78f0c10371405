//! The format's tables at run time: what each message's fields are called, and of which type.
//!
//! Parsed once from the same `schema/*.tsv` that `build.rs` makes the Rust types from.

use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;

/// A message type of the generated `messages` module, tied to its row in the tables.
pub trait ImageMessage: prost::Message + Default {
    /// The message's name in CRIU's format, such as `core_entry`.
    const NAME: &'static str;
    /// The message's place in [`Schema::message`].
    const ID: MessageId;
}

/// The variant of a number, as it prints itself; `None` where the enum has none.
pub type VariantName = fn(i32) -> Option<String>;

/// A message encoded again, and as it prints itself.
pub type Transcoded = Result<(Vec<u8>, String), prost::DecodeError>;

/// What can be done with a message type that is chosen at run time.
#[derive(Clone, Copy)]
pub struct Codec {
    /// Name in CRIU's format.
    pub name: &'static str,
    /// Decodes bytes without looking for missing fields; gives what encoding makes of the message
    /// and how it prints itself.
    pub transcode: fn(&[u8]) -> Transcoded,
    /// Decodes bytes as [`crate::framing::decode`] does.
    pub decode: fn(&[u8]) -> Result<(), crate::error::EntryError>,
}

impl Codec {
    /// The codec of one type.
    pub const fn of<M: ImageMessage + std::fmt::Debug>() -> Codec {
        Codec {
            name: M::NAME,
            transcode: |bytes| {
                let message = M::decode(bytes)?;
                Ok((message.encode_to_vec(), format!("{message:?}")))
            },
            decode: |bytes| crate::framing::decode::<M>(bytes).map(|_| ()),
        }
    }
}

/// Number of a message: its place in the alphabetical order of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageId(pub u16);

/// Number of an enum: its place in the alphabetical order of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnumId(pub u16);

/// How often a field stands in its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Label {
    /// Exactly once.
    Required,
    /// Once or not at all.
    Optional,
    /// Any number of times.
    Repeated,
}

/// The type of a field's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldType {
    /// `uint32`
    Uint32,
    /// `uint64`
    Uint64,
    /// `int32`
    Int32,
    /// `int64`
    Int64,
    /// `sint32`
    Sint32,
    /// `sint64`
    Sint64,
    /// `fixed32`
    Fixed32,
    /// `fixed64`
    Fixed64,
    /// `bool`
    Bool,
    /// `string`: UTF-8 text.
    String,
    /// `bytes`, or a message that the tables do not describe.
    Bytes,
    /// A named number.
    Enum(EnumId),
    /// A message inside this one.
    Message(MessageId),
}

/// Wire types of protobuf (<https://protobuf.dev/programming-guides/encoding/>).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireType {
    /// A variable-length integer.
    Varint,
    /// Eight bytes.
    Fixed64,
    /// A length, then that many bytes.
    Delimited,
    /// Four bytes.
    Fixed32,
}

impl FieldType {
    /// How a value of this type lies in the file.
    pub fn wire_type(self) -> WireType {
        match self {
            FieldType::Fixed32 => WireType::Fixed32,
            FieldType::Fixed64 => WireType::Fixed64,
            FieldType::String | FieldType::Bytes | FieldType::Message(_) => WireType::Delimited,
            _ => WireType::Varint,
        }
    }
}

/// One field of a message.
#[derive(Debug)]
pub struct FieldSchema {
    /// Field number on the wire.
    pub number: u32,
    /// Name in CRIU's format.
    pub name: &'static str,
    /// How often it may stand.
    pub label: Label,
    /// Type of its value.
    pub kind: FieldType,
    /// Default of an absent optional field, as written in the table.
    pub default: Option<&'static str>,
    /// Bit of this field in [`MessageSchema::required_mask`]; 0 unless required.
    pub required_bit: u64,
}

/// One message.
#[derive(Debug)]
pub struct MessageSchema {
    /// Name in CRIU's format.
    pub name: &'static str,
    /// Fields in the order of the table.
    pub fields: Vec<FieldSchema>,
    /// Bits of all required fields.
    pub required_mask: u64,
    by_number: Vec<u8>,
}

const NO_FIELD: u8 = u8::MAX;

impl MessageSchema {
    /// The field with this number, if the tables know it.
    pub fn field(&self, number: u32) -> Option<&FieldSchema> {
        let place = *self.by_number.get(usize::try_from(number).ok()?)?;
        self.fields.get(usize::from(place))
    }

    /// The field with this name, if the tables know it.
    pub fn field_named(&self, name: &str) -> Option<&FieldSchema> {
        self.fields.iter().find(|field| field.name == name)
    }

    /// The first required field whose bit is not in `seen`.
    pub fn first_missing(&self, seen: u64) -> Option<&FieldSchema> {
        let missing = self.required_mask & !seen;
        if missing == 0 {
            return None;
        }
        self.fields
            .iter()
            .find(|field| field.required_bit & missing != 0)
    }
}

/// One enum.
#[derive(Debug)]
pub struct EnumSchema {
    /// Name in CRIU's format.
    pub name: &'static str,
    /// Names and numbers in the order of the table.
    pub values: Vec<(&'static str, i32)>,
}

impl EnumSchema {
    /// The name of a number, if it has one.
    pub fn name_of(&self, value: i32) -> Option<&'static str> {
        let found = self.values.iter().find(|(_, number)| *number == value);
        found.map(|(name, _)| *name)
    }

    /// The number of a name, if there is one.
    pub fn value_of(&self, name: &str) -> Option<i32> {
        let found = self.values.iter().find(|(known, _)| *known == name);
        found.map(|(_, number)| *number)
    }
}

/// All messages and enums.
#[derive(Debug)]
pub struct Schema {
    messages: Vec<MessageSchema>,
    enums: Vec<EnumSchema>,
    ids: HashMap<&'static str, MessageId>,
}

impl Schema {
    /// The format's schema, parsed at the first call.
    pub fn get() -> &'static Schema {
        static SCHEMA: OnceLock<Schema> = OnceLock::new();
        SCHEMA.get_or_init(|| {
            Schema::parse(
                include_str!("../schema/messages.tsv"),
                include_str!("../schema/enums.tsv"),
            )
        })
    }

    /// The message with this number.
    pub fn message(&self, id: MessageId) -> &MessageSchema {
        &self.messages[usize::from(id.0)]
    }

    /// The enum with this number.
    pub fn enumeration(&self, id: EnumId) -> &EnumSchema {
        &self.enums[usize::from(id.0)]
    }

    /// The number of the message with this name.
    pub fn message_id(&self, name: &str) -> Option<MessageId> {
        self.ids.get(name).copied()
    }

    /// All messages with their numbers.
    pub fn messages(&self) -> impl Iterator<Item = (MessageId, &MessageSchema)> {
        (0..).map(MessageId).zip(&self.messages)
    }

    fn parse(messages: &'static str, enums: &'static str) -> Schema {
        let mut values: BTreeMap<&str, Vec<(&str, i32)>> = BTreeMap::new();
        for row in rows(enums) {
            let number = row[3].parse().expect("enum values are numbers");
            values.entry(row[1]).or_default().push((row[2], number));
        }
        let mut fields: BTreeMap<&str, Vec<Vec<&str>>> = BTreeMap::new();
        for row in rows(messages) {
            fields.entry(row[1]).or_default().push(row);
        }
        let enum_ids: HashMap<&str, EnumId> =
            values.keys().copied().zip((0..).map(EnumId)).collect();
        let ids: HashMap<&str, MessageId> =
            fields.keys().copied().zip((0..).map(MessageId)).collect();
        let messages = fields
            .iter()
            .map(|(name, rows)| parse_message(name, rows, &ids, &enum_ids))
            .collect();
        let enums = values
            .into_iter()
            .map(|(name, values)| EnumSchema { name, values })
            .collect();
        Schema {
            messages,
            enums,
            ids,
        }
    }
}

fn rows(table: &'static str) -> impl Iterator<Item = Vec<&'static str>> {
    table.lines().skip(1).map(|line| line.split('\t').collect())
}

fn parse_message(
    name: &'static str,
    rows: &[Vec<&'static str>],
    messages: &HashMap<&str, MessageId>,
    enums: &HashMap<&str, EnumId>,
) -> MessageSchema {
    let mut fields = Vec::with_capacity(rows.len());
    let mut required_mask = 0u64;
    for row in rows {
        let label = match row[4] {
            "required" => Label::Required,
            "repeated" => Label::Repeated,
            _ => Label::Optional,
        };
        let mut required_bit = 0;
        if label == Label::Required {
            required_bit = 1u64
                .checked_shl(required_mask.count_ones())
                .expect("no message has more than 64 required fields");
            required_mask |= required_bit;
        }
        fields.push(FieldSchema {
            number: row[2].parse().expect("field numbers are numbers"),
            name: row[3],
            label,
            kind: field_type(row[5], messages, enums),
            default: Some(row[6]).filter(|default| !default.is_empty()),
            required_bit,
        });
    }
    let highest = fields.iter().map(|field| field.number).max().unwrap_or(0);
    let mut by_number = vec![NO_FIELD; highest as usize + 1];
    for (place, field) in fields.iter().enumerate() {
        by_number[field.number as usize] =
            u8::try_from(place).expect("no message has 255 fields or more");
    }
    MessageSchema {
        name,
        fields,
        required_mask,
        by_number,
    }
}

fn field_type(
    name: &str,
    messages: &HashMap<&str, MessageId>,
    enums: &HashMap<&str, EnumId>,
) -> FieldType {
    match name {
        "uint32" => FieldType::Uint32,
        "uint64" => FieldType::Uint64,
        "int32" => FieldType::Int32,
        "int64" => FieldType::Int64,
        "sint32" => FieldType::Sint32,
        "sint64" => FieldType::Sint64,
        "fixed32" => FieldType::Fixed32,
        "fixed64" => FieldType::Fixed64,
        "bool" => FieldType::Bool,
        "string" => FieldType::String,
        "bytes" => FieldType::Bytes,
        other => match (enums.get(other), messages.get(other)) {
            (Some(id), _) => FieldType::Enum(*id),
            (None, Some(id)) => FieldType::Message(*id),
            // Register sets of architectures that we do not run on travel through unread.
            (None, None) => FieldType::Bytes,
        },
    }
}
