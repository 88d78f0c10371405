//! What is in the way of a restore on this machine: `floe verify` and `floe restore` say the same, with what
//! to do, and leave with 3; options that a restore lacks are no fault of the checkpoint. Needs root; says
//! `skipped` without.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use testkit::skips::as_root;
use testkit::{Engine, Fixture, process};

/// How long a program may take to stand or to end.
const LIMIT: Duration = Duration::from_secs(20);

fn floe(words: &[&str], images: &Path) -> anyhow::Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_floe"));
    match words {
        ["verify", ..] => command.args(words).arg(images),
        _ => command.args(words).arg("-D").arg(images),
    };
    Ok(command.output()?)
}

fn said(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&text).into_owned()
}

/// Both commands leave with `code` and say all of `wanted`.
fn both(images: &Path, options: &[&str], (code, wanted): (i32, &[&str])) -> anyhow::Result<()> {
    for words in [&["verify"][..], &["restore", "-d"]] {
        let output = floe(&[words, options].concat(), images)?;
        let text = said(&output);
        ensure!(output.status.code() == Some(code), "{words:?}: {text}");
        for part in wanted {
            ensure!(text.contains(part), "{words:?}: `{part}` is not in: {text}");
        }
        let explained = text.contains("->") || text.contains("what to do:");
        ensure!(explained, "{words:?}: no remedy: {text}");
    }
    Ok(())
}

/// A checkpoint of a program that has `file` open at descriptor 5 and runs in `home`.
struct Saved {
    place: tempfile::TempDir,
    pid: i32,
}

impl Saved {
    fn make(unshare: &[&str], script: &str, options: &[&str]) -> anyhow::Result<Saved> {
        process::adopt_orphans()?;
        let place = tempfile::tempdir()?;
        fs::create_dir(place.path().join("home"))?;
        fs::write(place.path().join("file"), "as it was")?;
        fs::set_permissions(place.path().join("file"), fs::Permissions::from_mode(0o640))?;
        let mut words = vec!["bash", "-ec", script];
        if !unshare.is_empty() {
            words = [&["unshare"], unshare, &words].concat();
        }
        let child = Command::new("setsid")
            .args(words)
            .env("DIR", place.path())
            .current_dir(place.path().join("home"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let saved = Saved {
            pid: i32::try_from(child.id())?,
            place,
        };
        let deadline = Instant::now() + LIMIT;
        let name = || fs::read_to_string(format!("/proc/{}/comm", saved.pid));
        while name()?.trim() != "sleep" {
            ensure!(Instant::now() < deadline, "the program does not stand");
            std::thread::sleep(Duration::from_millis(5));
        }
        let pid = saved.pid.to_string();
        let output = floe(&[&["dump", "-t", &pid], options].concat(), &saved.images())?;
        ensure!(output.status.success(), "{}", said(&output));
        process::wait_for_ends(&[saved.pid], LIMIT)?;
        Ok(saved)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn images(&self) -> PathBuf {
        self.path("images")
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        // It may not have been restored.
        let _ = process::kill_ours(&[self.pid], LIMIT);
    }
}

const WITH_FILE: &str = "exec 5<$DIR/file; exec sleep 1000";

#[test]
fn a_file_that_is_missing_or_changed_is_named_with_its_remedy() {
    as_root(
        "a_file_that_is_missing_or_changed_is_named_with_its_remedy",
        || {
            let saved = Saved::make(&[], WITH_FILE, &[])?;
            let (file, images) = (saved.path("file"), saved.images());
            let name = file.to_str().context("UTF-8")?;
            let refused = |wanted: &[&str]| {
                both(&images, &[], (3, wanted))?;
                ensure!(!process::exists(saved.pid), "the task is there");
                Ok(())
            };
            fs::rename(&file, saved.path("elsewhere"))?;
            refused(&[name, "No such file", "bring it here"])?;
            fs::create_dir(&file)?;
            refused(&[
                name,
                "its type was a file, is a directory",
                "bring back the file",
            ])?;
            fs::remove_dir(&file)?;
            fs::write(&file, "grown since then")?;
            refused(&[
                name,
                "its size was 9 bytes, is 16 bytes",
                "bring back the file",
            ])?;
            fs::rename(saved.path("elsewhere"), &file)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
            refused(&[name, "its mode was 640, is 600", "chmod 640 "])?;
            let good = fs::Permissions::from_mode(0o640);
            fs::set_permissions(&file, good)?;
            fs::rename(saved.path("home"), saved.path("house"))?;
            refused(&["home cannot be opened", "bring it here"])?;
            fs::rename(saved.path("house"), saved.path("home"))?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
            for command in [&["verify"][..], &["restore", "-d"]] {
                let output = floe(&[command, &["--skip-file-rwx-check"]].concat(), &images)?;
                ensure!(output.status.success(), "{}", said(&output));
            }
            refused_by_its_own_pid(&saved)
        },
    );
}

/// Restored once, the task is in the way of itself.
fn refused_by_its_own_pid(saved: &Saved) -> anyhow::Result<()> {
    let options = ["--skip-file-rwx-check"];
    let taken = format!("{} is taken by", saved.pid);
    both(
        &saved.images(),
        &options,
        (3, &[&taken, "end it", "--new-pidns"]),
    )?;
    let output = floe(&["verify", "--new-pidns", options[0]], &saved.images())?;
    ensure!(output.status.success(), "{}", said(&output));
    Ok(())
}

/// The port in `127.0.0.1:PORT listening`.
fn listening_port(images: &Path) -> anyhow::Result<u16> {
    let mut inspect = Command::new(env!("CARGO_BIN_EXE_floe"));
    let output = inspect.args(["inspect", "--json"]).arg(images).output()?;
    let value: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let text = value["sockets"][0]["text"].as_str().context("a socket")?;
    let address = text.split(' ').next().unwrap_or_default();
    let port = address.rsplit(':').next().unwrap_or_default();
    port.parse().with_context(|| text.to_string())
}

#[test]
fn a_port_that_another_program_has_is_named_with_its_remedy() {
    as_root(
        "a_port_that_another_program_has_is_named_with_its_remedy",
        || {
            let mut fixture = Fixture::start("tcp-listen")?;
            fixture.dump(&Engine::new("floe", env!("CARGO_BIN_EXE_floe")), &[])?;
            let port = listening_port(fixture.images())?;
            let _holder = TcpListener::bind(("127.0.0.1", port))?;
            let wanted = [
                &*format!("tcp port {port} is in use"),
                "end the program that holds it",
            ];
            both(fixture.images(), &[], (3, &wanted))
        },
    );
}

#[test]
fn an_option_that_is_missing_is_listed_and_no_fault() {
    as_root("an_option_that_is_missing_is_listed_and_no_fault", || {
        let mut fixture = Fixture::start("tcp-established")?;
        fixture.dump(&Engine::new("floe", env!("CARGO_BIN_EXE_floe")), &[])?;
        let output = floe(&["verify"], fixture.images())?;
        let text = said(&output);
        ensure!(output.status.success(), "{text}");
        for part in [
            "need options",
            "--tcp-established",
            "--tcp-close",
            "restored here with: --tcp",
        ] {
            ensure!(text.contains(part), "`{part}` is not in: {text}");
        }
        let json = floe(&["verify", "--json"], fixture.images())?;
        let json: serde_json::Value = serde_json::from_slice(&json.stdout)?;
        ensure!(
            json["whole"] == true && json["restorable"] == true,
            "{json}"
        );
        ensure!(json["needs"][0] == "--tcp-established", "{json}");
        for option in ["--tcp-established", "--tcp-close"] {
            let text = said(&floe(&["verify", option], fixture.images())?);
            ensure!(
                !text.contains("need ") && text.contains("can be restored here.\n"),
                "{text}"
            );
        }
        Ok(())
    });
}

#[test]
fn a_file_on_the_root_of_own_mounts_is_looked_for_there() {
    as_root(
        "a_file_on_the_root_of_own_mounts_is_looked_for_there",
        || {
            let saved = Saved::make(&["-m"], WITH_FILE, &[])?;
            let on_root = |path: &Path| Ok::<_, std::io::Error>(fs::metadata(path)?.dev());
            if on_root(&saved.path("file"))? != on_root(Path::new("/"))? {
                // It goes along in a mount of its own.
                return Ok(());
            }
            let output = floe(&["verify"], &saved.images())?;
            ensure!(output.status.success(), "{}", said(&output));
            fs::rename(saved.path("file"), saved.path("elsewhere"))?;
            let name = saved.path("file").display().to_string();
            both(&saved.images(), &[], (3, &[&name, "No such file"]))?;
            ensure!(!process::exists(saved.pid), "the task is there");
            // Another root has it.
            let root = saved.path("root");
            let inside = root.join(name.trim_start_matches('/'));
            fs::create_dir_all(inside.parent().context("a directory")?)?;
            fs::rename(saved.path("elsewhere"), &inside)?;
            let option = root.display().to_string();
            let text = said(&floe(&["verify", "--root", &option], &saved.images())?);
            ensure!(
                !text.contains(&format!("{name} cannot be opened")),
                "{text}"
            );
            Ok(())
        },
    );
}

#[test]
fn terminals_of_the_tree_are_no_missing_files() {
    as_root("terminals_of_the_tree_are_no_missing_files", || {
        for program in ["pty", "pty-controlling"] {
            let mut fixture = Fixture::start(program)?;
            fixture.dump(&Engine::new("floe", env!("CARGO_BIN_EXE_floe")), &[])?;
            let output = floe(&["verify"], fixture.images())?;
            ensure!(output.status.success(), "{program}: {}", said(&output));
        }
        Ok(())
    });
}

#[test]
fn an_external_mount_is_asked_for_by_its_name_and_must_be_there() {
    as_root(
        "an_external_mount_is_asked_for_by_its_name_and_must_be_there",
        || {
            let script = "mount --bind $DIR/home /mnt; exec sleep 1000";
            let saved = Saved::make(&["-m"], script, &["--external", "mnt[/mnt]:store"])?;
            let text = said(&floe(&["verify"], &saved.images())?);
            ensure!(
                text.contains("restored here with: --external 'mnt[store]:PATH'"),
                "{text}"
            );
            let absent = saved.path("nowhere");
            let given = format!("mnt[store]:{}", absent.display());
            let wanted = [
                "nowhere, which is to be mounted",
                "name the place where it is now",
            ];
            both(&saved.images(), &["--external", &given], (3, &wanted))?;
            let given = format!("mnt[store]:{}", saved.path("home").display());
            let output = floe(&["verify", "--external", &given], &saved.images())?;
            ensure!(output.status.success(), "{}", said(&output));
            Ok(())
        },
    );
}

#[test]
fn a_control_group_that_is_missing_is_named_with_its_remedy() {
    as_root(
        "a_control_group_that_is_missing_is_named_with_its_remedy",
        || {
            let group = Path::new("/sys/fs/cgroup/pids");
            let group = match group.is_dir() {
                true => group.join(format!("floe-refusal-{}", std::process::id())),
                false => {
                    return testkit::skips::skip(
                        "a_control_group_that_is_missing_is_named_with_its_remedy",
                        "no control groups of version 1",
                    );
                }
            };
            fs::create_dir(&group)?;
            let name = group.display();
            let script = format!("echo $$ > {name}/cgroup.procs; exec sleep 1000");
            let saved = Saved::make(&[], &script, &[])?;
            fs::remove_dir(&group)?;
            let options = ["--manage-cgroups=none"];
            both(
                &saved.images(),
                &options,
                (
                    3,
                    &["floe-refusal-", "is not here", "--manage-cgroups=soft"],
                ),
            )
        },
    );
}

#[test]
fn images_that_are_not_there_or_not_readable_are_told_by_5() {
    as_root(
        "images_that_are_not_there_or_not_readable_are_told_by_5",
        || {
            let place = tempfile::tempdir()?;
            let wanted = ["nothing", "inventory.img is in it"];
            both(&place.path().join("nothing"), &[], (5, &wanted))?;
            // A user to whom the directory is closed, with a binary that is open to all.
            let saved = Saved::make(&[], WITH_FILE, &[])?;
            fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755))?;
            let binary = place.path().join("floe");
            fs::copy(env!("CARGO_BIN_EXE_floe"), &binary)?;
            let images = saved.images().display().to_string();
            for words in [&["verify", &images][..], &["restore", "-d", "-D", &images]] {
                let mut command = Command::new(&binary);
                let output = command.args(words).uid(65534).gid(65534).output()?;
                let text = said(&output);
                ensure!(output.status.code() == Some(5), "{words:?}: {text}");
                ensure!(
                    text.contains(&images) && text.contains("Permission denied"),
                    "{text}"
                );
                ensure!(text.contains("what to do:"), "{text}");
            }
            Ok(())
        },
    );
}
