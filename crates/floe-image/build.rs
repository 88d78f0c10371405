//! Writes the Rust types of every image message and enum from `schema/*.tsv`.
//!
//! The tables are the single description of the format: the prost types come from them here, the
//! run-time schema (`src/schema.rs`) reads the same files.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::{env, fs, path::Path};

/// One row of `schema/messages.tsv`.
struct Field<'a> {
    number: &'a str,
    name: &'a str,
    label: &'a str,
    kind: &'a str,
    default: &'a str,
}

fn main() {
    let schema = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("schema");
    println!("cargo::rerun-if-changed={}", schema.display());
    println!("cargo::rerun-if-changed=build.rs");
    let read = |name: &str| {
        fs::read_to_string(schema.join(name)).expect("the schema tables are in the source tree")
    };
    let (messages, enums) = (read("messages.tsv"), read("enums.tsv"));
    let out_dir = env::var("OUT_DIR").expect("cargo sets it");
    let target = Path::new(&out_dir).join("catalogue.rs");
    fs::write(target, catalogue(&read("files.tsv"))).expect("OUT_DIR is writable");
    let mut out = String::new();
    let enum_names = write_enums(&enums, &mut out);
    write_messages(&messages, &enum_names, &mut out);
    fs::write(Path::new(&out_dir).join("messages.rs"), out).expect("OUT_DIR is writable");
}

fn rows(table: &str) -> impl Iterator<Item = Vec<&str>> {
    table.lines().skip(1).map(|line| line.split('\t').collect())
}

/// `enum ImageKind` with a variant a row of `files.tsv`, and the rows.
fn catalogue(table: &str) -> String {
    let mut variants = String::new();
    let mut count = 0;
    let mut facts = String::new();
    for row in rows(table) {
        let (name, pattern, magic, entry) = (row[0], row[1], row[2], row[3]);
        let raw = magic.contains("raw");
        let magic = magic.split(' ').next().unwrap_or("0");
        // Only the first of `pagemap_head, pagemap_entry`: the framing knows the second.
        let entry = entry.split(',').next().unwrap_or("");
        let _ = writeln!(
            variants,
            "    /// `{name}`: `{pattern}`.\n    {},",
            camel(name)
        );
        let _ = writeln!(
            facts,
            "    Row {{ kind: ImageKind::{}, name: \"{name}\", pattern: \"{pattern}\", magic: {magic}, entry: \"{entry}\", raw: {raw} }},",
            camel(name)
        );
        count += 1;
    }
    format!(
        "/// A kind of image file.\n#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]\npub enum ImageKind {{\n{variants}}}\nconst ROWS: [Row; {count}] = [\n{facts}];\n"
    )
}

/// `core_entry.march` becomes `CoreEntryMarch`.
fn camel(name: &str) -> String {
    name.split(['_', '.', '-'])
        .map(|part| {
            let (first, rest) = part.split_at(part.len().min(1));
            let shouting = part.len() > 1
                && part
                    .chars()
                    .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit());
            let rest = if shouting {
                rest.to_lowercase()
            } else {
                rest.to_string()
            };
            first.to_uppercase() + &rest
        })
        .collect()
}

fn write_enums(table: &str, out: &mut String) -> BTreeSet<String> {
    let mut enums: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
    for row in rows(table) {
        enums.entry(row[1]).or_default().push((row[2], row[3]));
    }
    for (name, values) in &enums {
        let _ = writeln!(
            out,
            "/// `{name}` of CRIU's format.\n#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ::prost::Enumeration)]\n#[repr(i32)]\npub enum {} {{",
            camel(name)
        );
        for (value, number) in values {
            let _ = writeln!(out, "    /// {value}\n    {} = {number},", camel(value));
        }
        out.push_str("}\n");
    }
    let count = enums.len();
    let _ = writeln!(
        out,
        "/// Every enum: its name in the format, and the variant (as it prints itself) of a number.\npub static ENUMS: [(&str, crate::schema::VariantName); {count}] = ["
    );
    for name in enums.keys() {
        let variant = camel(name);
        let _ = writeln!(
            out,
            "    (\"{name}\", |number| {variant}::try_from(number).ok().map(|variant| format!(\"{{variant:?}}\"))),"
        );
    }
    out.push_str("];\n");
    enums.keys().map(|name| name.to_string()).collect()
}

fn write_messages(table: &str, enums: &BTreeSet<String>, out: &mut String) {
    let mut messages: BTreeMap<&str, Vec<Field<'_>>> = BTreeMap::new();
    for row in rows(table) {
        messages.entry(row[1]).or_default().push(Field {
            number: row[2],
            name: row[3],
            label: row[4],
            kind: row[5],
            default: row[6],
        });
    }
    for (id, (name, fields)) in messages.iter().enumerate() {
        let _ = writeln!(
            out,
            "/// `{name}` of CRIU's format.\n#[derive(Clone, PartialEq, ::prost::Message)]\npub struct {} {{",
            camel(name)
        );
        for field in fields {
            write_field(field, &messages, enums, out);
        }
        out.push_str("}\n");
        let _ = writeln!(
            out,
            "impl crate::schema::ImageMessage for {} {{\n    const NAME: &'static str = \"{name}\";\n    const ID: crate::schema::MessageId = crate::schema::MessageId({id});\n}}",
            camel(name)
        );
    }
    write_codecs(messages.keys(), out);
}

/// The table by which tests and the fuzzer reach every type by number.
fn write_codecs<'a>(names: impl ExactSizeIterator<Item = &'a &'a str>, out: &mut String) {
    let _ = writeln!(
        out,
        "/// Every message type in the order of [`crate::schema::MessageId`].\npub static CODECS: [crate::schema::Codec; {}] = [",
        names.len()
    );
    for name in names {
        let _ = writeln!(out, "    crate::schema::Codec::of::<{}>(),", camel(name));
    }
    out.push_str("];\n");
}

fn write_field(
    field: &Field<'_>,
    messages: &BTreeMap<&str, Vec<Field<'_>>>,
    enums: &BTreeSet<String>,
    out: &mut String,
) {
    let (tag, rust) = match field.kind {
        "uint32" | "fixed32" => (field.kind.to_string(), "u32".to_string()),
        "uint64" | "fixed64" => (field.kind.to_string(), "u64".to_string()),
        "int32" | "sint32" => (field.kind.to_string(), "i32".to_string()),
        "int64" | "sint64" => (field.kind.to_string(), "i64".to_string()),
        "bool" => ("bool".to_string(), "bool".to_string()),
        "string" => (
            "string".to_string(),
            "::prost::alloc::string::String".to_string(),
        ),
        "bytes" => (
            "bytes = \"vec\"".to_string(),
            "::prost::alloc::vec::Vec<u8>".to_string(),
        ),
        other if enums.contains(other) => (
            format!("enumeration = \"{}\"", camel(other)),
            "i32".to_string(),
        ),
        other if messages.contains_key(other) => ("message".to_string(), camel(other)),
        // Register sets of architectures that we do not run on travel through unread.
        _ => (
            "bytes = \"vec\"".to_string(),
            "::prost::alloc::vec::Vec<u8>".to_string(),
        ),
    };
    let numeric =
        !matches!(field.kind, "string" | "bytes") && tag != "message" && !tag.starts_with("bytes");
    let (label, rust) = match field.label {
        "repeated" if numeric => (
            ", repeated, packed = \"false\"",
            format!("::prost::alloc::vec::Vec<{rust}>"),
        ),
        "repeated" => (", repeated", format!("::prost::alloc::vec::Vec<{rust}>")),
        "optional" => (", optional", format!("::core::option::Option<{rust}>")),
        _ => (", required", rust),
    };
    let default = match field.default {
        "" => String::new(),
        value if enums.contains(field.kind) => format!(", default = \"{}\"", camel(value)),
        value => format!(", default = \"{value}\""),
    };
    let name = if field.name == "type" || field.name == "ref" {
        format!("r#{}", field.name)
    } else {
        field.name.to_string()
    };
    let _ = writeln!(
        out,
        "    /// Field {}.\n    #[prost({tag}{label}, tag = \"{}\"{default})]\n    pub {name}: {rust},",
        field.number, field.number
    );
}
