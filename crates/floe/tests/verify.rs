//! What `floe verify` and `floe restore` say of a checkpoint that is not whole. No process is made.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use testkit::chain::{Page, Pages, filled, write_chain};

fn floe(command: &str, directory: &Path) -> Output {
    let words = match command {
        "verify" | "squash" | "inspect" | "report" => vec![command],
        _ => vec!["restore", "--no-default-config", "-d", "-D"],
    };
    let output = Command::new(env!("CARGO_BIN_EXE_floe"))
        .args(words)
        .arg(directory)
        .output();
    output.expect("the binary runs")
}

fn said(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&text).into_owned()
}

/// Two generations of some pages.
fn chain(root: &Path) -> Vec<PathBuf> {
    let pages: Vec<u64> = (0..20).map(|number| 0x10000 + number * 4096).collect();
    let old: Pages = pages.iter().map(|address| (*address, filled(1))).collect();
    let changed = |address: &u64| match address % 8192 {
        0 => filled(2),
        _ => Page::InParent,
    };
    let new: Pages = pages
        .iter()
        .map(|address| (*address, changed(address)))
        .collect();
    write_chain(root, &[old, new]).expect("a chain")
}

/// Both commands refuse the directory and say all of these.
fn refused(directory: &Path, wanted: &[&str]) {
    for command in ["restore", "verify"] {
        let output = floe(command, directory);
        let text = said(&output);
        assert_eq!(output.status.code(), Some(5), "{command}: {text}");
        for part in wanted {
            assert!(text.contains(part), "{command}: `{part}` is not in: {text}");
        }
        assert!(!text.contains("empty-image"), "{text}");
    }
}

#[test]
fn a_link_to_another_generation_is_refused() {
    let root = tempfile::tempdir().expect("a directory");
    let full: Pages = (0..4).map(|number| (number * 4096, filled(1))).collect();
    let again: Pages = (0..4)
        .map(|number| (number * 4096, Page::InParent))
        .collect();
    let chain = write_chain(root.path(), &[full, again.clone(), again]).expect("a chain");
    let link = chain[2].join("parent");
    std::fs::remove_file(&link).expect("there");
    std::os::unix::fs::symlink("../0", &link).expect("made");
    let wanted = ["builds on generation 1", "leads to generation 0"];
    refused(&chain[2], &wanted);
    for command in ["squash", "pack"] {
        let mut floe = Command::new(env!("CARGO_BIN_EXE_floe"));
        floe.arg(command).arg(&chain[2]);
        if command == "pack" {
            floe.arg("-o").arg(root.path().join("archive"));
        }
        let output = floe.output().expect("the binary runs");
        let text = said(&output);
        assert_eq!(output.status.code(), Some(5), "{command}: {text}");
        assert!(text.contains(wanted[1]), "{command}: {text}");
    }
}

#[test]
fn a_parent_that_another_dump_took_the_place_of_is_refused() {
    let [root, other] = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
    let (ours, others) = (chain(root.path()), chain(other.path()));
    for file in std::fs::read_dir(&others[0]).expect("read") {
        let file = file.expect("read");
        std::fs::copy(file.path(), ours[0].join(file.file_name())).expect("copied");
    }
    let wanted = ["builds on another checkpoint than the one that is in"];
    refused(&ours[1], &wanted);
    let mut pack = Command::new(env!("CARGO_BIN_EXE_floe"));
    pack.arg("pack").arg(&ours[1]).arg("-o");
    let output = pack.arg(root.path().join("archive")).output();
    let text = said(&output.expect("the binary runs"));
    assert!(text.contains(wanted[0]), "{text}");
}

#[test]
fn what_builds_on_an_absent_generation_says_so() {
    let root = tempfile::tempdir().expect("a directory");
    let chain = chain(root.path());
    let increment = root.path().join("increment");
    let mut pack = Command::new(env!("CARGO_BIN_EXE_floe"));
    pack.arg("pack").arg(&chain[1]).args(["--since", "0", "-o"]);
    let output = pack.arg(&increment).output().expect("the binary runs");
    assert!(output.status.success(), "{}", said(&output));
    for command in ["verify", "inspect", "report"] {
        let output = floe(command, &increment);
        let text = said(&output);
        assert_eq!(output.status.code(), Some(5), "{command}: {text}");
        let wanted = "is an increment: it builds on generation 0, which is not in it";
        assert!(text.contains(wanted), "{command}: {text}");
    }
    std::fs::remove_file(chain[1].join("parent")).expect("there");
    refused(&chain[1], &["its link `parent` is missing", "ln -s ../0 "]);
}

#[test]
fn compressed_pages_that_are_replaced_stay_and_are_named() {
    let root = tempfile::tempdir().expect("a directory");
    let chain = chain(root.path());
    floe_archive::compress::compress(&chain[0], floe_image::frames::Codec::Lz4, 1)
        .expect("compressed");
    let mut dedup = Command::new(env!("CARGO_BIN_EXE_floe"));
    dedup
        .args(["dedup", "--no-default-config", "-D"])
        .arg(&chain[1]);
    let output = dedup.output().expect("the binary runs");
    let text = said(&output);
    assert!(output.status.success(), "{text}");
    assert!(
        text.contains("are compressed") && text.contains("floe squash"),
        "{text}"
    );
}

#[test]
fn a_generation_that_was_squashed_is_still_the_parent() {
    let root = tempfile::tempdir().expect("a directory");
    let full: Pages = (0..4).map(|number| (number * 4096, filled(1))).collect();
    let same = |number: u64| (number * 4096, Page::InParent);
    let again: Pages = (0..4).map(same).collect();
    let chain = write_chain(root.path(), &[full, again.clone(), again]).expect("a chain");
    let output = floe("squash", &chain[1]);
    assert!(output.status.success(), "{}", said(&output));
    let text = said(&floe("verify", &chain[2]));
    assert!(text.contains("2 generations, all of them there"), "{text}");
}

#[test]
fn a_dump_into_a_used_directory_builds_on_nothing() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: not root");
        return;
    }
    let mut fixture = testkit::Fixture::start("busy").expect("started");
    let images = fixture.images().to_path_buf();
    std::fs::create_dir_all(&images).expect("made");
    std::os::unix::fs::symlink(".", images.join("parent")).expect("made");
    let stale = images.join("pagemap-4194303.img");
    std::fs::write(&stale, "of a program that was dumped here before").expect("written");
    let engine = testkit::Engine::new("floe", env!("CARGO_BIN_EXE_floe"));
    fixture.dump(&engine, &[]).expect("dumped");
    assert!(std::fs::symlink_metadata(images.join("parent")).is_err());
    assert!(!stale.exists(), "it would be packed as a part of this one");
    fixture.restore(&engine, &[]).expect("restored");
    fixture.check().expect("as it was");
    fixture.kill().expect("ours");
}

#[test]
fn images_one_directory_too_deep_are_found() {
    let root = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(root.path().join("copy")).expect("made");
    chain(&root.path().join("copy"));
    let meant = root.path().join("copy/1");
    refused(
        &root.path().join("copy"),
        &["inventory.img is missing", "a checkpoint is in", "copy/1"],
    );
    refused(
        root.path(),
        &["inventory.img is missing", "a checkpoint is in"],
    );
    assert!(meant.is_dir());
}

#[test]
fn an_empty_directory_is_called_so() {
    let root = tempfile::tempdir().expect("a directory");
    let inner = root.path().join("a/b");
    std::fs::create_dir_all(&inner).expect("made");
    refused(
        &inner,
        &["inventory.img is missing in", "the directory is empty"],
    );
}

#[test]
fn half_a_copy_is_named_file_by_file() {
    let root = tempfile::tempdir().expect("a directory");
    let newest = chain(root.path()).pop().expect("two");
    std::fs::remove_file(newest.join("core-7.img")).expect("removed");
    let pages = std::fs::File::options()
        .write(true)
        .open(newest.join("pages-1.img"))
        .expect("there");
    pages.set_len(4096).expect("cut");
    refused(
        &newest,
        &[
            "core-7.img is missing in",
            "pages-1.img has 4096 bytes, 40960 when it was made",
        ],
    );
    let text = said(&floe("verify", &newest));
    assert_eq!(text.matches("core-7.img is missing").count(), 1, "{text}");
}

#[test]
fn a_file_that_was_left_elsewhere_is_found_there() {
    let root = tempfile::tempdir().expect("a directory");
    let newest = chain(root.path()).pop().expect("two");
    std::fs::create_dir(root.path().join("rest")).expect("made");
    std::fs::rename(newest.join("mm-7.img"), root.path().join("rest/mm-7.img")).expect("moved");
    refused(
        &newest,
        &[
            "mm-7.img is missing in",
            "it is in",
            "/rest",
            "bring it back",
        ],
    );
}

#[test]
fn a_file_of_the_same_name_of_another_checkpoint_is_not_proposed() {
    let root = tempfile::tempdir().expect("a directory");
    let newest = chain(root.path()).pop().expect("two");
    std::fs::create_dir(root.path().join("other")).expect("made");
    std::fs::write(root.path().join("other/mm-7.img"), "another").expect("written");
    std::fs::remove_file(newest.join("mm-7.img")).expect("removed");
    refused(&newest, &["mm-7.img is missing in", "copy all files"]);
    assert!(!said(&floe("verify", &newest)).contains("/other"));
}

#[test]
fn a_pre_dump_alone_leads_to_the_dump_that_builds_on_it() {
    let root = tempfile::tempdir().expect("a directory");
    let chain = chain(root.path());
    let newest = chain[1].display().to_string();
    refused(&chain[0], &["is a pre-dump", "generation 0", &newest]);
}

#[test]
fn a_broken_parent_link_is_named_with_the_place_of_the_generation() {
    let root = tempfile::tempdir().expect("a directory");
    let chain = chain(root.path());
    std::fs::create_dir(root.path().join("moved")).expect("made");
    std::fs::rename(&chain[0], root.path().join("moved/0")).expect("moved");
    refused(
        &chain[1],
        &["the link `parent`", "leads to ../0", "moved/0"],
    );
}

#[test]
fn damage_is_found_by_the_checksums() {
    let root = tempfile::tempdir().expect("a directory");
    let chain = chain(root.path());
    let output = floe("verify", &chain[1]);
    // The images are whole, although no task can be made of them.
    assert!(
        said(&output).contains("generation 1: 7 files are as they were made"),
        "{}",
        said(&output)
    );
    let path = chain[0].join("pages-1.img");
    let mut pages = std::fs::read(&path).expect("read");
    pages[5000] ^= 1;
    std::fs::write(&path, pages).expect("written");
    let output = floe("verify", &chain[1]);
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
    assert!(
        said(&output).contains("pages-1.img is not as it was"),
        "{}",
        said(&output)
    );
}

#[test]
fn pages_in_an_archive_are_compared_with_their_checksums() {
    let root = tempfile::tempdir().expect("a directory");
    let newest = chain(root.path()).pop().expect("two");
    let archive = root.path().join("archive");
    let packed = Command::new(env!("CARGO_BIN_EXE_floe"))
        .arg("pack")
        .arg(&newest)
        .arg("-o")
        .arg(&archive)
        .output()
        .expect("the binary runs");
    assert!(packed.status.success(), "{}", said(&packed));
    let output = floe("verify", &archive);
    let text = said(&output);
    assert!(
        text.contains("generation 1: 7 files are as they were made"),
        "{text}"
    );
    assert!(!text.contains("not as it was"), "{text}");
}
