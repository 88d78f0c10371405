//! Chains of generations, made by hand of a full dump or of nothing.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context;
use floe_image::dir::{PE_PARENT, PE_PRESENT};
use floe_image::manifest::{DumpKind, ManifestInfo};
use floe_image::messages::{
    CoreEntry, FsEntry, InventoryEntry, MmEntry, PagemapEntry, PagemapHead, PstreeEntry,
    TaskCoreEntry,
};
use floe_image::{ImageDir, ImageKind, ImageWriter, Sync};

const PAGE: u64 = 4096;

/// A page as a generation has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Page {
    /// With this content.
    Here(Vec<u8>),
    /// As the generation before has it.
    InParent,
}

/// The pages of one address space by their addresses.
pub type Pages = BTreeMap<u64, Page>;

/// A page full of one byte.
pub fn filled(byte: u8) -> Page {
    Page::Here(vec![byte; PAGE as usize])
}

/// The manifest's facts about a generation.
pub fn info(kind: DumpKind, generation: u32) -> ManifestInfo {
    ManifestInfo {
        kind,
        generation,
        id: None,
        parent: (generation > 0).then(|| format!("../{}", generation - 1)),
        parent_id: None,
        tracker: (generation > 0).then(|| "content".into()),
        floe: "0.1.0".into(),
        kernel: "6.12.0".into(),
        machine: "x86_64".into(),
        cpu: None,
        created: SystemTime::now(),
        rounds: Vec::new(),
    }
}

/// Writes `pagemap-ID` and its pages.
pub fn write_pages(
    writer: &ImageWriter,
    (kind, id, pages_id): (ImageKind, u64, u32),
    pages: &Pages,
) -> anyhow::Result<()> {
    let mut file = writer.create_raw(ImageKind::Pages, pages_id.into())?;
    let mut stream = writer.stream(kind, id)?;
    stream.append(&PagemapHead { pages_id })?;
    let mut hasher = blake3::Hasher::new();
    let mut size = 0;
    for (address, page) in pages {
        let flags = match page {
            Page::Here(content) => {
                file.write_all(content)?;
                hasher.update(content);
                size += PAGE;
                PE_PRESENT
            }
            Page::InParent => PE_PARENT,
        };
        stream.append(&PagemapEntry {
            vaddr: *address,
            flags: Some(flags),
            nr_pages: Some(1),
            ..PagemapEntry::default()
        })?;
    }
    stream.finish()?;
    let name = ImageKind::Pages.file_name(pages_id.into());
    writer.note_file(&name, size, Some(hasher.finalize()));
    Ok(())
}

/// A chain of one task (pid 7) in `root/0`, `root/1`, ...; the last is full, the others pre-dumps.
/// Its images suffice for everything but a restore.
pub fn write_chain(root: &Path, generations: &[Pages]) -> anyhow::Result<Vec<PathBuf>> {
    let (mut directories, mut parent_id) = (Vec::new(), None);
    for (number, pages) in generations.iter().enumerate() {
        let directory = root.join(number.to_string());
        let writer = ImageWriter::create(&directory, Sync::None)?;
        let inventory = InventoryEntry {
            img_version: 2,
            ..InventoryEntry::default()
        };
        writer.write_one(ImageKind::Inventory, 0, &inventory)?;
        write_pages(&writer, (ImageKind::Pagemap, 7, 1), pages)?;
        let last = number + 1 == generations.len();
        if last {
            write_task(&writer)?;
        }
        parent_id = finish(&writer, (number, last), parent_id)?;
        directories.push(directory);
    }
    Ok(directories)
}

fn write_task(writer: &ImageWriter) -> anyhow::Result<()> {
    let task = PstreeEntry {
        pid: 7,
        pgid: 7,
        sid: 7,
        threads: vec![7],
        ..PstreeEntry::default()
    };
    writer.write_one(ImageKind::Pstree, 0, &task)?;
    let core = CoreEntry {
        mtype: 1,
        tc: Some(TaskCoreEntry {
            task_state: 1,
            comm: "example".into(),
            ..TaskCoreEntry::default()
        }),
        ..CoreEntry::default()
    };
    writer.write_one(ImageKind::Core, 7, &core)?;
    writer.write_one(ImageKind::Mm, 7, &MmEntry::default())?;
    writer.write_one(ImageKind::Fs, 7, &FsEntry::default())?;
    Ok(())
}

/// Makes a chain of a whole dump: the page with number i is newest in generation i modulo `count`, and
/// every other such page has other content in generation 0. The last directory restores as `full` does.
pub fn split_dump(full: &Path, root: &Path, count: usize) -> anyhow::Result<Vec<PathBuf>> {
    let images = ImageDir::open(full)?;
    let (mut directories, mut parent_id) = (Vec::new(), None);
    for number in 0..count {
        let directory = root.join(number.to_string());
        let writer = ImageWriter::create(&directory, Sync::None)?;
        let last = number + 1 == count;
        let mut paged = vec![];
        for (kind, id) in images.images()? {
            if matches!(kind, ImageKind::Pagemap | ImageKind::ShmemPagemap) {
                let id = id.context("pagemaps have numbers")?;
                let (head, entries) = images.read_pagemap(kind, id)?;
                let pages = generation(&images, head.pages_id, &entries, (number, count))?;
                write_pages(&writer, (kind, id, head.pages_id), &pages)?;
                paged.push(ImageKind::Pages.file_name(head.pages_id.into()));
                paged.push(kind.file_name(id));
            }
        }
        for name in images.file_names()? {
            let kept = if last {
                name.ends_with(".img")
            } else {
                name == "inventory.img"
            };
            if kept && !paged.contains(&name) {
                let mut content = Vec::new();
                images
                    .open_file(&name)?
                    .context("just listed")?
                    .read_to_end(&mut content)?;
                writer.create_file(&name)?.write_all(&content)?;
                writer.note_file(&name, content.len() as u64, Some(blake3::hash(&content)));
            }
        }
        parent_id = finish(&writer, (number, last), parent_id)?;
        directories.push(directory);
    }
    Ok(directories)
}

/// Ends a generation beside the one before it, which has this id; gives its own.
fn finish(
    writer: &ImageWriter,
    (number, last): (usize, bool),
    parent_id: Option<String>,
) -> anyhow::Result<Option<String>> {
    if number > 0 {
        writer.link_parent(Path::new(&format!("../{}", number - 1)))?;
    }
    let kind = match last {
        true => DumpKind::Full,
        false => DumpKind::PreDump,
    };
    let mut facts = info(kind, number as u32);
    facts.parent_id = parent_id;
    Ok(writer.finish(facts)?.id)
}

/// What generation `number` of `count` has of these pages.
fn generation(
    images: &ImageDir,
    pages_id: u32,
    entries: &[PagemapEntry],
    (number, count): (usize, usize),
) -> anyhow::Result<Pages> {
    let file = images.open_raw(ImageKind::Pages, pages_id.into())?;
    let addresses = entries
        .iter()
        .filter(|entry| entry.flags() & PE_PRESENT != 0)
        .flat_map(|entry| (0..entry.nr_pages()).map(|page| entry.vaddr + page * PAGE));
    let mut pages = Pages::new();
    for (index, address) in addresses.enumerate() {
        let newest = index % count;
        let early = newest > 0 && (index / count).is_multiple_of(2);
        let mut content = vec![0; PAGE as usize];
        file.read_exact_at(&mut content, index as u64 * PAGE)?;
        let page = match number.cmp(&newest) {
            std::cmp::Ordering::Equal => Page::Here(content),
            std::cmp::Ordering::Greater => Page::InParent,
            std::cmp::Ordering::Less if !early => continue,
            std::cmp::Ordering::Less if number == 0 => filled(0xa5),
            std::cmp::Ordering::Less => Page::InParent,
        };
        pages.insert(address, page);
    }
    Ok(pages)
}
