//! Directories: what is written is read back, and what is missing is named.

use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use floe_image::catalogue::{STATS_DUMP, STATS_RESTORE};
use floe_image::manifest::{DumpKind, Manifest, ManifestInfo, Verify};
use floe_image::messages::{
    CoreEntry, FownEntry, GhostChunkEntry, GhostFileEntry, InventoryEntry, IpcMsg, IpcMsgEntry,
    PipeDataEntry, PipeEntry, RemapFilePathEntry, RemapType, TcpStreamEntry, ThreadCoreEntry,
};
use floe_image::{ImageDir, ImageError, ImageKind, ImageWriter, Sync, WriteError};

fn info() -> ManifestInfo {
    ManifestInfo {
        kind: DumpKind::Full,
        generation: 0,
        id: None,
        parent: None,
        parent_id: None,
        tracker: None,
        floe: "0".to_string(),
        kernel: "6".to_string(),
        machine: "x86_64".to_string(),
        cpu: None,
        created: SystemTime::now(),
        rounds: Vec::new(),
    }
}

#[test]
fn every_file_name_leads_back_to_its_kind() {
    for kind in ImageKind::all() {
        let name = kind.file_name(0x1f);
        let (found, id) = ImageKind::of_file_name(&name).expect(&name);
        // `pages-%u` and the oldest layout's `pages-%d` are the same name.
        if kind == ImageKind::PagesOld {
            continue;
        }
        assert_eq!(found, kind, "{name}");
        let expected = if kind == ImageKind::Stats {
            STATS_DUMP
        } else {
            0x1f
        };
        assert_eq!(id, kind.has_id().then_some(expected), "{name}");
    }
}

#[test]
fn names_are_as_criu_writes_them() {
    let names = [
        (ImageKind::Inventory, 0, "inventory.img"),
        (ImageKind::Core, 17, "core-17.img"),
        (ImageKind::GhostFile, 17, "ghost-file-11.img"),
        (ImageKind::TcpStream, 255, "tcp-stream-ff.img"),
        (ImageKind::TmpfsImg, 3, "tmpfs-3.tar.gz.img"),
        (ImageKind::ShmemPagemap, 4, "pagemap-shmem-4.img"),
        (ImageKind::Stats, STATS_DUMP, "stats-dump"),
        (ImageKind::Stats, STATS_RESTORE, "stats-restore"),
        (ImageKind::IrmapCache, 0, "irmap-cache"),
    ];
    for (kind, id, name) in names {
        assert_eq!(kind.file_name(id), name);
    }
    for name in [
        "core-.img",
        "core-+1.img",
        "core-1",
        "core-1.img.bak",
        "floe.json",
        "pstree-1.img",
    ] {
        assert_eq!(ImageKind::of_file_name(name), None, "{name}");
    }
}

#[test]
fn what_is_written_is_read_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("images");
    let writer = ImageWriter::create(&path, Sync::Durable).expect("create");
    let inventory = InventoryEntry {
        img_version: 2,
        ..Default::default()
    };
    writer
        .write_one(ImageKind::Inventory, 0, &inventory)
        .expect("inventory");
    let mut stream = writer.stream(ImageKind::PipesData, 0).expect("stream");
    for (pipe_id, data) in [(1, b"abc".as_slice()), (2, b"")] {
        let bytes = data.len() as u32;
        let entry = PipeDataEntry {
            pipe_id,
            bytes,
            size: None,
        };
        stream.append_with_extra(&entry, data).expect("append");
    }
    stream.finish().expect("finish");

    let images = ImageDir::open(&path).expect("open");
    assert_eq!(Manifest::read(&images).expect("no manifest yet"), None);
    let written = writer.finish(info()).expect("finish");
    let manifest = Manifest::read(&images).expect("read").expect("a manifest");
    assert_eq!(manifest, written);
    manifest.verify(&images, Verify::Hashes).expect("whole");

    let found: InventoryEntry = images.read_one(ImageKind::Inventory, 0).expect("inventory");
    assert_eq!(found, inventory);
    let data = images
        .read_with_extra::<PipeDataEntry>(ImageKind::PipesData, 0)
        .expect("data");
    assert_eq!(data[0].1, b"abc");
    assert_eq!(data.len(), 2);
}

#[test]
fn a_missing_inventory_names_the_directory_that_has_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let nested = dir.path().join("checkpoint");
    let writer = ImageWriter::create(&nested, Sync::None).expect("create");
    let inventory = InventoryEntry {
        img_version: 2,
        ..Default::default()
    };
    writer
        .write_one(ImageKind::Inventory, 0, &inventory)
        .expect("inventory");
    let images = ImageDir::open(dir.path()).expect("open");
    let error = images
        .read_one::<InventoryEntry>(ImageKind::Inventory, 0)
        .expect_err("missing");
    assert!(matches!(error, ImageError::Missing { .. }));
    let text = error.to_string();
    assert!(
        text.contains("inventory.img is missing in") && text.contains("checkpoint has one"),
        "{text}"
    );
}

#[test]
fn parents_are_followed_and_loops_found() {
    let dir = tempfile::tempdir().expect("a directory");
    let first = ImageWriter::create(dir.path().join("1"), Sync::None).expect("create");
    let second = ImageWriter::create(dir.path().join("2"), Sync::None).expect("create");
    second.link_parent("../1".as_ref()).expect("link");
    let images = ImageDir::open(second.path()).expect("open");
    let parent = images.parent().expect("follow").expect("a parent");
    assert!(parent.parent().expect("follow").is_none());
    first.link_parent("../2".as_ref()).expect("link");
    assert!(matches!(
        parent.parent(),
        Err(ImageError::ParentLoop { .. })
    ));
    first.link_parent("../3".as_ref()).expect("link");
    assert!(matches!(parent.parent(), Err(ImageError::OpenDir { .. })));
}

#[test]
fn the_older_layout_is_read_as_the_current_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let writer = ImageWriter::create(dir.path(), Sync::None).expect("create");
    let pipe = PipeEntry {
        id: 7,
        pipe_id: 3,
        flags: 1,
        fown: FownEntry::default(),
    };
    writer.write_one(ImageKind::Pipes, 0, &pipe).expect("pipes");
    let core = CoreEntry {
        thread_core: Some(ThreadCoreEntry::default()),
        ..Default::default()
    };
    writer.write_one(ImageKind::Core, 5, &core).expect("core");
    let creds = floe_image::messages::CredsEntry {
        uid: 12,
        ..Default::default()
    };
    writer
        .write_one(ImageKind::Creds, 5, &creds)
        .expect("creds");
    let images = ImageDir::open(dir.path()).expect("open");
    let files = images.read_files().expect("files");
    assert_eq!((files[0].id, files[0].pipe.as_ref()), (7, Some(&pipe)));
    let core = images.read_core(5).expect("core");
    assert_eq!(
        core.thread_core.and_then(|thread| thread.creds),
        Some(creds)
    );
}

#[test]
fn an_unknown_version_is_refused_and_old_remaps_get_their_type() {
    let dir = tempfile::tempdir().expect("a directory");
    let writer = ImageWriter::create(dir.path(), Sync::None).expect("create");
    let inventory = InventoryEntry {
        img_version: 3,
        ..Default::default()
    };
    writer
        .write_one(ImageKind::Inventory, 0, &inventory)
        .expect("inventory");
    let remap = RemapFilePathEntry {
        orig_id: 1,
        remap_id: 1 << 31 | 5,
        remap_type: None,
    };
    writer
        .write_one(ImageKind::RemapFpath, 0, &remap)
        .expect("remaps");
    let images = ImageDir::open(dir.path()).expect("open");
    let error = images
        .read_inventory()
        .expect_err("a new version")
        .to_string();
    assert!(error.contains("version 3"), "{error}");
    let remaps = images.read_remaps().expect("remaps");
    assert_eq!(
        (remaps[0].remap_id, remaps[0].remap_type()),
        (5, RemapType::Ghost)
    );
}

#[test]
fn special_readers_find_queues_messages_and_holes() {
    let dir = tempfile::tempdir().expect("a directory");
    let writer = ImageWriter::create(dir.path(), Sync::None).expect("create");
    let mut stream = writer.stream(ImageKind::TcpStream, 0xab).expect("stream");
    let tcp = TcpStreamEntry {
        inq_len: 1,
        outq_len: 2,
        ..Default::default()
    };
    stream.append_with_extra(&tcp, b"abc").expect("append");
    stream.finish().expect("finish");
    let mut stream = writer.stream(ImageKind::IpcnsMsg, 9).expect("stream");
    stream
        .append(&IpcMsgEntry {
            qnum: 2,
            ..Default::default()
        })
        .expect("append");
    for text in [b"one".as_slice(), b"fourteen bytes"] {
        let message = IpcMsg {
            mtype: 1,
            msize: text.len() as u32,
        };
        stream.append_with_extra(&message, text).expect("append");
    }
    stream.finish().expect("finish");
    let mut stream = writer.stream(ImageKind::GhostFile, 1).expect("stream");
    stream
        .append(&GhostFileEntry {
            chunks: Some(true),
            ..Default::default()
        })
        .expect("append");
    for (off, data) in [(0, b"head".as_slice()), (1 << 40, b"tail")] {
        stream
            .append(&GhostChunkEntry {
                len: data.len() as u64,
                off,
            })
            .expect("append");
        stream.append_raw(data).expect("append");
    }
    stream.finish().expect("finish");

    let images = ImageDir::open(dir.path()).expect("open");
    let tcp = images.read_tcp_stream(0xab).expect("tcp");
    assert_eq!(
        (tcp.receive_queue.as_slice(), tcp.send_queue.as_slice()),
        (b"a".as_slice(), b"bc".as_slice())
    );
    let queues = images.read_message_queues(9).expect("queues");
    assert_eq!(queues[0].messages[1].1, b"fourteen bytes");
    let ghost = images.open_ghost(1).expect("ghost");
    assert_eq!(ghost.extents[1].file_offset, 1 << 40);
    let mut tail = [0; 4];
    ghost
        .file
        .read_exact_at(&mut tail, ghost.extents[1].image_offset)
        .expect("tail");
    assert_eq!(&tail, b"tail");
}

#[test]
fn a_link_in_the_directory_is_not_written_through() {
    let dir = tempfile::tempdir().expect("a directory");
    let writer = ImageWriter::create(dir.path(), Sync::None).expect("create");
    let name = ImageKind::Core.file_name(1);
    std::os::unix::fs::symlink("/dev/full", dir.path().join(&name)).expect("link");
    let error = writer.write_one(ImageKind::Core, 1, &CoreEntry::default());
    // The link itself is not followed: nobody can redirect an image.
    assert!(matches!(error, Err(WriteError::Create { .. })), "{error:?}");
}
