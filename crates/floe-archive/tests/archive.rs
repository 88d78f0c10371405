//! Packing, unpacking and squashing of chains: every page must be the newest.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use floe_archive::archive::{ArchiveError, open_set};
use floe_archive::compress::compress;
use floe_archive::pack::{PackOptions, pack};
use floe_archive::squash::{squash, squash_in_place};
use floe_archive::unpack::{UnpackError, UnpackLimits, unpack, unpack_set};
use floe_image::frames::{Codec, FrameWriter};
use floe_image::manifest::{Manifest, Verify};
use floe_image::{ImageDir, ImageKind};
use floe_memory::PageIndex;
use testkit::chain::{Page, Pages, filled, write_chain};

const LIMITS: UnpackLimits = UnpackLimits { bytes: 1 << 30 };

/// First byte of each page by its address.
type Content = BTreeMap<u64, u8>;

fn content(dir: &ImageDir) -> Content {
    let index = PageIndex::read(dir, ImageKind::Pagemap, 7).expect("an index");
    let mut content = Content::new();
    for run in index.runs() {
        let pages = index.open(run.file).expect("pages");
        let mut bytes = vec![0; run.len as usize];
        pages.read_exact_at(&mut bytes, run.offset).expect("read");
        for (number, page) in bytes.chunks(4096).enumerate() {
            assert!(
                page.iter().all(|byte| *byte == page[0]),
                "a page is of one piece"
            );
            content.insert(run.start + number as u64 * 4096, page[0]);
        }
    }
    content
}

/// Generations in which pages stay, change, come and go; and what a restore must see.
fn example(root: &Path, count: u64) -> (Vec<PathBuf>, Content) {
    let mut generations: Vec<Pages> = Vec::new();
    let mut now = Content::new();
    for generation in 0..count {
        let mut pages = Pages::new();
        let before = std::mem::take(&mut now);
        for number in 0..300u64 {
            let address = 0x10_0000 + number * 4096 + (number / 100) * 0x10_0000;
            let gone = number % 17 == generation % 17;
            let changed = number % (generation + 2) == 0;
            let page = match before.get(&address) {
                _ if gone => continue,
                Some(byte) if !changed => {
                    now.insert(address, *byte);
                    Page::InParent
                }
                _ => {
                    let byte = (number * 7 + generation * 31) as u8;
                    now.insert(address, byte);
                    filled(byte)
                }
            };
            pages.insert(address, page);
        }
        generations.push(pages);
    }
    (write_chain(root, &generations).expect("a chain"), now)
}

fn packed(dir: &Path, since: Option<u32>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let options = PackOptions {
        since,
        level: 1,
        threads: 2,
    };
    pack(&ImageDir::open(dir).expect("opened"), &mut bytes, &options).expect("packed");
    bytes
}

fn saved(root: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = root.join(name);
    fs::write(&path, bytes).expect("written");
    path
}

#[test]
fn an_archive_holds_the_newest_of_each_page_and_reads_like_a_directory() {
    let root = tempfile::tempdir().expect("a directory");
    let (chain, wanted) = example(root.path(), 4);
    assert_eq!(content(&ImageDir::open(&chain[3]).expect("opened")), wanted);
    let archive = saved(root.path(), "a.floe", &packed(&chain[3], None));
    let images = open_set(std::slice::from_ref(&archive)).expect("opened");
    assert_eq!(content(&images), wanted);
    let manifest = Manifest::read(&images).expect("read").expect("there");
    assert_eq!((manifest.generation, &manifest.parent), (3, &None));
    assert_eq!(
        manifest.files["pages-1.img"].size,
        wanted.len() as u64 * 4096
    );
}

#[test]
fn unpacking_gives_a_checkpoint_whose_checksums_hold() {
    let root = tempfile::tempdir().expect("a directory");
    let (chain, wanted) = example(root.path(), 3);
    let out = root.path().join("out");
    unpack(Cursor::new(packed(&chain[2], None)), &out, LIMITS).expect("unpacked");
    let dir = ImageDir::open(&out).expect("opened");
    assert_eq!(content(&dir), wanted);
    let manifest = Manifest::read(&dir).expect("read").expect("there");
    manifest
        .verify(&dir, Verify::Hashes)
        .expect("every checksum");
}

#[test]
fn tar_and_zstd_read_an_archive() {
    let root = tempfile::tempdir().expect("a directory");
    let (chain, wanted) = example(root.path(), 3);
    let archive = saved(root.path(), "a.tar.zst", &packed(&chain[2], None));
    let mut command = Command::new("sh");
    command
        .args(["-c", "zstd -dcq \"$0\" | tar -C \"$1\" -x"])
        .arg(&archive)
        .arg(root.path());
    match Command::new("zstd").arg("--version").output() {
        Ok(_) => assert!(command.status().expect("sh").success()),
        Err(error) => {
            eprintln!("skipped: no zstd: {error}");
            return;
        }
    }
    let dir = ImageDir::open(root.path().join("checkpoint")).expect("unpacked by tar");
    assert_eq!(content(&dir), wanted);
}

#[test]
fn base_and_increments_are_one_checkpoint_in_any_order() {
    let root = tempfile::tempdir().expect("a directory");
    let (chain, wanted) = example(root.path(), 6);
    let base = saved(root.path(), "base", &packed(&chain[1], None));
    let first = saved(root.path(), "first", &packed(&chain[3], Some(1)));
    let second = saved(root.path(), "second", &packed(&chain[5], Some(3)));
    for order in [
        [&base, &first, &second],
        [&second, &base, &first],
        [&first, &second, &base],
    ] {
        let paths: Vec<PathBuf> = order.into_iter().cloned().collect();
        assert_eq!(content(&open_set(&paths).expect("a set")), wanted);
        let out = tempfile::tempdir().expect("a directory");
        unpack_set(&paths, out.path(), LIMITS).expect("unpacked");
        assert_eq!(
            content(&ImageDir::open(out.path()).expect("opened")),
            wanted
        );
    }
    // An archive that reaches further back than needed is as good.
    let long = saved(root.path(), "long", &packed(&chain[3], None));
    assert_eq!(content(&open_set(&[second, long]).expect("a set")), wanted);
}

#[test]
fn a_hole_and_a_foreign_base_are_refused_by_name() {
    let root = tempfile::tempdir().expect("a directory");
    let (chain, _) = example(root.path(), 6);
    let base = saved(root.path(), "base", &packed(&chain[1], None));
    let second = saved(root.path(), "second", &packed(&chain[5], Some(3)));
    let error = open_set(&[second.clone(), base.clone()]).expect_err("a hole");
    let text = error.to_string();
    assert!(
        matches!(
            error,
            ArchiveError::Hole {
                generation: 3,
                since: Some(1),
                ..
            }
        ),
        "{text}"
    );
    assert!(
        text.contains("Generation 3 is missing") && text.contains("--since 1"),
        "{text}"
    );
    let error = open_set(std::slice::from_ref(&base)).expect_err("no final dump");
    assert!(error.to_string().contains("--since 1"), "{error}");

    let other = tempfile::tempdir().expect("a directory");
    let (others, _) = example(other.path(), 7);
    let foreign = saved(other.path(), "foreign", &packed(&others[4], None));
    let error = open_set(&[second, foreign]).expect_err("another chain");
    assert!(matches!(error, ArchiveError::OtherChain { .. }), "{error}");

    // Both go on from generation 3, and have another generation 4.
    let shared = "floe.json";
    fs::copy(chain[3].join(shared), others[3].join(shared)).expect("copied");
    let branch = saved(other.path(), "branch", &packed(&others[6], Some(3)));
    let trunk = saved(root.path(), "trunk", &packed(&chain[4], None));
    let error = open_set(&[branch, trunk]).expect_err("another branch");
    assert!(matches!(error, ArchiveError::OtherChain { .. }), "{error}");
}

#[test]
fn a_damaged_or_cut_archive_is_refused_and_leaves_nothing() {
    let root = tempfile::tempdir().expect("a directory");
    let (chain, _) = example(root.path(), 2);
    let whole = packed(&chain[1], None);
    for (name, bytes) in [
        ("cut", whole[..whole.len() / 2].to_vec()),
        ("flipped", {
            let mut bytes = whole.clone();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
            bytes
        }),
    ] {
        let out = root.path().join(name);
        assert!(unpack(Cursor::new(&bytes), &out, LIMITS).is_err(), "{name}");
        assert!(!out.exists(), "{name}: the directory was made for it");
    }
    let cut = saved(root.path(), "cut.floe", &whole[..whole.len() - 3]);
    assert!(open_set(&[cut]).is_err());
    let small = UnpackLimits { bytes: 1000 };
    let refused = unpack(Cursor::new(&whole), &root.path().join("small"), small);
    assert!(matches!(refused, Err(UnpackError::TooLarge { .. })));
}

/// An archive with one member as given.
fn hostile(name: &[u8], kind: tar::EntryType, link: &str) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_entry_type(kind);
    header.set_size(if kind == tar::EntryType::Regular {
        4
    } else {
        0
    });
    if !link.is_empty() {
        header.set_link_name(link).expect("a link");
    }
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    if kind == tar::EntryType::Regular {
        bytes.extend_from_slice(b"evil");
    }
    bytes.resize(bytes.len().next_multiple_of(512) + 1024, 0);
    let mut frames = FrameWriter::new(Vec::new(), Codec::Zstd(1), 1).expect("threads");
    frames.write_all(&bytes).expect("memory");
    frames.finish().expect("memory").0
}

#[test]
fn names_that_lead_elsewhere_links_and_devices_are_refused() {
    use tar::EntryType;
    let root = tempfile::tempdir().expect("a directory");
    let members: [(&[u8], EntryType, &str); 10] = [
        (b"../evil", EntryType::Regular, ""),
        (b"checkpoint/../../evil", EntryType::Regular, ""),
        (b"/tmp/evil", EntryType::Regular, ""),
        (b"checkpoint//evil", EntryType::Regular, ""),
        (b"checkpoint/a/evil", EntryType::Regular, ""),
        (b"checkpoint/parent", EntryType::Regular, ""),
        (b"checkpoint/link", EntryType::Symlink, "/etc"),
        (b"checkpoint/link", EntryType::Link, "/etc/passwd"),
        (b"checkpoint/null", EntryType::Char, ""),
        (b"checkpoint/fifo", EntryType::Fifo, ""),
    ];
    for (number, (name, kind, link)) in members.into_iter().enumerate() {
        let out = root.path().join(format!("inside/{number}"));
        fs::create_dir_all(&out).expect("made");
        let outcome = unpack(Cursor::new(hostile(name, kind, link)), &out, LIMITS);
        assert!(
            matches!(outcome, Err(UnpackError::Refused { .. })),
            "{number}: {outcome:?}"
        );
        assert_eq!(fs::read_dir(&out).expect("there").count(), 0, "{number}");
    }
    assert!(!root.path().join("evil").exists() && !root.path().join("inside/evil").exists());
}

#[test]
fn a_squashed_chain_is_one_full_checkpoint() {
    let root = tempfile::tempdir().expect("a directory");
    let (chain, wanted) = example(root.path(), 5);
    let out = root.path().join("out");
    let report = squash(&ImageDir::open(&chain[4]).expect("opened"), &out).expect("squashed");
    assert_eq!(
        (report.generations, report.bytes),
        (5, wanted.len() as u64 * 4096)
    );
    squash_in_place(&chain[4]).expect("squashed");
    for path in [&out, &chain[4]] {
        let dir = ImageDir::open(path).expect("opened");
        assert!(dir.parent().expect("no link").is_none());
        assert_eq!(content(&dir), wanted);
        let manifest = Manifest::read(&dir).expect("read").expect("there");
        assert_eq!(manifest.generation, 4);
        manifest.verify(&dir, Verify::Hashes).expect("as it says");
    }
    assert_eq!(
        fs::read_dir(root.path()).expect("there").count(),
        6,
        "nothing is left behind"
    );
}

#[test]
fn compressed_pages_read_as_plain_ones_and_the_manifest_says_so() {
    for codec in ["lz4", "zstd", "zstd:-3"] {
        let root = tempfile::tempdir().expect("a directory");
        let (chain, wanted) = example(root.path(), 3);
        for directory in &chain {
            compress(directory, Codec::parse(codec).expect("known"), 2).expect("compressed");
            assert!(!directory.join("pages-1.img").exists());
        }
        let dir = ImageDir::open(&chain[2]).expect("opened");
        assert_eq!(content(&dir), wanted, "{codec}");
        let manifest = Manifest::read(&dir).expect("read").expect("there");
        assert!(manifest.compression.expect("said").starts_with(&codec[..3]));
        let manifest = Manifest::read(&dir).expect("read").expect("there");
        manifest
            .verify(&dir, Verify::Hashes)
            .expect("every checksum");
        let archive = saved(root.path(), "archive", &packed(&chain[2], None));
        assert_eq!(content(&open_set(&[archive]).expect("opened")), wanted);
        squash_in_place(&chain[2]).expect("squashed");
        let dir = ImageDir::open(&chain[2]).expect("opened");
        assert_eq!(content(&dir), wanted);
    }
}

#[test]
fn a_set_that_cannot_be_unpacked_leaves_nothing_and_spares_what_is_there() {
    let root = tempfile::tempdir().expect("a directory");
    let (chain, _) = example(root.path(), 4);
    let base = saved(root.path(), "base", &packed(&chain[1], None));
    let mut bytes = packed(&chain[3], Some(1));
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x55;
    let damaged = saved(root.path(), "damaged", &bytes);
    let paths = [base, damaged];
    let out = root.path().join("out");
    unpack_set(&paths, &out, LIMITS).expect_err("damaged");
    assert!(!out.exists());
    fs::create_dir(&out).expect("made");
    unpack_set(&paths, &out, LIMITS).expect_err("damaged");
    assert_eq!(fs::read_dir(&out).expect("there").count(), 0);
    fs::write(out.join("other"), "x").expect("written");
    unpack_set(&paths, &out, LIMITS).expect_err("not empty");
    assert_eq!(fs::read_dir(&out).expect("there").count(), 1);
}
