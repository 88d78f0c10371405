//! Damaged images: each is an error that says what is wrong and where, never a panic.

mod support;

use std::io::Cursor;
use std::path::PathBuf;

use floe_image::catalogue::Extra;
use floe_image::framing::{self, ImageReader, MAX_ENTRY};
use floe_image::json::{self, JsonOptions, Payload, Style};
use floe_image::messages::{CODECS, CoreEntry, PagemapHead, PipeDataEntry};
use floe_image::schema::{Label, Schema};
use floe_image::wire::{WireError, WireReader, check};
use floe_image::{ImageError, ImageKind, ImageMessage};
use support::{Random, header, image, kinds, message, named, put_delimited, put_entry, put_varint};

const OPTIONS: JsonOptions = JsonOptions {
    style: Style::Plain,
    payload: Payload::Keep,
};

fn reader(kind: ImageKind, bytes: &[u8]) -> Result<ImageReader<Cursor<&[u8]>>, ImageError> {
    let length = bytes.len() as u64;
    ImageReader::new(kind, Cursor::new(bytes), length, PathBuf::from("some.img"))
}

fn decode(kind: ImageKind, bytes: &[u8]) -> Result<serde_json::Value, ImageError> {
    json::decode_image(reader(kind, bytes)?, OPTIONS)
}

#[test]
fn a_missing_required_field_is_named() {
    let mut random = Random(1);
    let mut tried = 0;
    for (id, schema) in Schema::get().messages() {
        for field in schema
            .fields
            .iter()
            .filter(|field| field.label == Label::Required)
        {
            let whole = message(id, &mut random, 0);
            let without = remove(&whole, field.number);
            let expected = WireError::MissingField {
                message: schema.name,
                field: field.name,
            };
            assert_eq!(check(id, &without), Err(expected));
            assert!((CODECS[usize::from(id.0)].decode)(&without).is_err());
            tried += 1;
        }
    }
    assert!(tried > 500);
    let error = framing::decode::<PagemapHead>(&[]).expect_err("an empty message");
    assert_eq!(
        error.to_string(),
        "pagemap_head lacks its required field pages_id"
    );
}

fn remove(bytes: &[u8], number: u32) -> Vec<u8> {
    let mut reader = WireReader::new(bytes);
    let mut out = Vec::new();
    let mut start = 0;
    while let Some(field) = reader.next_field().expect("whole") {
        if field.number != number {
            out.extend(&bytes[start..reader.offset()]);
        }
        start = reader.offset();
    }
    out
}

#[test]
fn a_missing_field_inside_is_named_with_file_entry_and_offset() {
    let core = CoreEntry {
        tc: Some(Default::default()),
        ..Default::default()
    };
    let body = prost::Message::encode_to_vec(&core);
    // The task's core is emptied: its fields are missing.
    let mut damaged = remove(&body, 3);
    put_delimited(3, b"", &mut damaged);
    let mut bytes = header(ImageKind::Core);
    put_entry(&body, &mut bytes);
    put_entry(&damaged, &mut bytes);
    let mut reader = reader(ImageKind::Core, &bytes).expect("header");
    reader.next_message::<CoreEntry>().expect("whole");
    let error = reader.next_message::<CoreEntry>().expect_err("damaged");
    let offset = 8 + 4 + body.len();
    assert_eq!(
        error.to_string(),
        format!("some.img, entry 1 at offset {offset}")
    );
    let source = std::error::Error::source(&error)
        .expect("a source")
        .to_string();
    assert_eq!(
        source,
        "task_core_entry lacks its required field task_state"
    );
}

#[test]
fn truncation_at_every_offset_is_an_error_or_fewer_whole_entries() {
    let mut random = Random(2);
    for kind in kinds() {
        let whole = image(kind, &mut random, 3);
        let entries = decode(kind, &whole).expect("whole")["entries"]
            .as_array()
            .map_or(0, Vec::len);
        for length in 0..whole.len() {
            let Ok(cut) = decode(kind, &whole[..length]) else {
                continue;
            };
            let found = cut["entries"].as_array().map_or(0, Vec::len);
            // A deleted file's content has no length of its own: it may be cut unseen here, and
            // the manifest's sizes tell.
            let may_stay = kind.extra() == Extra::Ghost;
            assert!(
                found < entries || may_stay,
                "{kind:?} cut at {length} of {}",
                whole.len()
            );
        }
    }
}

#[test]
fn truncation_is_reported_with_what_was_expected() {
    let mut bytes = header(ImageKind::PipesData);
    let entry = PipeDataEntry {
        pipe_id: 1,
        bytes: 100,
        size: None,
    };
    put_entry(&prost::Message::encode_to_vec(&entry), &mut bytes);
    bytes.extend([0; 99]);
    let error = decode(ImageKind::PipesData, &bytes)
        .expect_err("cut")
        .to_string();
    assert!(
        error.contains("100 bytes of an entry's data are expected, 99 are left"),
        "{error}"
    );
    let error = decode(ImageKind::Core, &bytes[..6])
        .expect_err("cut")
        .to_string();
    assert!(
        error.contains("at offset 4 4 bytes of a magic are expected, 2 are left"),
        "{error}"
    );
}

#[test]
fn absurd_lengths_are_refused_before_anything_is_allocated() {
    for size in [
        u32::MAX,
        i32::MAX as u32,
        MAX_ENTRY as u32,
        MAX_ENTRY as u32 + 1,
    ] {
        let mut bytes = header(ImageKind::Core);
        bytes.extend(size.to_le_bytes());
        bytes.extend([0; 64]);
        let error = decode(ImageKind::Core, &bytes).expect_err("absurd");
        assert!(
            matches!(
                error,
                ImageError::TooLarge { .. } | ImageError::Truncated { .. }
            ),
            "{error}"
        );
    }
    // Lengths inside a message, and in the fields that say how much follows it.
    let mut body = Vec::new();
    put_varint(2 << 3 | 2, &mut body);
    put_varint(u64::MAX, &mut body);
    assert!(matches!(
        check(CoreEntry::ID, &body),
        Err(WireError::Damaged { .. })
    ));
    for (kind, name, number) in [
        (ImageKind::IpcnsShm, "ipc_shm_entry", 2),
        (ImageKind::IpcnsSem, "ipc_sem_entry", 2),
        (ImageKind::IpcnsMsg, "ipc_msg_entry", 3),
        (ImageKind::TcpStream, "tcp_stream_entry", 3),
        (ImageKind::BpfmapData, "bpfmap_data_entry", 2),
        (ImageKind::PipesData, "pipe_data_entry", 2),
    ] {
        for length in [
            u64::MAX,
            u64::MAX - 3,
            1 << 62,
            u64::from(u32::MAX),
            1 << 31,
        ] {
            let mut body = remove(&message(named(name), &mut Random(3), 0), number);
            if kind == ImageKind::IpcnsShm {
                body = remove(&body, 3);
            }
            put_varint(u64::from(number) << 3, &mut body);
            put_varint(length, &mut body);
            let mut bytes = header(kind);
            put_entry(&body, &mut bytes);
            decode(kind, &bytes).expect_err("nothing follows");
            assert!(
                json::info(reader(kind, &bytes).expect("header")).is_err(),
                "{kind:?} {length}"
            );
        }
    }
}

#[test]
fn deep_nesting_is_refused() {
    let mut body = Vec::new();
    for _ in 0..100_000 {
        let mut outer = Vec::new();
        put_delimited(1, b"x", &mut outer);
        put_delimited(3, &body, &mut outer);
        if outer.len() > 50_000 {
            break;
        }
        body = outer;
    }
    let error = check(named("aa_namespace"), &body).expect_err("too deep");
    assert!(matches!(error, WireError::TooDeep { .. }), "{error}");
}

#[test]
fn a_wrong_magic_names_both() {
    let bytes = header(ImageKind::Mm);
    let error = decode(ImageKind::Core, &bytes)
        .expect_err("another kind")
        .to_string();
    assert!(
        error.contains("no CORE image") && error.contains("0x57492820"),
        "{error}"
    );
    let error = decode(ImageKind::Stats, &bytes)
        .expect_err("another kind")
        .to_string();
    assert!(error.contains("offset 0"), "{error}");
}

#[test]
fn images_of_version_1_have_one_magic() {
    let mut bytes = ImageKind::Core.magic().to_le_bytes().to_vec();
    put_entry(
        &prost::Message::encode_to_vec(&CoreEntry::default()),
        &mut bytes,
    );
    let mut reader = reader(ImageKind::Core, &bytes).expect("header");
    assert_eq!(
        reader.only_message::<CoreEntry>().expect("whole"),
        CoreEntry::default()
    );
}

#[test]
fn five_hundred_cores_are_decoded_fast() {
    let mut random = Random(4);
    let mut bytes = header(ImageKind::Core);
    for _ in 0..500 {
        put_entry(&message(CoreEntry::ID, &mut random, 0), &mut bytes);
    }
    let start = std::time::Instant::now();
    let mut reader = reader(ImageKind::Core, &bytes).expect("header");
    let mut count = 0;
    while reader.next_message::<CoreEntry>().expect("whole").is_some() {
        count += 1;
    }
    let spent = start.elapsed();
    assert_eq!(count, 500);
    println!("{} bytes in {spent:?}", bytes.len());
    // Unoptimised builds take some twenty times longer than the few milliseconds allowed.
    assert!(spent.as_millis() < 500, "{spent:?}");
}
