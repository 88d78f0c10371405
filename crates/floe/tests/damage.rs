//! Every file of a checkpoint deleted, cut and changed in turn: no process is made, the message names the file
//! with what to do, and the exit code says that the images are at fault. Needs root; says `skipped` without.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, ensure};
use testkit::skips::as_root;
use testkit::{Engine, Fixture, process};

const NOT_WHOLE: i32 = 5;

fn engine() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

fn floe(words: &[&str], path: &Path) -> anyhow::Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
    command.args(words).arg(path);
    Ok(command.stdin(Stdio::null()).output()?)
}

/// A program's checkpoint, and a copy of it that is damaged.
struct Victim {
    fixture: Fixture,
    whole: PathBuf,
    copy: PathBuf,
    options: Vec<&'static str>,
}

impl Victim {
    /// The newest images are in `newest` below the directory of all.
    fn new(fixture: Fixture) -> Victim {
        let whole = fixture.images().to_path_buf();
        let copy = whole.with_extension("copy");
        let options = fixture.program.options.to_vec();
        Victim {
            fixture,
            whole,
            copy,
            options,
        }
    }

    /// All files of images in the checkpoint, relative to its directory.
    fn files(&self) -> anyhow::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        let mut left = vec![self.whole.clone()];
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(&directory)? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if path.is_dir() && !path.is_symlink() {
                    left.push(path);
                } else if name.ends_with(".img") {
                    found.push(path.strip_prefix(&self.whole)?.to_path_buf());
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// The copy as the checkpoint is.
    fn fresh(&self) -> anyhow::Result<()> {
        let _ = fs::remove_dir_all(&self.copy);
        let mut copy = Command::new("cp");
        let copied = copy.arg("-a").args([&self.whole, &self.copy]).status()?;
        ensure!(copied.success(), "copying");
        Ok(())
    }

    /// A restore and a look at the copy; both refuse it, and name `file`.
    fn refused(&self, newest: &str, file: &Path, what: &str) -> anyhow::Result<()> {
        let images = self.copy.join(newest);
        let restore = [&["restore", "-d"], &self.options[..], &["-D"]].concat();
        for words in [&restore[..], &["verify"]] {
            let output = floe(words, &images)?;
            self.told(&output, file)
                .with_context(|| format!("{words:?}, {} {what}", file.display()))?;
        }
        Ok(())
    }

    fn told(&self, output: &Output, file: &Path) -> anyhow::Result<()> {
        let text = [&output.stdout[..], &output.stderr[..]].concat();
        let text = String::from_utf8_lossy(&text);
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        ensure!(
            output.status.code() == Some(NOT_WHOLE),
            "{}: {text}",
            output.status
        );
        ensure!(text.contains(&*name), "{name} is not named: {text}");
        let remedy = text.contains("what to do: ") || text.contains("-> ");
        ensure!(remedy && !text.contains("panicked"), "{text}");
        ensure!(!process::exists(self.fixture.pid), "the task is there");
        Ok(())
    }
}

/// Deletes, empties, cuts and changes each file of the checkpoint whose newest images are in `newest`.
fn damage_each(victim: &Victim, newest: &str) -> anyhow::Result<()> {
    for file in victim.files()? {
        let path = victim.copy.join(&file);
        victim.fresh()?;
        fs::remove_file(&path)?;
        victim.refused(newest, &file, "deleted")?;
        let whole = fs::read(victim.whole.join(&file))?;
        for length in [0, whole.len() - 1] {
            victim.fresh()?;
            fs::write(&path, &whole[..length])?;
            victim.refused(newest, &file, "cut")?;
        }
        victim.fresh()?;
        let mut changed = whole;
        let middle = changed.len() / 2;
        changed[middle] ^= 0x41;
        fs::write(&path, &changed)?;
        let name = file.file_name().context("a file")?.to_string_lossy();
        if !name.starts_with("pages-") {
            victim.refused(newest, &file, "changed")?;
            continue;
        }
        // A restore does not compare what is in a directory's pages, so this is for `verify`.
        let output = floe(&["verify"], &victim.copy.join(newest))?;
        victim.told(&output, &file).context("changed")?;
    }
    Ok(())
}

#[test]
fn each_damaged_file_of_a_checkpoint_is_named() {
    as_root("each_damaged_file_of_a_checkpoint_is_named", || {
        for program in ["tcp-established", "files"] {
            let mut fixture = Fixture::start(program)?;
            fixture.dump(&engine(), &[])?;
            let victim = Victim::new(fixture);
            damage_each(&victim, ".").context(program)?;
        }
        Ok(())
    });
}

#[test]
fn each_damaged_file_of_a_chain_is_named() {
    as_root("each_damaged_file_of_a_chain_is_named", || {
        let mut fixture = Fixture::start("memory-private")?;
        let root = fixture.images().to_path_buf();
        fs::create_dir(&root)?;
        let pid = fixture.pid.to_string();
        let first = floe(&["pre-dump", "-t", &pid, "-D"], &root.join("0"))?;
        ensure!(
            first.status.success(),
            "{}",
            String::from_utf8_lossy(&first.stderr)
        );
        fixture.set_images(root.join("1"));
        fixture.dump(&engine(), &["--prev-images-dir", "../0"])?;
        fixture.set_images(root);
        damage_each(&Victim::new(fixture), "1")
    });
}

#[test]
fn images_without_a_manifest_are_refused_or_restored_but_never_break() {
    as_root(
        "images_without_a_manifest_are_refused_or_restored_but_never_break",
        || {
            let mut fixture = Fixture::start("files")?;
            fixture.dump(&engine(), &[])?;
            fs::remove_file(fixture.images().join("floe.json"))?;
            let victim = Victim::new(fixture);
            for file in victim.files()? {
                let size = fs::metadata(victim.whole.join(&file))?.len();
                for length in [None, Some(0), Some(size / 2)] {
                    victim.fresh()?;
                    let path = victim.copy.join(&file);
                    match length {
                        None => fs::remove_file(&path)?,
                        Some(length) => fs::File::options()
                            .write(true)
                            .open(&path)?
                            .set_len(length)?,
                    }
                    let output = floe(&["restore", "-d", "-D"], &victim.copy)?;
                    let what = || format!("{} cut to {length:?}", file.display());
                    if output.status.success() {
                        // Not every image is needed.
                        process::kill_ours(
                            &[victim.fixture.pid],
                            std::time::Duration::from_secs(20),
                        )
                        .with_context(what)?;
                    } else {
                        victim.told(&output, &file).with_context(what)?;
                    }
                }
            }
            Ok(())
        },
    );
}

#[test]
fn images_of_another_version_are_refused() {
    as_root("images_of_another_version_are_refused", || {
        let mut fixture = Fixture::start("memory-private")?;
        fixture.dump(&engine(), &[])?;
        fs::remove_file(fixture.images().join("floe.json"))?;
        let victim = Victim::new(fixture);
        let inventory = Path::new("inventory.img");
        let json = floe(&["image", "decode"], &victim.whole.join(inventory))?;
        let mut json: serde_json::Value = serde_json::from_slice(&json.stdout)?;
        for version in [0, 3, 9] {
            victim.fresh()?;
            json["entries"][0]["img_version"] = version.into();
            let text = victim.copy.join("inventory.json");
            fs::write(&text, json.to_string())?;
            let image = victim.copy.join(inventory).display().to_string();
            let made = floe(&["image", "encode", "-o", &image], &text)?;
            ensure!(
                made.status.success(),
                "{}",
                String::from_utf8_lossy(&made.stderr)
            );
            victim.refused(".", inventory, "of another version")?;
        }
        Ok(())
    });
}

#[test]
fn an_archive_that_was_cut_or_changed_is_named() {
    as_root("an_archive_that_was_cut_or_changed_is_named", || {
        let mut fixture = Fixture::start("memory-private")?;
        fixture.dump(&engine(), &[])?;
        let victim = Victim::new(fixture);
        let archive = victim.whole.with_extension("tar.zst");
        let pack = ["pack", victim.whole.to_str().context("UTF-8")?, "-o"];
        ensure!(floe(&pack, &archive)?.status.success(), "packing");
        let whole = fs::read(&archive)?;
        let mut forms: Vec<Vec<u8>> = Vec::new();
        for part in 0..8 {
            let at = whole.len() * part / 8;
            forms.push(whole[..at].to_vec());
            let mut changed = whole.clone();
            changed[at] ^= 0x41;
            forms.push(changed);
        }
        forms.push(b"no archive at all".to_vec());
        let restore = [&["restore", "-d"], &victim.options[..], &["-i"]].concat();
        for (number, form) in forms.iter().enumerate() {
            let damaged = victim.whole.with_extension("damaged");
            fs::write(&damaged, form)?;
            for words in [&restore[..], &["verify"], &["inspect"]] {
                let output = floe(words, &damaged)?;
                // What is in the pages only who reads them finds.
                if words[0] == "inspect" && output.status.success() {
                    continue;
                }
                victim
                    .told(&output, &damaged)
                    .with_context(|| format!("{words:?}: form {number}"))?;
            }
        }
        Ok(())
    });
}

#[test]
fn what_is_no_archive_on_standard_input_is_refused() {
    let place = tempfile::tempdir().expect("a directory");
    let (empty, noise) = (place.path().join("empty"), place.path().join("noise"));
    fs::write(&empty, "").expect("written");
    fs::write(&noise, "no archive at all".repeat(999)).expect("written");
    let fresh = place.path().join("fresh").display().to_string();
    for input in [place.path(), &empty, &noise] {
        for words in [
            &["verify", "-"][..],
            &["inspect", "-"],
            &["report", "-", "-o", &fresh],
            &["unpack", "-", "-C", &fresh],
            &["restore", "-d", "-i", "-"],
        ] {
            let stdin = fs::File::open(input).expect("there");
            let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
            let output = command.args(words).stdin(stdin).output().expect("it runs");
            let text = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(NOT_WHOLE), "{words:?}: {text}");
            assert!(text.contains("standard input"), "{words:?}: {text}");
            assert!(text.contains("what to do: "), "{words:?}: {text}");
            assert!(!Path::new(&fresh).exists(), "{words:?}");
        }
    }
}
