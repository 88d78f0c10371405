//! `floe swrk` and `floe service` as container engines call them.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use floe_image::messages::{CriuFeatures, CriuOpts, CriuReq, CriuReqType, CriuResp};
use rustix::io::Errno;
use testkit::rpc::{Client, Notified, no_options, request};
use testkit::{Fixture, process, skips};

/// How long a process may take to end.
const LIMIT: Duration = Duration::from_secs(10);

const FLOE: &str = env!("CARGO_BIN_EXE_floe");

fn start(directory: &Path) -> Client {
    Client::start(Path::new(FLOE), &directory.join("printed")).expect("the binary runs")
}

fn of_type(kind: CriuReqType) -> CriuReq {
    CriuReq {
        r#type: kind.into(),
        ..CriuReq::default()
    }
}

/// The numbers of the images' and the log's directory are ours: the server opens them through us.
fn in_directory(images: &File, pid: Option<i32>) -> CriuOpts {
    CriuOpts {
        images_dir_fd: images.as_raw_fd(),
        work_dir_fd: Some(images.as_raw_fd()),
        log_level: Some(4),
        log_file: Some("rpc.log".into()),
        pid,
        ..no_options()
    }
}

fn told(answer: &CriuResp) -> &str {
    answer.cr_errmsg.as_deref().unwrap_or_default()
}

#[test]
fn version_and_features_are_answered_and_the_end_of_the_connection_is_the_end() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut client = start(directory.path());
    let version = CriuReq {
        keep_open: Some(true),
        // libcriu sends options that name no directory.
        ..request(CriuReqType::Version, no_options())
    };
    let answer = client.call(&version).expect("an answer");
    let version = answer.version.expect("a version");
    assert_eq!((version.major_number, version.minor_number), (4, 2));
    let features = CriuReq {
        keep_open: Some(true),
        features: Some(CriuFeatures {
            mem_track: Some(true),
            lazy_pages: Some(true),
            pidfd_store: None,
        }),
        ..of_type(CriuReqType::FeatureCheck)
    };
    let answer = client.call(&features).expect("an answer");
    assert!(answer.success);
    let features = answer.features.expect("features");
    assert_eq!(features.pidfd_store, Some(false), "it was not asked for");
    let status = client.end().expect("it ends").expect("we started it");
    assert!(status.success(), "{status}");
    let printed = fs::read_to_string(directory.path().join("printed")).expect("it is a file");
    assert_eq!(
        printed, "",
        "standard output belongs to the restored program"
    );
}

#[test]
fn what_is_no_request_or_makes_no_sense_is_answered_clearly() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let cases: [(&[u8], &str); 4] = [
        (b"\xff\xff\xff\xff", "the packet is not a request"),
        (b"", ""),
        (&[0x08, 0x63], "request type 99 is not known here"),
        (&[0x08, 0x05], "images_dir_fd"),
    ];
    for (bytes, expected) in cases {
        let mut client = start(directory.path());
        client.send_bytes(bytes).expect("it can be sent");
        match client.receive().expect("an answer or the end") {
            Some(answer) => assert!(told(&answer).contains(expected), "{answer:?}"),
            None => assert_eq!(expected, ""),
        }
    }
    let dumps: [(CriuOpts, &str); 4] = [
        (no_options(), "images_dir_fd"),
        (
            CriuOpts {
                images_dir_fd: 4242,
                pid: Some(1),
                ..no_options()
            },
            "Opening the caller's images directory",
        ),
        (
            CriuOpts {
                images_dir: Some("/tmp".into()),
                pid: Some(-5),
                ..no_options()
            },
            "pid cannot be -5",
        ),
        (
            CriuOpts {
                log_file: Some("../x".into()),
                ..no_options()
            },
            "log_file",
        ),
    ];
    for (opts, expected) in dumps {
        let mut client = start(directory.path());
        let answer = client
            .call(&request(CriuReqType::Dump, opts))
            .expect("an answer");
        assert!(
            !answer.success && told(&answer).contains(expected),
            "{answer:?}"
        );
        assert_eq!(answer.cr_errno, Some(Errno::BADRQC.raw_os_error()));
    }
}

/// A field of a request.
type Fill = fn(&mut CriuOpts);

#[test]
fn fields_that_cannot_be_honoured_are_answered_by_their_names() {
    let (dump, restore) = (CriuReqType::Dump, CriuReqType::Restore);
    let cases: [(CriuReqType, Fill, &str); 7] = [
        (dump, |o| o.lazy_pages = Some(true), "--lazy-pages"),
        (restore, |o| o.lazy_pages = Some(true), "--lazy-pages"),
        (dump, |o| o.tls = Some(true), "--tls"),
        (CriuReqType::PageServer, |o| o.tls = Some(true), "--tls"),
        (
            dump,
            |o| o.mntns_compat_mode = Some(true),
            "--mntns-compat-mode",
        ),
        (
            restore,
            |o| o.lsm_profile = Some("smack:a".into()),
            "--lsm-profile",
        ),
        (
            CriuReqType::PageServer,
            |o| o.status_fd = Some(4242),
            "status_fd",
        ),
    ];
    let directory = tempfile::tempdir().expect("a temporary directory");
    let images = File::open(directory.path()).expect("it is there");
    for (kind, fill, named) in cases {
        let mut opts = in_directory(&images, Some(4_194_303));
        fill(&mut opts);
        let mut client = start(directory.path());
        let answer = client.call(&request(kind, opts)).expect("an answer");
        let named = !answer.success && told(&answer).contains(named);
        assert!(named, "{kind:?}: {answer:?}");
    }
}

#[test]
fn a_page_server_says_when_it_is_ready() {
    process::adopt_orphans().expect("a request that cannot fail");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let images = File::open(directory.path()).expect("it is there");
    let (status, ready) = rustix::pipe::pipe().expect("a pipe");
    let mut client = start(directory.path());
    let opts = CriuOpts {
        status_fd: Some(ready.as_raw_fd()),
        ..in_directory(&images, None)
    };
    let asked = request(CriuReqType::PageServer, opts);
    let answer = client.call(&asked).expect("an answer");
    let server = answer.ps.and_then(|ps| ps.pid).expect("a server");
    drop(ready);
    let mut told = [1; 2];
    let length = rustix::io::read(&status, &mut told).expect("it can be read");
    process::kill_ours(&[server], LIMIT).expect("the server ends");
    assert_eq!((length, told[0]), (1, 0));
}

#[test]
fn a_configuration_file_of_the_request_has_the_last_word() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let images = File::open(directory.path()).expect("it is there");
    let file = directory.path().join("runc.conf");
    fs::write(&file, "log-file elsewhere.log\n").expect("it can be written");
    let mut client = start(directory.path());
    let opts = CriuOpts {
        config_file: Some(file.to_string_lossy().into_owned()),
        ..in_directory(&images, None)
    };
    let answer = client
        .call(&request(CriuReqType::CpuinfoDump, opts))
        .expect("an answer");
    assert!(answer.success, "{answer:?}");
    assert!(directory.path().join("cpuinfo.img").exists());
    assert!(directory.path().join("elsewhere.log").exists());
    assert!(!directory.path().join("rpc.log").exists());
}

#[test]
fn a_pid_that_nobody_has_is_answered_with_its_errno() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let images = File::open(directory.path()).expect("it is there");
    let mut client = start(directory.path());
    let asked = request(CriuReqType::Dump, in_directory(&images, Some(4_194_303)));
    let answer = client.call(&asked).expect("an answer");
    assert_eq!(
        answer.cr_errno,
        Some(Errno::SRCH.raw_os_error()),
        "{answer:?}"
    );
    let log = fs::read_to_string(directory.path().join("rpc.log")).expect("a log");
    assert!(log.contains("There is no task 4194303"), "{log}");
}

#[test]
fn a_tree_goes_through_a_dump_and_a_restore_with_its_caller_asked_at_each_stage() {
    let name = "a_tree_goes_through_a_dump_and_a_restore_with_its_caller_asked_at_each_stage";
    if !skips::is_root(name) {
        return;
    }
    let mut fixture = Fixture::start("threads").expect("the program starts");
    fs::create_dir(fixture.images()).expect("a new directory");
    let images = File::open(fixture.images()).expect("it is there");
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let notified = |opts| CriuOpts {
        notify_scripts: Some(true),
        ..opts
    };

    // A caller that says no: the program runs on.
    let mut client = start(scratch.path());
    let opts = notified(in_directory(&images, Some(fixture.pid)));
    let asked = request(CriuReqType::Dump, opts);
    let refusing = |notified: &Notified| notified.script != "post-dump";
    let (answer, _) = client.call_notified(&asked, refusing).expect("an answer");
    assert!(
        !answer.success && told(&answer).contains("post-dump"),
        "{answer:?}"
    );
    fixture.check().expect("it runs on");

    let mut client = start(scratch.path());
    let (answer, seen) = client.call_notified(&asked, |_| true).expect("an answer");
    assert!(answer.success, "{answer:?}");
    assert_eq!(names(&seen), ["pre-dump", "query-ext-files", "post-dump"]);
    assert!(client.end().expect("it ends").expect("ours").success());
    process::wait_for_ends(&[fixture.pid], std::time::Duration::from_secs(30)).expect("it ends");

    let mut client = start(scratch.path());
    let opts = CriuOpts {
        rst_sibling: Some(true),
        ..notified(in_directory(&images, None))
    };
    let asked = request(CriuReqType::Restore, opts);
    let (answer, seen) = client.call_notified(&asked, |_| true).expect("an answer");
    assert!(answer.success, "{answer:?}");
    assert_eq!(answer.restore.map(|restore| restore.pid), Some(fixture.pid));
    let order = [
        "pre-restore",
        "setup-namespaces",
        "post-setup-namespaces",
        "post-restore",
        "network-unlock",
        "pre-resume",
        "post-resume",
    ];
    assert_eq!(names(&seen), order);
    for told in &seen {
        let with_pid = matches!(told.script.as_str(), "setup-namespaces" | "post-restore");
        assert_eq!(told.pid, with_pid.then_some(fixture.pid), "{told:?}");
    }
    assert!(client.end().expect("it ends").expect("ours").success());
    let own = std::process::id().cast_signed();
    assert_eq!(process::parent(fixture.pid), Some(own), "rst_sibling");
    fixture.check().expect("the program goes on");
    let printed = fs::read_to_string(scratch.path().join("printed")).expect("it is a file");
    assert_eq!(printed, "");
}

fn names(seen: &[Notified]) -> Vec<&str> {
    seen.iter()
        .map(|notified| notified.script.as_str())
        .collect()
}

/// A service in the background, ended when dropped.
struct Background(rustix::process::Pid);

impl Drop for Background {
    fn drop(&mut self) {
        // It fails only where it is gone already.
        let _ = rustix::process::kill_process(self.0, rustix::process::Signal::KILL);
    }
}

#[test]
fn a_service_in_the_background_answers_many_callers() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let address = directory.path().join("socket");
    let output = Command::new(FLOE)
        .current_dir(directory.path())
        .args([
            "service",
            "-d",
            "--pidfile",
            "pid",
            "-o",
            "log",
            "--address",
        ])
        .arg(&address)
        .output()
        .expect("the binary runs");
    assert!(output.status.success(), "{output:?}");
    let pid = loop {
        let text = fs::read_to_string(directory.path().join("pid")).unwrap_or_default();
        if let Ok(pid) = text.parse() {
            break rustix::process::Pid::from_raw(pid).expect("a pid");
        }
        std::thread::yield_now();
    };
    let _service = Background(pid);
    for _ in 0..3 {
        let mut client = Client::connect(&address).expect("it listens");
        let answer = client
            .call(&of_type(CriuReqType::Version))
            .expect("an answer");
        assert!(answer.success);
    }
    let mut client = Client::connect(&address).expect("it listens");
    let opts = CriuOpts {
        rst_sibling: Some(true),
        images_dir: Some("/tmp".into()),
        ..no_options()
    };
    let answer = client
        .call(&request(CriuReqType::Restore, opts))
        .expect("an answer");
    assert!(
        told(&answer).contains("rst_sibling needs `swrk`"),
        "{answer:?}"
    );
}
