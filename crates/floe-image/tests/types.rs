//! The Rust types against the tables of the format: numbers, types and labels.
//!
//! Every field of every type is set on the wire, one at a time, decoded by the Rust type, encoded
//! again and printed: a wrong number, type or label shows in the bytes or in the text.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use floe_image::messages::{CODECS, ENUMS};
use floe_image::schema::{Codec, Schema};
use support::{put_delimited, put_varint};

const MESSAGES: &str = include_str!("../schema/messages.tsv");
const ENUM_TABLE: &str = include_str!("../schema/enums.tsv");
const FILES: &str = include_str!("../schema/files.tsv");

/// The tables handed to every implementation where this checkout has them, else our own.
fn table(name: &str, own: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let shared = root.join("../shared/format").join(name);
    std::fs::read_to_string(shared).unwrap_or_else(|_| own.to_string())
}

fn rows(table: &str) -> Vec<Vec<String>> {
    let lines = table.lines().skip(1);
    lines
        .map(|line| line.split('\t').map(str::to_string).collect())
        .collect()
}

fn codec(name: &str) -> &'static Codec {
    CODECS
        .iter()
        .find(|codec| codec.name == name)
        .unwrap_or_else(|| panic!("no type for {name}"))
}

#[test]
fn our_tables_are_the_shared_ones() {
    for (name, own) in [
        ("messages.tsv", MESSAGES),
        ("enums.tsv", ENUM_TABLE),
        ("files.tsv", FILES),
    ] {
        let shared: BTreeSet<_> = rows(&table(name, own)).into_iter().collect();
        let own: BTreeSet<_> = rows(own).into_iter().collect();
        let missing: Vec<_> = shared.difference(&own).collect();
        assert!(missing.is_empty(), "{name} lacks {missing:?}");
    }
}

/// A value on the wire, the same encoded again, and how the Rust type prints it.
struct Sample {
    wire: Vec<u8>,
    again: Vec<u8>,
    printed: Option<&'static str>,
}

fn varint(number: u32, fed: u64, kept: u64, printed: &'static str) -> Sample {
    let mut sample = Sample {
        wire: Vec::new(),
        again: Vec::new(),
        printed: Some(printed),
    };
    for (value, out) in [(fed, &mut sample.wire), (kept, &mut sample.again)] {
        put_varint(u64::from(number) << 3, out);
        put_varint(value, out);
    }
    sample
}

fn delimited(number: u32, body: &[u8], printed: Option<&'static str>) -> Sample {
    let mut wire = Vec::new();
    put_delimited(number, body, &mut wire);
    Sample {
        again: wire.clone(),
        wire,
        printed,
    }
}

fn sample(number: u32, kind: &str, enums: &BTreeSet<String>) -> Sample {
    let key = u64::from(number) << 3;
    let fixed = |wire_type: u64, bytes: &[u8], printed| {
        let mut wire = Vec::new();
        put_varint(key | wire_type, &mut wire);
        wire.extend(bytes);
        Sample {
            again: wire.clone(),
            wire,
            printed: Some(printed),
        }
    };
    match kind {
        // A value that is too wide tells a 32-bit type from a 64-bit one.
        "uint32" => varint(number, 0x1_ffff_fffe, 0xffff_fffe, "4294967294"),
        "uint64" => varint(number, u64::MAX, u64::MAX, "18446744073709551615"),
        "int32" => varint(number, 0x1_ffff_fffe, u64::MAX - 1, "-2"),
        "int64" => varint(number, u64::MAX - 1, u64::MAX - 1, "-2"),
        "sint32" => varint(number, 0x1_0000_0003, 3, "-2"),
        "sint64" => varint(number, u64::MAX, u64::MAX, "-9223372036854775808"),
        "bool" => varint(number, 1, 1, "true"),
        "fixed32" => fixed(5, &7u32.to_le_bytes(), "7"),
        "fixed64" => fixed(1, &7u64.to_le_bytes(), "7"),
        "string" => delimited(number, b"ab", Some("\"ab\"")),
        "bytes" => delimited(number, b"ab", Some("[97, 98]")),
        // A number that no variant has: an enum prints it as such, and it is kept.
        kind if enums.contains(kind) => varint(number, 0x1_0000_3039, 0x3039, "12345"),
        // An empty message inside; its required fields come with their defaults.
        _ => Sample {
            printed: None,
            ..delimited(number, b"", None)
        },
    }
}

#[test]
fn every_field_has_the_number_type_and_label_of_the_table() {
    // Ours hold every row of the shared ones (above), and what only we have.
    let enums: BTreeSet<String> = rows(ENUM_TABLE)
        .into_iter()
        .map(|row| row[1].clone())
        .collect();
    let rows = rows(MESSAGES);
    let known: BTreeSet<&String> = rows.iter().map(|row| &row[1]).collect();
    let mut fields_seen = 0;
    for row in &rows {
        let [_, message, number, name, label, kind, ..] = row.as_slice() else {
            panic!("{row:?}")
        };
        let number: u32 = number.parse().expect("a number");
        let codec = codec(message);
        let what = format!("{message}.{name} ({label} {kind})");
        let (empty, _) = (codec.transcode)(&[]).expect("empty");
        let inner_again = match known.contains(kind) {
            true => Some((self::codec(kind).transcode)(&[]).expect("empty").0),
            false => None,
        };
        let mut sample = sample(number, kind, &enums);
        if let Some(inner) = &inner_again {
            sample.again.clear();
            put_delimited(number, inner, &mut sample.again);
        }
        let repeats = if label == "repeated" { 2 } else { 1 };
        let (again, printed) = (codec.transcode)(&sample.wire.repeat(repeats)).expect(&what);

        let expected = fields(&sample.again.repeat(repeats));
        assert_eq!(
            fields(&again).get(&number),
            expected.get(&number),
            "{what}: {printed}"
        );
        // Only a required field is there without having been set.
        assert_eq!(
            fields(&empty).contains_key(&number),
            label == "required",
            "{what}"
        );
        // Of an optional or required field the last one counts.
        let (twice, _) = (codec.transcode)(&sample.wire.repeat(2)).expect(&what);
        let count = fields(&twice).get(&number).map_or(0, Vec::len);
        assert_eq!(count, if label == "repeated" { 2 } else { 1 }, "{what}");
        if let Some(value) = sample.printed {
            let value = match label.as_str() {
                "required" => format!("{name}: {value}"),
                "optional" => format!("{name}: Some({value})"),
                _ => format!("{name}: [{value}, {value}]"),
            };
            assert!(
                printed.contains(&value),
                "{what}: {value} is not in {printed}"
            );
        }
        fields_seen += 1;
    }
    assert!(fields_seen > 900, "{fields_seen}");
    assert_eq!(known.len(), CODECS.len());
}

/// Each field of a message on the wire with its values' bytes.
fn fields(bytes: &[u8]) -> BTreeMap<u32, Vec<String>> {
    let mut reader = floe_image::wire::WireReader::new(bytes);
    let mut fields: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    while let Some(field) = reader.next_field().expect("our own encoding") {
        fields
            .entry(field.number)
            .or_default()
            .push(format!("{:?}", field.value));
    }
    fields
}

#[test]
fn no_type_has_a_field_that_the_table_lacks() {
    for (id, message) in Schema::get().messages() {
        let codec = &CODECS[usize::from(id.0)];
        assert_eq!(codec.name, message.name);
        // All numbers up to one past the highest, as a varint and as bytes.
        let highest = message
            .fields
            .iter()
            .map(|field| field.number)
            .max()
            .unwrap_or(0);
        let (empty, _) = (codec.transcode)(&[]).expect("empty");
        for number in 1..=highest + 8 {
            if message.field(number).is_some() {
                continue;
            }
            let mut wire = Vec::new();
            put_varint(u64::from(number) << 3, &mut wire);
            put_varint(1, &mut wire);
            put_delimited(number, b"", &mut wire);
            let (again, _) = (codec.transcode)(&wire).expect("an unknown field is passed over");
            assert_eq!(again, empty, "{} field {number}", message.name);
        }
    }
}

#[test]
fn every_enum_has_the_values_of_the_table() {
    let mut seen = 0;
    for row in rows(&table("enums.tsv", ENUM_TABLE)) {
        let [_, name, value, number, ..] = row.as_slice() else {
            panic!("{row:?}")
        };
        let (_, variant) = ENUMS
            .iter()
            .find(|(known, _)| known == name)
            .expect("an enum");
        let printed = variant(number.parse().expect("a number")).expect("a variant");
        let plain = |text: &str| text.replace('_', "").to_lowercase();
        assert_eq!(plain(&printed), plain(value), "{name}");
        seen += 1;
    }
    assert!(seen > 100);
}
