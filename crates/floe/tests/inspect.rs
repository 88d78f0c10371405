//! `floe inspect` and `floe report` of a chain.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use testkit::chain::{Page, Pages, filled, write_chain};
use testkit::{Engine, Fixture};

fn floe(words: &[&str], path: &Path) -> Output {
    let output = Command::new(env!("CARGO_BIN_EXE_floe"))
        .args(words)
        .arg(path)
        .output();
    let output = output.expect("the binary runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}");
    output
}

/// Ten pages, of which three change in the second generation.
fn chain(root: &Path) -> PathBuf {
    let old: Pages = (0..10).map(|number| (number * 4096, filled(1))).collect();
    let new = |number: u64| {
        if number < 3 {
            filled(2)
        } else {
            Page::InParent
        }
    };
    let new: Pages = (0..10).map(|number| (number * 4096, new(number))).collect();
    write_chain(root, &[old, new]).expect("a chain").remove(1)
}

#[test]
fn json_says_what_each_generation_copied() {
    let root = tempfile::tempdir().expect("a directory");
    let output = floe(&["inspect", "--json"], &chain(root.path()));
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(value["kind"], "full");
    assert_eq!(value["generations"][0]["copied"], 40960);
    assert_eq!(value["generations"][1]["copied"], 3 * 4096);
    assert_eq!(value["generations"][1]["unchanged"], 7 * 4096);
    assert_eq!(value["tasks"][0]["comm"], "example");
}

#[test]
fn a_pre_dump_says_how_much_memory_it_has() {
    let root = tempfile::tempdir().expect("a directory");
    let newest = chain(root.path());
    for (directory, wanted) in [
        ("0", "pre-dump, 0 tasks, 40.0 KiB of pages"),
        ("1", ", 40.0 KiB of pages"),
    ] {
        let output = floe(&["inspect"], &newest.with_file_name(directory));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains(wanted), "{text}");
    }
}

#[test]
fn the_tables_name_tasks_and_generations() {
    let root = tempfile::tempdir().expect("a directory");
    let output = floe(&["inspect"], &chain(root.path()));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for part in [
        "2 generations",
        "pre-dump",
        "12.0 KiB",
        "28.0 KiB",
        "example",
        "running",
    ] {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn shared_memory_is_counted_once() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: not root");
        return;
    }
    let mut fixture = Fixture::start("memory-shared").expect("started");
    let engine = Engine::new("floe", env!("CARGO_BIN_EXE_floe"));
    fixture.dump(&engine, &[]).expect("dumped");
    let output = floe(&["inspect", "--json"], fixture.images());
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let segments = value["segments"].as_array().expect("a list");
    assert!(!segments.is_empty(), "{value}");
    let name = |id: u64| fixture.images().join(format!("pagemap-shmem-{id}.img"));
    for segment in segments {
        let id = segment["id"].as_u64().expect("a number");
        assert!(name(id).exists(), "{segment}");
        assert!(segment["size"].as_u64() > Some(0), "{segment}");
        assert_ne!(
            segment["pids"].as_array().map(Vec::len),
            Some(0),
            "{segment}"
        );
    }
    let page = fixture.images().with_extension("html");
    floe(&["report", "-o", &page.to_string_lossy()], fixture.images());
    let page = std::fs::read_to_string(page).expect("written");
    let object = segments[0]["object"].as_str().expect("text");
    assert!(page.contains(object), "{object} is not in the report");
}

#[test]
fn a_report_is_one_page_that_loads_nothing() {
    let root = tempfile::tempdir().expect("a directory");
    let chain = chain(root.path());
    let page = root.path().join("report.html");
    floe(&["report", "-o", &page.to_string_lossy()], &chain);
    let text = std::fs::read_to_string(&page).expect("written");
    for part in [
        "<svg",
        "Rounds",
        "generation 1: 12.0 KiB copied",
        "prefers-color-scheme:dark",
        "width=device-width",
    ] {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
    for part in ["src=", "href=", "@import", "url(", "<script"] {
        assert!(!text.contains(part), "`{part}` is in it");
    }
}

#[test]
fn an_archive_remembers_its_rounds() {
    let root = tempfile::tempdir().expect("a directory");
    let chain = chain(root.path());
    let archive = root.path().join("archive");
    floe(&["pack", "-o", &archive.to_string_lossy()], &chain);
    let output = floe(&["inspect", "--json"], &archive);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(value["directories"], 1);
    assert_eq!(value["generations"][0]["copied"], 40960);
    assert_eq!(value["generations"][1]["unchanged"], 7 * 4096);
    assert!(value["generations"][1]["dirty_rate"].is_u64(), "{value:#}");
}
