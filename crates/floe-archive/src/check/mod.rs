//! Whether a checkpoint is whole: what is missing, cut or changed, and where it seems to be.

mod hash;
mod nearby;

use std::collections::BTreeSet;
use std::path::Path;

use floe_image::manifest::{MANIFEST_NAME, Manifest};
use floe_image::messages::{CoreEntry, PstreeEntry};
use floe_image::{ImageDir, ImageError, ImageKind};
use floe_memory::PageIndex;

use crate::Chain;
pub use hash::HashReport;

/// How bad a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// As it should be.
    Good,
    /// Worth knowing; a restore can go on.
    Note,
    /// In order, but a restore must be given an option for it.
    Needed,
    /// A restore cannot succeed.
    Bad,
}

/// One line of the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// What was looked at.
    pub about: &'static str,
    /// How it is.
    pub state: State,
    /// What was found.
    pub text: String,
    /// What to do about it.
    pub remedy: Option<String>,
}

impl Row {
    /// As it should be.
    pub fn good(about: &'static str, text: impl Into<String>) -> Row {
        Row {
            about,
            state: State::Good,
            text: text.into(),
            remedy: None,
        }
    }

    /// Worth knowing.
    pub fn note(about: &'static str, text: impl Into<String>) -> Row {
        Row {
            about,
            state: State::Note,
            text: text.into(),
            remedy: None,
        }
    }

    /// Something that a restore must be given, and how.
    pub fn needed(about: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Row {
        Row {
            about,
            state: State::Needed,
            text: text.into(),
            remedy: Some(remedy.into()),
        }
    }

    /// A problem, and what to do.
    pub fn bad(about: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Row {
        Row {
            about,
            state: State::Bad,
            text: text.into(),
            remedy: Some(remedy.into()),
        }
    }
}

/// The cheap part: what is there, by names and sizes. Reads no page; some hundred microseconds.
pub fn quick(dir: &ImageDir) -> Vec<Row> {
    let mut rows = Vec::new();
    kind(dir, &mut rows);
    if rows.iter().any(|row| row.state == State::Bad) {
        return rows;
    }
    let mut next = Some(dir.clone());
    let mut newest = true;
    let mut length = 0;
    while let Some(dir) = next.take() {
        length += 1;
        let manifest = manifest_sizes(&dir, newest, &mut rows);
        if newest {
            tasks(&dir, &mut rows);
        }
        newest = false;
        match dir.parent() {
            Ok(Some(parent)) => next = Some(parent),
            Ok(None) => rows.extend(manifest.and_then(|manifest| without_parent(&dir, &manifest))),
            Err(error) => rows.push(broken_parent(&dir, &error)),
        }
    }
    if length > 1
        && let Err(error) = Chain::open(dir).and_then(|chain| chain.check_links())
    {
        rows.push(Row::bad("chain", sentence(&error), ORDER));
    }
    if length > 1 && rows.iter().all(|row| row.state != State::Bad) {
        rows.push(Row::good(
            "chain",
            format!("{length} generations, all of them there"),
        ));
    }
    rows
}

/// What a restore looks at before it begins: beside the quick part, whether all but the pages is as it was made.
/// An archive compares what is read of it by itself.
pub fn before_restore(dir: &ImageDir, threads: usize) -> Vec<Row> {
    let mut rows = quick(dir);
    let is_fine = rows.iter().all(|row| row.state != State::Bad);
    if let (true, true, Ok(chain)) = (is_fine, dir.is_directory(), Chain::open(dir)) {
        let generations = chain.generations().iter();
        rows.extend(generations.flat_map(|generation| hash::small(generation, threads)));
    }
    rows
}

/// All that can be found without looking at this machine: every checksum, every page's place.
pub fn full(dir: &ImageDir, threads: usize) -> (Vec<Row>, HashReport) {
    let mut rows = quick(dir);
    let mut report = HashReport::default();
    let fault = |row: &Row| row.state == State::Bad;
    // What is no checkpoint at all has no files to compare.
    if rows
        .iter()
        .any(|row| fault(row) && matches!(row.about, "kind" | "manifest"))
    {
        return (rows, report);
    }
    match Chain::open(dir) {
        // A changed image may be what makes others look missing.
        Ok(chain) => {
            for generation in chain.generations() {
                hash::check(generation, threads, &mut rows, &mut report);
            }
        }
        // Of the same chain, the quick part has said that it is broken.
        Err(_) if rows.iter().any(fault) => {}
        Err(error) => rows.push(Row::bad("chain", sentence(&error), COPY_AGAIN)),
    }
    if !rows.iter().any(fault) {
        page_indexes(dir, &mut rows);
    }
    (rows, report)
}

const ORDER: &str = "each directory says in floe.json which generation it is, and what `parent` led to when it was made";
const COPY_AGAIN: &str = "copy the checkpoint again into an empty directory, or dump again";

const COPY_AGAIN_OR_NEWER: &str =
    "copy the checkpoint again, or restore it with the version that made it";

/// An error with its causes.
fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

/// Whether this is a checkpoint at all, and of which kind.
fn kind(dir: &ImageDir, rows: &mut Vec<Row>) {
    let manifest = match Manifest::read(dir) {
        Ok(manifest) => manifest,
        Err(error) => {
            rows.push(Row::bad("manifest", sentence(&error), COPY_AGAIN));
            return;
        }
    };
    let is_pre_dump = crate::Generation {
        dir: dir.clone(),
        manifest: manifest.clone(),
    }
    .is_pre_dump();
    if is_pre_dump {
        let generation = manifest
            .as_ref()
            .map_or(String::new(), |m| format!(" (generation {})", m.generation));
        let text = format!(
            "{} is a pre-dump{generation}: it holds memory only, no task can be made of it",
            dir.path().display()
        );
        let remedy = match nearby::child_of(dir.path()) {
            Some(found) => format!(
                "the checkpoint that builds on it seems to be {}: give that directory",
                found.display()
            ),
            None => "give the directory of the last dump of the chain, which builds on this one"
                .to_string(),
        };
        rows.push(Row::bad("kind", text, remedy));
        return;
    }
    if !dir.has(ImageKind::Inventory, 0) {
        rows.push(missing(dir, &ImageKind::Inventory.file_name(0)));
        return;
    }
    if let Err(error) = dir.read_inventory() {
        rows.push(Row::bad("kind", sentence(&error), COPY_AGAIN_OR_NEWER));
        return;
    }
    match manifest {
        Some(manifest) => rows.push(Row::good(
            "manifest",
            format!("complete, generation {}, made by Floe {} on {} {}", manifest.generation, manifest.floe, manifest.kernel, manifest.machine),
        )),
        None => rows.push(Row::note(
            "manifest",
            format!("{MANIFEST_NAME} is missing: another engine made these images, or the dump was interrupted; sizes and checksums cannot be checked"),
        )),
    }
}

/// A row for a file that is not there, and where it is.
fn missing(dir: &ImageDir, name: &str) -> Row {
    let path = dir.path();
    let text = format!("{name} is missing in {}", path.display());
    let manifest = Manifest::read(dir).ok().flatten();
    let found = match manifest.as_ref().map(|manifest| manifest.files.get(name)) {
        Some(Some(listed)) => nearby::holder(path, name, listed),
        // Another checkpoint was meant, if this is none.
        _ if name == ImageKind::Inventory.file_name(0) => nearby::checkpoint(path),
        _ => None,
    };
    let remedy = match found {
        Some(found) if manifest.is_some() => format!("it is in {}: bring it back", found.display()),
        Some(found) => format!("a checkpoint is in {}: was that directory meant?", found.display()),
        None if is_empty(path) => "the directory is empty: give the one that the dump wrote to".to_string(),
        None => "the dump was not finished, or only a part was copied: copy all files of the directory again".to_string(),
    };
    Row::bad("files", text, remedy)
}

fn is_empty(path: &Path) -> bool {
    std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

/// Files that the manifest lists: are they there, with their sizes?
fn manifest_sizes(dir: &ImageDir, newest: bool, rows: &mut Vec<Row>) -> Option<Manifest> {
    let manifest = match Manifest::read(dir) {
        Ok(manifest) => manifest?,
        Err(error) => {
            rows.push(Row::bad("manifest", sentence(&error), COPY_AGAIN));
            return None;
        }
    };
    let before = rows.len();
    for (name, listed) in &manifest.files {
        match dir.file_size(name) {
            None => rows.push(missing(dir, name)),
            Some(found) if found != listed.size => rows.push(Row::bad(
                "files",
                format!(
                    "{} has {found} bytes, {} when it was made",
                    dir.path().join(name).display(),
                    listed.size
                ),
                "it was copied only in part or changed since: copy it again",
            )),
            Some(_) => {}
        }
    }
    if newest && rows.len() == before {
        let bytes: u64 = manifest.files.values().map(|file| file.size).sum();
        rows.push(Row::good(
            "files",
            format!(
                "{} files, {bytes} bytes, all there with their sizes",
                manifest.files.len()
            ),
        ));
    }
    Some(manifest)
}

/// Images that each task must have.
fn tasks(dir: &ImageDir, rows: &mut Vec<Row>) {
    let tree: Vec<PstreeEntry> = match dir.read_one_or_more(ImageKind::Pstree) {
        Ok(tree) => tree,
        Err(ImageError::Missing { name, .. }) => {
            rows.push(missing(dir, &name));
            return;
        }
        Err(error) => {
            rows.push(Row::bad("tasks", sentence(&error), COPY_AGAIN));
            return;
        }
    };
    let before = rows.len();
    let mut wanted = BTreeSet::new();
    for task in &tree {
        let pid = u64::from(task.pid);
        wanted.insert(ImageKind::Core.file_name(pid));
        let threads = task.threads.iter();
        let threads = threads.map(|tid| ImageKind::Core.file_name(u64::from(*tid)));
        match dir.read_optional::<CoreEntry>(ImageKind::Core, pid) {
            // Zombies have nothing else; CRIU leaves the number of their only thread unset.
            Ok(Some(core))
                if core
                    .tc
                    .as_ref()
                    .is_some_and(|task| matches!(task.task_state, 2 | 6)) => {}
            Ok(_) => {
                wanted.extend(threads);
                let own = [ImageKind::Mm, ImageKind::Pagemap, ImageKind::Fs];
                wanted.extend(own.map(|kind| kind.file_name(pid)));
            }
            Err(error) => rows.push(Row::bad("tasks", sentence(&error), COPY_AGAIN)),
        }
    }
    let manifest = Manifest::read(dir).ok().flatten();
    for name in wanted.iter().filter(|name| dir.file_size(name).is_none()) {
        let was_there = |manifest: &Manifest| manifest.files.contains_key(name);
        let row = match manifest.as_ref().is_none_or(was_there) {
            true => missing(dir, name),
            false => Row::bad(
                "tasks",
                format!(
                    "{} is damaged: it calls for {name}, which was no part of the checkpoint",
                    dir.path().join(ImageKind::Pstree.file_name(0)).display()
                ),
                COPY_AGAIN,
            ),
        };
        // The manifest may have named it already.
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    if rows.len() == before {
        let threads: usize = tree.iter().map(|task| task.threads.len()).sum();
        rows.push(Row::good(
            "tasks",
            format!(
                "{} tasks, {threads} threads, the images of each are there",
                tree.len()
            ),
        ));
    }
}

fn broken_parent(dir: &ImageDir, error: &ImageError) -> Row {
    let link =
        std::fs::read_link(dir.path().join(floe_image::dir::PARENT_LINK)).unwrap_or_default();
    let text = format!(
        "the link `parent` in {} leads to {}, which cannot be opened ({})",
        dir.path().display(),
        link.display(),
        sentence(error)
    );
    let name = link
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let number = Manifest::read(dir).ok().flatten();
    let number = number.and_then(|own| own.oldest().checked_sub(1));
    let found = number.and_then(|number| nearby::generation(dir.path(), &name, number));
    let remedy = match found {
        Some(found) => format!("that generation seems to be {}: move it, or make the link anew with `ln -sfn`", found.display()),
        None => "bring the earlier generation to that place; without it the pages that did not change are lost".to_string(),
    };
    Row::bad("chain", text, remedy)
}

/// A generation that builds on another one, and is there without it.
pub fn absent_parent(dir: &ImageDir) -> Option<Row> {
    match (dir.parent(), Manifest::read(dir)) {
        (Ok(None), Ok(Some(manifest))) => without_parent(dir, &manifest),
        _ => None,
    }
}

/// What is wrong with a generation that has no parent, if it should have one.
fn without_parent(dir: &ImageDir, manifest: &Manifest) -> Option<Row> {
    let link = manifest.parent.as_ref()?;
    let number = manifest.oldest().checked_sub(1)?;
    let path = dir.path().display();
    Some(match dir.is_directory() {
        true => Row::bad(
            "chain",
            format!("{path} builds on generation {number}, and its link `parent` is missing"),
            format!("make the link again, where that generation is: ln -s {link} {path}/parent"),
        ),
        false => Row::bad(
            "chain",
            format!("{path} is an increment: it builds on generation {number}, which is not in it"),
            format!(
                "give the archive that has it, too: restore or verify with -i BASE -i {path}, or floe unpack BASE {path} -C DIR"
            ),
        ),
    })
}

/// Whether every page is found in the chain, and every file of pages is long enough.
fn page_indexes(dir: &ImageDir, rows: &mut Vec<Row>) {
    let images = dir.images().unwrap_or_default();
    let (mut count, mut bytes) = (0u64, 0u64);
    let before = rows.len();
    for (kind, id) in images {
        if !matches!(kind, ImageKind::Pagemap | ImageKind::ShmemPagemap) {
            continue;
        }
        match PageIndex::read(dir, kind, id.unwrap_or(0)) {
            Ok(index) => {
                count += 1;
                bytes += index.runs().iter().map(|run| run.len).sum::<u64>();
            }
            Err(error) => rows.push(Row::bad("memory", sentence(&error), COPY_AGAIN)),
        }
    }
    if rows.len() == before {
        rows.push(Row::good(
            "memory",
            format!(
                "{bytes} bytes of pages in {count} address spaces and segments, each page found"
            ),
        ));
    }
}
