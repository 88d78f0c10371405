//! Checkpoint and restore by somebody who is not root (`--unprivileged`), with CAP_CHECKPOINT_RESTORE only, and
//! what is said without it. Needs root to become that somebody.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Output};

use testkit::skips;

/// A user with no entry anywhere.
const USER: u32 = 54321;

/// Runs a script as [`USER`] with these capabilities (`+name,-name` as `setpriv` has it) in `directory`.
fn as_user(capabilities: &str, script: &str, directory: &Path) -> Output {
    let mut command = Command::new("setpriv");
    command
        .args([format!("--reuid={USER}"), format!("--regid={USER}")])
        .args(["--clear-groups", "--bounding-set=+all"])
        .arg(format!("--inh-caps={capabilities}"))
        .arg(format!("--ambient-caps={capabilities}"))
        .args(["sh", "-c", script])
        .current_dir(directory)
        .env("HOME", directory);
    command.output().expect("setpriv is part of every system")
}

/// A directory of the user's with the program in it, which may not lie where everybody can reach it.
fn workshop() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let program = directory.path().join("floe");
    fs::copy(env!("CARGO_BIN_EXE_floe"), &program).expect("the binary was built");
    fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("it is ours");
    fs::create_dir(directory.path().join("images")).expect("the directory is empty");
    for path in [
        directory.path().to_path_buf(),
        directory.path().join("images"),
    ] {
        chown(&path, Some(USER), Some(USER)).expect("we are root");
    }
    directory
}

/// A counting program is stopped, brought back, and has to count on.
const ROUND_TRIP: &str = "
exec 3>&- 4>&-
setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i >count; sleep 0.02; done' </dev/null >/dev/null 2>&1 &
pid=$!
until [ -s count ]; do sleep 0.02; done
./floe dump --unprivileged -v1 -t $pid -D images || { kill -9 $pid; exit 1; }
wait $pid 2>/dev/null
before=$(cat count)
./floe restore --unprivileged -v1 -d -D images || exit 1
for i in 1 2 3 4 5 6 7 8 9 10; do
	sleep 0.05
	now=$(cat count)
	[ \"${now:-0}\" -le \"$before\" ] || { kill -9 $pid; exit 0; }
done
kill -9 $pid
echo it does not count on
exit 1";

#[test]
fn one_capability_is_enough() {
    if !skips::is_root("one_capability_is_enough") {
        return;
    }
    let directory = workshop();
    let output = as_user("-all,+checkpoint_restore", ROUND_TRIP, directory.path());
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn without_it_the_remedy_is_named_and_the_program_runs_on() {
    if !skips::is_root("without_it_the_remedy_is_named_and_the_program_runs_on") {
        return;
    }
    let directory = workshop();
    let script = "sleep 100 & ./floe dump --unprivileged -v1 -t $! -D images; code=$?; kill $! || exit 9; exit $code";
    let output = as_user("-all", script, directory.path());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.status.code() != Some(9));
    assert!(errors.contains("CAP_CHECKPOINT_RESTORE"), "{errors}");
}
