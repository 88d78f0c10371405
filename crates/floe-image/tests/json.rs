//! The JSON form: decoding and encoding again gives the same bytes, and the shape is CRIU's.

mod support;

use std::io::Cursor;
use std::path::PathBuf;

use floe_image::json::{self, JsonError, JsonOptions, Payload, Style, encode_from_json, render};
use floe_image::messages::{
    FdTypes, FileEntry, InetSkEntry, IpcSemEntry, PagemapEntry, PagemapHead, RegFileEntry,
    TcpStreamEntry, UnixSkEntry,
};
use floe_image::{ImageKind, ImageMessage};
use prost::Message as _;
use serde_json::{Value, json};
use support::{Random, header, image, kinds, put_delimited, put_entry};

fn decode(bytes: &[u8], style: Style, payload: Payload) -> Value {
    let length = bytes.len() as u64;
    let reader = json::reader_by_magic(Cursor::new(bytes), length, PathBuf::from("some.img"));
    json::decode_image(reader.expect("a magic"), JsonOptions { style, payload }).expect("whole")
}

fn one<M: ImageMessage>(kind: ImageKind, message: &M) -> Vec<u8> {
    let mut bytes = header(kind);
    put_entry(&message.encode_to_vec(), &mut bytes);
    bytes
}

#[test]
fn decoding_and_encoding_gives_the_same_bytes() {
    let mut random = Random(11);
    for kind in kinds() {
        for entries in 0..8 {
            let bytes = image(kind, &mut random, entries);
            for style in [Style::Plain, Style::Pretty] {
                let image = decode(&bytes, style, Payload::Keep);
                let text = render(&image, style);
                let parsed: Value = serde_json::from_str(&text).expect("JSON");
                assert_eq!(parsed, image);
                assert_eq!(
                    encode_from_json(&parsed).expect(&text),
                    bytes,
                    "{kind:?}: {text}"
                );
            }
            decode(&bytes, Style::Pretty, Payload::Omit);
        }
    }
}

#[test]
fn unknown_fields_and_padding_survive() {
    let mut body = IpcSemEntry {
        nsems: 1,
        ..Default::default()
    }
    .encode_to_vec();
    put_delimited(1000, b"ours", &mut body);
    let mut bytes = header(ImageKind::IpcnsSem);
    put_entry(&body, &mut bytes);
    bytes.extend([1, 0, 9, 9, 9, 9, 9, 9]);
    let image = decode(&bytes, Style::Plain, Payload::Keep);
    assert_eq!(image["entries"][0]["extra"], json!([1]));
    assert_eq!(encode_from_json(&image).expect("encode"), bytes);
}

#[test]
fn the_plain_style_is_as_crit_prints_it() {
    let mut bytes = header(ImageKind::TcpStream);
    let entry = TcpStreamEntry {
        inq_len: 2,
        outq_len: 3,
        opt_mask: 16,
        cork: Some(false),
        ..Default::default()
    };
    put_entry(&entry.encode_to_vec(), &mut bytes);
    bytes.extend(b"abxyz");
    let image = decode(&bytes, Style::Plain, Payload::Keep);
    assert_eq!(
        render(&image, Style::Plain),
        r#"{"magic": "TCP_STREAM", "entries": [{"inq_len": 2, "inq_seq": 0, "outq_len": 3, "outq_seq": 0, "opt_mask": 16, "snd_wscale": 0, "mss_clamp": 0, "cork": false, "extra": {"inq": "YWI=\n", "outq": "eHl6\n"}}]}"#
    );
    let image = decode(&bytes, Style::Pretty, Payload::Omit);
    assert_eq!(image["entries"][0]["extra"], "... <5B>");
    assert_eq!(image["entries"][0]["opt_mask"], "0x10");
}

#[test]
fn the_pretty_style_shows_names_addresses_and_quoted_names() {
    let reg = RegFileEntry {
        id: 1,
        flags: 0o2_102_001,
        name: "/\u{e9}".to_string(),
        ..Default::default()
    };
    let file = FileEntry {
        r#type: FdTypes::Reg.into(),
        id: 1,
        reg: Some(reg),
        ..Default::default()
    };
    let image = decode(&one(ImageKind::Files, &file), Style::Pretty, Payload::Keep);
    assert_eq!(image["entries"][0]["type"], "REG");
    assert_eq!(
        image["entries"][0]["reg"]["flags"],
        "O_WRONLY | O_APPEND | O_LARGEFILE | O_CLOEXEC"
    );
    assert!(render(&image, Style::Pretty).contains(r#""name": "/\u00e9""#));

    let address = |text: &[u8]| u32::from_le_bytes(text.try_into().expect("four"));
    let socket = InetSkEntry {
        family: 2,
        state: 10,
        src_addr: vec![address(&[127, 0, 0, 1])],
        dst_addr: vec![address(&[0x20, 1, 0xd, 0xb8]), 0, 0, address(&[0, 0, 0, 1])],
        ..Default::default()
    };
    let image = decode(
        &one(ImageKind::Inetsk, &socket),
        Style::Pretty,
        Payload::Keep,
    );
    let entry = &image["entries"][0];
    assert_eq!(entry["src_addr"], json!(["127.0.0.1"]));
    assert_eq!(entry["dst_addr"], json!(["2001:db8::1"]));
    assert_eq!(
        (&entry["family"], &entry["state"], &entry["flags"]),
        (&json!("INET"), &json!("LISTEN"), &json!("0x0"))
    );

    let socket = UnixSkEntry {
        name: b"\0a=b ".to_vec(),
        ..Default::default()
    };
    let image = decode(
        &one(ImageKind::Unixsk, &socket),
        Style::Plain,
        Payload::Keep,
    );
    assert_eq!(image["entries"][0]["name"], "=00a=3Db=20");
}

#[test]
fn a_pagemap_is_a_head_and_entries() {
    let mut bytes = one(ImageKind::Pagemap, &PagemapHead { pages_id: 3 });
    let entry = PagemapEntry {
        vaddr: 0x1000,
        compat_nr_pages: 2,
        flags: Some(5),
        ..Default::default()
    };
    put_entry(&entry.encode_to_vec(), &mut bytes);
    let image = decode(&bytes, Style::Pretty, Payload::Keep);
    let expected = json!([
        {"pages_id": 3},
        {"vaddr": "0x1000", "compat_nr_pages": 2, "flags": "PE_PARENT | PE_PRESENT"},
    ]);
    assert_eq!(image["entries"], expected);
}

#[test]
fn damaged_json_is_an_error_that_says_where() {
    let head = |entry: Value| encode_from_json(&json!({"magic": "PAGEMAP", "entries": [entry]}));
    let errors = [
        (
            head(json!({"pages_id": "x"})),
            "entries[0].pages_id: a number is expected, not \"x\"",
        ),
        (
            head(json!({"pages_id": -1})),
            "entries[0].pages_id: a number from 0 to 4294967295 is expected, not \"-1\"",
        ),
        (
            head(json!({"pages": 1})),
            "entries[0]: pagemap_head has no field pages",
        ),
        (
            head(json!({"pages_id": 1.5})),
            "entries[0].pages_id: a whole number is expected, not 1.5",
        ),
        (
            head(json!([])),
            "entries[0]: an object is expected, not a list",
        ),
        (
            encode_from_json(&json!({"magic": "PAGES", "entries": []})),
            "`magic` is PAGES, which is no image with entries",
        ),
        (
            encode_from_json(&json!([])),
            "magic: the name of an image is expected, not nothing",
        ),
    ];
    for (outcome, expected) in errors {
        assert_eq!(outcome.expect_err(expected).to_string(), expected);
    }
    let missing = head(json!({}));
    assert!(
        matches!(missing, Err(JsonError::Wire { .. })),
        "{missing:?}"
    );
}
