//! One test of the suite: its process, its time, its verdict.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use testkit::process;

use super::{Verdict, cause};

/// Where and how tests run.
pub(super) struct Suite {
    /// The checkout's `test`.
    pub directory: PathBuf,
    /// The binary under test.
    pub binary: PathBuf,
    /// More options of `zdtm.py run`.
    pub options: Vec<String>,
    /// How long one test may take.
    pub limit: Duration,
}

impl Suite {
    /// Runs one test to its end and leaves no process of it.
    pub fn run(&self, test: &str) -> anyhow::Result<Verdict> {
        let results = self.directory.join("floe-results");
        fs::create_dir_all(&results)?;
        let output = results.join(format!("{}.log", test.replace('/', "_")));
        let images = self.directory.join("dump").join(test);
        if images.exists() {
            fs::remove_dir_all(&images).context("removing the images of an earlier run")?;
        }
        let log = File::create(&output)?;
        let mut command = Command::new("setsid");
        command.args(["python3", "-u", "./zdtm.py", "run", "-t", test, "-f", "h"]);
        command.arg("--criu-bin").arg(&self.binary);
        command
            .args(["--ignore-taint", "-k", "failed"])
            .args(&self.options);
        command
            .current_dir(&self.directory)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/root")
            .env("LANG", "C.UTF-8")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut child = command.spawn().context("starting zdtm.py")?;
        let watched = process::watch(child.id() as i32)?;
        let deadline = Instant::now() + self.limit;
        let ended = process::wait_readable(&[&watched], deadline)?.is_some();
        let passed = ended && child.wait()?.success();
        kill_descendants()?;
        if !ended {
            // Killed with the others; its status says nothing.
            let _ = child.wait();
        }
        let text = String::from_utf8_lossy(&fs::read(&output)?).into_owned();
        Ok(self.judge(test, &text, passed, !ended))
    }

    fn judge(&self, test: &str, text: &str, passed: bool, timed_out: bool) -> Verdict {
        let skipped = text
            .lines()
            .filter_map(|line| line.strip_prefix("Skipping "))
            .find_map(|rest| rest.split_once(" ("));
        if let (Some((_, why)), false) = (skipped, timed_out) {
            return Verdict::Skipped(why.trim_end_matches(')').to_owned());
        }
        if passed && text.contains(&format!("Test {test} PASS")) {
            return Verdict::Passed;
        }
        let cause = cause::find(&self.directory, test, text);
        Verdict::Failed(if timed_out {
            format!("not done in {:?}: {cause}", self.limit)
        } else {
            cause
        })
    }
}

/// Kills all that a test left, in as many turns as it takes: tasks may start others meanwhile.
fn kill_descendants() -> anyhow::Result<()> {
    let own = std::process::id() as i32;
    for _ in 0..20 {
        let left: Vec<i32> = process::family(own)
            .into_iter()
            .filter(|pid| *pid != own)
            .collect();
        if left.is_empty() {
            break;
        }
        process::kill_ours(&left, Duration::from_secs(10))?;
    }
    Ok(())
}

/// All tests of the suite for the host's namespaces, but those meant to be run by hand.
pub(super) fn host_tests(directory: &Path) -> anyhow::Result<Vec<String>> {
    const NOT_TESTS: [&str; 5] = [".checkskip", ".hook", ".so", ".sh", "route_rules"];
    let mut tests = BTreeSet::new();
    for group in ["zdtm/static", "zdtm/transition"] {
        for entry in fs::read_dir(directory.join(group))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let meta = entry.metadata()?;
            let runs = meta.is_file() && meta.permissions().mode() & 0o111 != 0;
            if !runs || NOT_TESTS.iter().any(|end| name.ends_with(end)) {
                continue;
            }
            let text = fs::read_to_string(entry.path().with_file_name(format!("{name}.desc")));
            let text = text.unwrap_or_default();
            let flavour = field(&text, "flavor").unwrap_or_else(|| "h ns uns".into());
            let flags = field(&text, "flags").unwrap_or_default();
            let has = |list: &str, word: &str| list.split_whitespace().any(|found| found == word);
            if has(&flavour, "h") && !has(&flags, "noauto") {
                tests.insert(format!("{group}/{name}"));
            }
        }
    }
    Ok(tests.into_iter().collect())
}

/// The text of a field of a `.desc` file, which is a Python dictionary of strings.
fn field(text: &str, name: &str) -> Option<String> {
    let behind = [format!("'{name}'"), format!("\"{name}\"")]
        .iter()
        .find_map(|quoted| text.split_once(quoted.as_str()))?
        .1;
    let value = behind.trim_start().strip_prefix(':')?.trim_start();
    let quote = value
        .chars()
        .next()
        .filter(|quote| "'\"".contains(*quote))?;
    value[1..].split(quote).next().map(str::to_owned)
}

/// `env00` or `static/env00` as the suite names it.
pub(super) fn full_name(directory: &Path, name: &str) -> String {
    if name.starts_with("zdtm/") {
        return name.to_owned();
    }
    if name.contains('/') {
        return format!("zdtm/{name}");
    }
    let fixed = format!("zdtm/static/{name}");
    if directory.join(&fixed).exists() {
        fixed
    } else {
        format!("zdtm/transition/{name}")
    }
}

#[cfg(test)]
mod tests {
    use super::field;

    #[test]
    fn fields_of_descriptions_are_found() {
        let cases = [
            (
                "{'flavor': 'h ns', 'flags': 'suid'}",
                "flavor",
                Some("h ns"),
            ),
            ("{ \"flags\" : \"noauto\" }", "flags", Some("noauto")),
            ("{'flavor': 'h'}", "flags", None),
            ("", "flags", None),
        ];
        for (text, name, expected) in cases {
            assert_eq!(field(text, name).as_deref(), expected, "{text}");
        }
    }
}
