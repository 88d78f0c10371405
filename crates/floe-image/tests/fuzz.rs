//! A bounded fuzzer: damaged images of every kind, and damaged JSON, go through every decoder.
//!
//! Nothing may panic, and nothing may allocate more than a fixed multiple of its input. The seed is
//! fixed; `FLOE_FUZZ_ROUNDS` makes it longer.

mod support;

use std::io::Cursor;
use std::path::PathBuf;

use floe_image::catalogue::Extra;
use floe_image::framing::entry_message;
use floe_image::json::{self, JsonOptions, Payload, Style, encode_from_json, render};
use floe_image::messages::{CODECS, IpcMsgEntry, PipeDataEntry};
use floe_image::{ImageDir, ImageKind, explore};
use peak_alloc::PeakAlloc;
use serde_json::Value;
use support::{Random, image, kinds};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Bytes that decoding may allocate for each byte of input: an empty message inside takes two
/// bytes in the file and some hundreds as a Rust value.
const PER_BYTE: usize = 2000;
/// Bytes that decoding may allocate for any input: buffers and messages of errors.
const FIXED: usize = 4 << 20;

fn rounds(usual: usize) -> usize {
    let asked = std::env::var("FLOE_FUZZ_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok());
    asked.unwrap_or(usual)
}

fn bounded<T>(input: usize, what: &str, run: impl FnOnce() -> T) -> T {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let outcome = run();
    let spent = ALLOCATOR.peak_usage().saturating_sub(before);
    assert!(
        spent <= FIXED + PER_BYTE * input,
        "{what}: {spent} bytes for an input of {input}"
    );
    outcome
}

/// One to four damages, each of a kind that real ones have.
fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len());
        match random.below(8) {
            0 => bytes.truncate(at),
            1 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            2 if !bytes.is_empty() => bytes[at] = random.next() as u8,
            3 => {
                let run = random.below(9);
                let inserted = random.bytes(run);
                bytes.splice(at..at, inserted);
            }
            4 => {
                let end = (at + random.below(16)).min(bytes.len());
                bytes.drain(at..end);
            }
            5 => {
                let end = (at + random.below(64)).min(bytes.len());
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            // Extreme lengths.
            6 if bytes.len() >= at + 4 => {
                let lengths = [u32::MAX, i32::MAX as u32, 1 << 28, 0, 1];
                bytes[at..at + 4]
                    .copy_from_slice(&lengths[random.below(lengths.len())].to_le_bytes());
            }
            7 if bytes.len() >= at + 10 => {
                bytes[at..at + 10]
                    .copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]);
            }
            _ => {}
        }
    }
}

fn damaged_image(random: &mut Random) -> (ImageKind, Vec<u8>) {
    let kinds = kinds();
    let kind = kinds[random.below(kinds.len())];
    let entries = 1 + random.below(4);
    let mut bytes = image(kind, random, entries);
    damage(&mut bytes, random);
    (kind, bytes)
}

fn reader(bytes: &[u8]) -> Option<json::ImageReader<Cursor<&[u8]>>> {
    json::reader_by_magic(
        Cursor::new(bytes),
        bytes.len() as u64,
        PathBuf::from("fuzz"),
    )
    .ok()
}

/// All in one test: the allocator counts for the whole process.
#[test]
fn no_damage_makes_a_panic_or_a_large_allocation() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    images(&mut random);
    messages(&mut random);
    directories(&mut random);
    json_values(&mut random);
}

fn images(random: &mut Random) {
    let mut whole = 0;
    for _ in 0..rounds(6000) {
        let (kind, bytes) = damaged_image(random);
        let options = JsonOptions {
            style: if random.below(2) == 0 {
                Style::Plain
            } else {
                Style::Pretty
            },
            payload: if random.below(4) == 0 {
                Payload::Omit
            } else {
                Payload::Keep
            },
        };
        let what = format!("{kind:?} {bytes:02x?}");
        let _ = bounded(bytes.len(), &what, || reader(&bytes).map(json::info));
        let found = bounded(bytes.len(), &what, || {
            reader(&bytes).and_then(|reader| json::decode_image(reader, options).ok())
        });
        let Some(found) = found else { continue };
        if options.payload == Payload::Omit {
            continue;
        }
        // What can be decoded can be encoded, and is the same when decoded again.
        whole += 1;
        let encoded = encode_from_json(&found).unwrap_or_else(|error| panic!("{error}: {what}"));
        let again =
            reader(&encoded).map(|reader| json::decode_image(reader, options).expect("our own"));
        assert_eq!(again, Some(found), "{what}");
    }
    assert!(whole > 0);
}

fn messages(random: &mut Random) {
    for _ in 0..rounds(6000) {
        let codec = random.below(CODECS.len());
        let id = floe_image::schema::MessageId(codec as u16);
        let mut bytes = support::message(id, random, 0);
        damage(&mut bytes, random);
        let what = format!("{} {bytes:02x?}", CODECS[codec].name);
        let _ = bounded(bytes.len(), &what, || (CODECS[codec].decode)(&bytes));
        let _ = bounded(bytes.len(), &what, || (CODECS[codec].transcode)(&bytes));
    }
}

/// The typed readers and explorers, on a directory with one damaged image.
fn directories(random: &mut Random) {
    let temporary = tempfile::tempdir().expect("a directory");
    for round in 0..rounds(600) {
        let path = temporary.path().join((round % 8).to_string());
        std::fs::create_dir_all(&path).expect("a directory");
        let (kind, bytes) = damaged_image(random);
        std::fs::write(path.join(kind.file_name(1)), &bytes).expect("a file");
        let dir = ImageDir::open(&path).expect("open");
        let input: usize = std::fs::read_dir(&path)
            .expect("list")
            .map(|file| {
                file.and_then(|file| file.metadata())
                    .map_or(0, |data| data.len() as usize)
            })
            .sum();
        bounded(input, &format!("{kind:?}"), || {
            let _ = dir.read_files();
            let _ = (dir.read_core(1), dir.read_mm(1), dir.read_ids(1));
            let _ = dir.open_ghost(1);
            let _ = dir.read_tcp_stream(1);
            let _ = dir.read_message_queues(1);
            let _ = dir.read_pagemap(ImageKind::Pagemap, 1);
            let _ = dir.read_with_extra::<PipeDataEntry>(ImageKind::PipesData, 1);
            let _ = dir.read_optional::<IpcMsgEntry>(ImageKind::IpcnsMsg, 1);
            let _ = (explore::tasks(&dir), explore::descriptors(&dir));
            let _ = (explore::mappings(&dir), explore::pages(&dir));
            explore::list(&dir).expect("a list names damaged images too");
        });
    }
}

/// Whole images as JSON with values replaced, and JSON text with bytes damaged.
fn json_values(random: &mut Random) {
    let kinds = kinds();
    for _ in 0..rounds(3000) {
        let kind = kinds[random.below(kinds.len())];
        debug_assert!(entry_message(kind, 0).is_some() || kind.extra() == Extra::None);
        let bytes = image(kind, random, 2);
        let options = JsonOptions {
            style: Style::Pretty,
            payload: Payload::Keep,
        };
        let reader = reader(&bytes).expect("whole");
        let mut value = json::decode_image(reader, options).expect("whole");
        for _ in 0..1 + random.below(3) {
            replace(&mut value, random);
        }
        let mut text = render(&value, options.style).into_bytes();
        let _ = bounded(text.len(), "JSON value", || encode_from_json(&value));
        damage(&mut text, random);
        if let Ok(value) = serde_json::from_slice::<Value>(&text) {
            let _ = bounded(text.len(), "JSON text", || encode_from_json(&value));
        }
    }
}

/// Puts something else in some place of the value.
fn replace(value: &mut Value, random: &mut Random) {
    let inside = match value {
        Value::Array(list) if !list.is_empty() && random.below(8) != 0 => {
            let place = random.below(list.len());
            list.get_mut(place)
        }
        Value::Object(map) if !map.is_empty() && random.below(8) != 0 => {
            let place = random.below(map.len());
            map.values_mut().nth(place)
        }
        _ => None,
    };
    if let Some(inside) = inside {
        return replace(inside, random);
    }
    let others = [
        Value::Null,
        true.into(),
        u64::MAX.into(),
        (-1).into(),
        1e300.into(),
        "".into(),
        "0x".into(),
        "-0x8000000000000000".into(),
        "1:".into(),
        "99999999999:4294967295".into(),
        "=4".into(),
        "\u{1d11e}".into(),
        "::1".into(),
        " | 0xffffffffffffffff | ".into(),
        serde_json::json!([]),
        serde_json::json!({}),
        serde_json::json!([[]]),
        serde_json::json!({"inq": 1}),
    ];
    *value = others[random.below(others.len())].clone();
}
