//! Dumps of small trees: what is in the images, what is refused, and that the tasks run on unharmed.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use floe_dump::{DumpError, FreezeError, dump};
use floe_image::messages::MmEntry;
use floe_image::messages::{CoreEntry, FdTypes, PstreeEntry, VmaEntry};
use floe_image::{ImageDir, ImageKind};
use floe_kernel::features::KernelFeatures;
use floe_kernel::ids::HostPid;
use floe_kernel::proc::{ProcDir, Status, parse_maps, parse_stat, parse_status};
use floe_options::{AfterDump, DumpOptions, Place, TreePid};

/// A shell script in a session of its own, killed with all its children in the end.
struct Script {
    child: Child,
}

impl Script {
    /// Runs `text` in `place`, then becomes `sleep`.
    fn start(text: &str, place: &Path) -> Self {
        let child = Command::new("setsid")
            .args(["sh", "-c", &format!("{text}\nexec sleep 1000")])
            .current_dir(place)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("setsid is everywhere");
        let script = Script { child };
        // Once the shell has become `sleep`, all that it started is there.
        let comm = format!("/proc/{}/comm", script.pid());
        wait_until(|| std::fs::read_to_string(&comm).is_ok_and(|name| name == "sleep\n"));
        script
    }

    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    fn options(&self, images: &Path) -> DumpOptions {
        let tree = TreePid::new(self.pid()).expect("positive");
        DumpOptions {
            after: AfterDump::LeaveRunning,
            ..DumpOptions::new(tree, Place::new(images))
        }
    }

    /// The root and its children; none once it is gone.
    fn family(&self) -> Vec<HostPid> {
        let root = HostPid(self.pid());
        let Ok(children) = ProcDir::open(root).and_then(|proc| proc.children(root)) else {
            return Vec::new();
        };
        [vec![root], children].concat()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        for pid in self.family() {
            // Gone is as good.
            let _ = floe_kernel::pidfd::tgkill(pid, libc::SIGKILL);
        }
        // Ends with the children that it left to init.
        let _ = self.child.wait();
    }
}

fn wait_until(condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "it takes too long"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn status(pid: HostPid) -> Status {
    let proc = ProcDir::open(pid).expect("alive");
    parse_status(&proc.read("status").expect("readable")).expect("understood")
}

/// Whether the tests may trace other tasks and compare their kernel objects.
fn may_dump(name: &str) -> bool {
    let own = HostPid(std::process::id().cast_signed());
    let allowed = status(own).uids[1] == 0;
    if !allowed {
        println!("{name} skipped: needs root");
    }
    allowed
}

/// Nothing of ours is left: no tracer, no stop, no executable page that is writable.
fn assert_unharmed(pid: HostPid) {
    wait_until(|| !matches!(status(pid).state, b't' | b'T'));
    assert_eq!(status(pid).tracer, None);
    let proc = ProcDir::open(pid).expect("alive");
    let maps = parse_maps(&proc.read("maps").expect("readable")).expect("understood");
    assert!(
        !maps.iter().any(|map| map.write && map.exec),
        "an executor was left in task {pid}"
    );
}

fn features() -> KernelFeatures {
    KernelFeatures::probe()
}

#[test]
fn a_tree_is_in_the_images_and_runs_on() {
    if !may_dump("a_tree_is_in_the_images_and_runs_on") {
        return;
    }
    let place = tempfile::tempdir().expect("a directory");
    let images = place.path().join("images");
    let script = Script::start("exec 5>out; (exec sleep 1000) & (exit 3) &", place.path());
    let family = script.family();
    wait_until(|| status(family[2]).state == b'Z' && status(family[1]).name == b"sleep");
    let report = dump(&script.options(&images), &features(), None).expect("dumped");
    assert_eq!((report.tasks, family.len()), (3, 3));

    let dir = ImageDir::open(&images).expect("images");
    let tree: Vec<PstreeEntry> = dir.read_all(ImageKind::Pstree, 0).expect("whole");
    let pids: BTreeSet<u32> = tree.iter().map(|entry| entry.pid).collect();
    assert_eq!(
        pids,
        family.iter().map(|pid| pid.0.cast_unsigned()).collect()
    );
    assert!(
        tree[1..]
            .iter()
            .all(|entry| entry.ppid == tree[0].pid && entry.sid == tree[0].pid)
    );

    let cores = tree.iter().map(|entry| {
        dir.read_one::<CoreEntry>(ImageKind::Core, u64::from(entry.pid))
            .expect("whole")
    });
    let states: Vec<(u32, u32)> = cores
        .map(|core| {
            core.tc
                .map(|tc| (tc.task_state, tc.exit_code))
                .expect("a leader")
        })
        .collect();
    assert_eq!(states.iter().filter(|&&state| state == (1, 0)).count(), 2);
    assert!(
        states.contains(&(2, 3 << 8)),
        "the zombie's exit code: {states:?}"
    );

    let files = dir.read_files().expect("whole");
    let out = files
        .iter()
        .filter_map(|file| file.reg.as_ref())
        .find(|file| file.name.ends_with("/out"))
        .expect("fd 5");
    assert_eq!(out.size, Some(0));
    assert!(files.iter().any(|file| file.r#type == FdTypes::Reg as i32
        && file.reg.as_ref().is_some_and(|reg| reg.name == "/dev/null")));
    assert!(images.join("floe.json").exists() && images.join("stats-dump").exists());
    for pid in family.into_iter().filter(|pid| status(*pid).state != b'Z') {
        assert_unharmed(pid);
    }
}

#[test]
fn mappings_are_in_order_and_pages_fill_their_file() {
    if !may_dump("mappings_are_in_order_and_pages_fill_their_file") {
        return;
    }
    let place = tempfile::tempdir().expect("a directory");
    let images = place.path().join("images");
    let script = Script::start("x=1", place.path());
    let report = dump(&script.options(&images), &features(), None).expect("dumped");
    let dir = ImageDir::open(&images).expect("images");
    let mm: MmEntry = dir
        .read_one(ImageKind::Mm, script.pid() as u64)
        .expect("whole");
    let in_order = |pair: &[VmaEntry]| pair[0].end <= pair[1].start;
    assert!(mm.vmas.windows(2).all(in_order));
    assert!(
        mm.vmas
            .iter()
            .any(|vma| vma.flags & libc::MAP_GROWSDOWN as u32 != 0),
        "the stack"
    );
    let size = std::fs::metadata(images.join("pages-1.img"))
        .expect("written")
        .len();
    assert_eq!(size, report.memory.pages_written * 4096);
    let stat = parse_stat(
        &ProcDir::open(HostPid(script.pid()))
            .expect("alive")
            .read("stat")
            .expect("readable"),
    )
    .expect("understood");
    assert_eq!(
        (mm.mm_start_stack, mm.mm_arg_start),
        (stat.start_stack.0, stat.arg_start.0)
    );
}

#[test]
fn all_obstacles_are_listed_and_nothing_is_changed() {
    if !may_dump("all_obstacles_are_listed_and_nothing_is_changed") {
        return;
    }
    let place = tempfile::tempdir().expect("a directory");
    let images = place.path().join("images");
    let script = Script::start("exec 5>one; flock 5; exec 6>two; flock -s 6", place.path());
    let error = dump(&script.options(&images), &features(), None).expect_err("locked files");
    let DumpError::Preflight(obstacles) = &error else {
        panic!("{error}")
    };
    assert_eq!(obstacles.0.len(), 2, "{error}");
    assert!(
        obstacles
            .0
            .iter()
            .all(|obstacle| obstacle.remedy.contains("--file-locks")),
        "{error}"
    );
    assert!(!images.join("floe.json").exists());
    assert_unharmed(HostPid(script.pid()));
    let options = DumpOptions {
        file_locks: true,
        ..script.options(&images)
    };
    dump(&options, &features(), None).expect("with the remedy");
}

#[test]
fn a_killed_tree_is_gone_when_the_dump_returns() {
    if !may_dump("a_killed_tree_is_gone_when_the_dump_returns") {
        return;
    }
    let place = tempfile::tempdir().expect("a directory");
    let script = Script::start("sleep 1000 &", place.path());
    let child = script.family()[1];
    let options = DumpOptions {
        after: AfterDump::Kill,
        ..script.options(&place.path().join("images"))
    };
    dump(&options, &features(), None).expect("dumped");
    let ended = |pid: HostPid| ProcDir::open(pid).map_or(true, |_| status(pid).state == b'Z');
    assert!(ended(HostPid(script.pid())) && ended(child));
}

#[test]
fn a_task_that_cannot_be_stopped_is_named_with_the_reason() {
    if !may_dump("a_task_that_cannot_be_stopped_is_named_with_the_reason") {
        return;
    }
    let place = tempfile::tempdir().expect("a directory");
    let script = Script::start("x=1", place.path());
    let images = place.path().join("images");
    let refused = |tree: i32| {
        let tree = TreePid::new(tree).expect("positive");
        dump(
            &DumpOptions {
                tree,
                ..script.options(&images)
            },
            &features(),
            None,
        )
        .expect_err("refused")
    };
    let own = std::process::id().cast_signed();
    assert!(matches!(
        refused(own),
        DumpError::Freeze(FreezeError::Ourselves { .. })
    ));
    assert!(matches!(
        refused(i32::MAX),
        DumpError::Freeze(FreezeError::NoTask { .. })
    ));
    let traced = floe_inject::Seized::new(HostPid(script.pid()), 0).expect("nobody else traces it");
    match refused(script.pid()) {
        DumpError::Freeze(FreezeError::Traced { pid, .. }) => assert_eq!(pid.0, script.pid()),
        other => panic!("{other}"),
    }
    traced.interrupt().expect("traced");
    traced
        .wait_stopped()
        .expect("alive")
        .release()
        .expect("stopped");
}
