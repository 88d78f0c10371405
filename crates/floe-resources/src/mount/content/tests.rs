use super::{pack, unpack};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

fn copy(from: &Path, to: &Path) {
    let archive = directory();
    let image = archive.path().join("image");
    let root = File::open(from).expect("opens");
    pack(root.as_fd(), File::create(&image).expect("creates")).expect("packs");
    let root = File::open(to).expect("opens");
    unpack(root.as_fd(), File::open(&image).expect("opens")).expect("unpacks");
}

fn fill(root: &Path) -> String {
    let long = "n".repeat(200);
    fs::create_dir(root.join("dir")).expect("makes");
    fs::write(root.join("dir/file"), b"content").expect("writes");
    fs::set_permissions(root.join("dir/file"), fs::Permissions::from_mode(0o640)).expect("chmod");
    fs::hard_link(root.join("dir/file"), root.join("second")).expect("links");
    fs::write(root.join(&long), vec![7; 3000]).expect("writes");
    symlink(format!("/nowhere/{long}"), root.join("link")).expect("links");
    let sparse = File::create(root.join("sparse")).expect("creates");
    for at in 0..40 {
        sparse.write_all_at(b"x", at << 20).expect("writes");
    }
    sparse.set_len(50 << 20).expect("sizes");
    rustix::fs::mknodat(CWD, root.join("fifo"), FileType::Fifo, Mode::RUSR, 0).expect("makes");
    let time = Timespec {
        tv_sec: 1_000_000_000,
        tv_nsec: 123_456_789,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(CWD, root.join("dir"), &times, AtFlags::empty()).expect("sets");
    fs::set_permissions(root.join("dir"), fs::Permissions::from_mode(0o500)).expect("chmod");
    long
}

#[test]
fn everything_comes_back() {
    let (from, to) = (directory(), directory());
    let long = fill(from.path());
    let _socket =
        std::os::unix::net::UnixListener::bind(from.path().join("socket")).expect("binds");
    let with_attribute = File::open(from.path().join(&long)).expect("opens");
    let value = b"a\0b\nc=";
    let kept = rustix::fs::fsetxattr(with_attribute.as_fd(), "user.x", value, XattrFlags::empty());
    copy(from.path(), to.path());
    let at = |name: &str| to.path().join(name);
    assert_eq!(fs::read(at("dir/file")).expect("reads"), b"content");
    let stat = |name: &str| fs::symlink_metadata(at(name)).expect("it is there");
    assert_eq!(stat("dir/file").ino(), stat("second").ino());
    assert_eq!(stat("second").mode() & 0o7777, 0o640);
    assert_eq!(fs::read(at(&long)).expect("reads"), vec![7; 3000]);
    let target = fs::read_link(at("link")).expect("a link");
    assert_eq!(target.to_str(), Some(format!("/nowhere/{long}").as_str()));
    let sparse = stat("sparse");
    assert_eq!(sparse.len(), 50 << 20);
    assert!(
        sparse.blocks() * 512 < 10 << 20,
        "{} blocks",
        sparse.blocks()
    );
    let file = File::open(at("sparse")).expect("opens");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 39 << 20).expect("reads");
    assert_eq!(&byte, b"x");
    assert_eq!(
        (stat("dir").mtime(), stat("dir").mtime_nsec()),
        (1_000_000_000, 123_456_789)
    );
    assert_eq!(stat("dir").mode() & 0o7777, 0o500);
    assert!(fs::symlink_metadata(at("fifo")).is_ok());
    let socket = stat("socket").file_type();
    assert!(std::os::unix::fs::FileTypeExt::is_socket(&socket));
    if kept.is_ok() {
        let file = File::open(at(&long)).expect("opens");
        let mut found = [0; 8];
        let size = rustix::fs::fgetxattr(file.as_fd(), "user.x", &mut found[..]).expect("is there");
        assert_eq!(&found[..size], value);
    }
}

#[test]
fn archives_of_gnu_tar_are_read_and_read_ours() {
    let (from, to, third) = (directory(), directory(), directory());
    let long = fill(from.path());
    let image = third.path().join("image");
    let tar = |arguments: &[&str]| {
        let done = std::process::Command::new("tar").args(arguments).status();
        assert!(done.expect("tar runs").success(), "{arguments:?}");
    };
    let text = |path: &Path| path.to_str().expect("UTF-8").to_string();
    tar(&[
        "--create",
        "--gzip",
        "--sparse",
        "--numeric-owner",
        "--file",
        &text(&image),
        "--directory",
        &text(from.path()),
        ".",
    ]);
    let root = File::open(to.path()).expect("opens");
    unpack(root.as_fd(), File::open(&image).expect("opens")).expect("unpacks");
    assert_eq!(
        fs::read(to.path().join(&long)).expect("reads"),
        vec![7; 3000]
    );
    assert_eq!(
        fs::metadata(to.path().join("sparse"))
            .expect("is there")
            .len(),
        50 << 20
    );
    let ours = third.path().join("ours");
    pack(root.as_fd(), File::create(&ours).expect("creates")).expect("packs");
    let back = third.path().join("back");
    fs::create_dir(&back).expect("makes");
    tar(&[
        "--extract",
        "--gzip",
        "--file",
        &text(&ours),
        "--directory",
        &text(&back),
    ]);
    let same = std::process::Command::new("diff")
        .args(["-r", "--no-dereference", &text(from.path()), &text(&back)])
        .args(["--exclude", "fifo"])
        .status();
    assert!(same.expect("diff runs").success());
}

#[test]
fn names_that_lead_out_are_refused() {
    for (name, link) in [
        ("../evil", ""),
        ("/evil", ""),
        ("a", "/etc"),
        ("hard", "../x"),
    ] {
        let work = directory();
        let image = work.path().join("image");
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        let gnu = header.as_gnu_mut().expect("it is one");
        gnu.name[..name.len()].copy_from_slice(name.as_bytes());
        gnu.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_size(0);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_entry_type(match link {
            "" => tar::EntryType::Regular,
            "/etc" => tar::EntryType::Symlink,
            _ => tar::EntryType::Link,
        });
        header.set_cksum();
        archive.append(&header, std::io::empty()).expect("appends");
        if link == "/etc" {
            // A file behind the link.
            let gnu = header.as_gnu_mut().expect("it is one");
            gnu.name[..8].copy_from_slice(b"a/passwd");
            header.set_entry_type(tar::EntryType::Regular);
            header.set_cksum();
            archive.append(&header, std::io::empty()).expect("appends");
        }
        let bytes = archive.into_inner().expect("ends");
        let output = File::create(&image).expect("creates");
        let mut output = flate2::write::GzEncoder::new(output, flate2::Compression::fast());
        output.write_all(&bytes).expect("writes");
        output.finish().expect("ends");
        let to = directory();
        let root = File::open(to.path()).expect("opens");
        let result = unpack(root.as_fd(), File::open(&image).expect("opens"));
        assert!(result.is_err(), "{name} {link}");
    }
}
