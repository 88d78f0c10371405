//! `cargo xtask zdtm`: CRIU's own test-suite, in a checkout that exists and is built, with our binary.

mod cause;
mod suite;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};

/// The checkout, and what of it.
#[derive(clap::Args)]
pub struct Arguments {
    /// A checkout of CRIU with its tests built.
    #[arg(long)]
    checkout: PathBuf,
    /// Only the tests named in this file: the first word of each line.
    #[arg(long)]
    list: Option<PathBuf>,
    /// The binary; ours, built for release, by default.
    #[arg(long)]
    binary: Option<PathBuf>,
    /// More options of `zdtm.py run`, as one word, such as `--options=--norst`.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    options: String,
    /// Seconds that one test may take.
    #[arg(long, default_value_t = 60)]
    timeout: u64,
    /// Write the table to docs/zdtm.md.
    #[arg(long)]
    write: bool,
    /// Tests by name, such as `env00` or `static/env00`.
    tests: Vec<String>,
}

/// How a test ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed(String),
    Skipped(String),
}

/// Runs the tests one after the other and prints a line for each.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let directory = arguments.checkout.join("test");
    let directory = directory
        .canonicalize()
        .with_context(|| format!("no tests in {}", arguments.checkout.display()))?;
    ensure!(
        directory.join("zdtm.py").exists(),
        "no zdtm.py in {}",
        directory.display()
    );
    let binary = match (&arguments.binary, std::env::var_os("FLOE_BIN")) {
        (Some(path), _) => std::path::absolute(path)?,
        (None, Some(path)) => std::path::absolute(path)?,
        (None, None) => crate::build_release("floe", "floe")?,
    };
    let tests = tests(arguments, &directory)?;
    ensure!(!tests.is_empty(), "no tests");
    testkit::process::adopt_orphans()?;
    let suite = suite::Suite {
        directory,
        binary,
        options: arguments
            .options
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
        limit: Duration::from_secs(arguments.timeout),
    };
    let mut results = Vec::new();
    for test in tests {
        let verdict = suite.run(&test)?;
        let name = test.trim_start_matches("zdtm/").to_owned();
        match &verdict {
            Verdict::Passed => println!("PASS {name}"),
            Verdict::Failed(cause) => println!("FAIL {name}: {cause}"),
            Verdict::Skipped(why) => println!("SKIP {name}: {why}"),
        }
        results.push((name, verdict));
    }
    println!("{}", counts(&results));
    if arguments.write {
        let path = crate::root().join("docs/zdtm.md");
        let text = document(&results, &arguments.options)?;
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    let failed = results
        .iter()
        .any(|(_, verdict)| matches!(verdict, Verdict::Failed(_)));
    if failed {
        bail!("some tests failed");
    }
    Ok(())
}

fn tests(arguments: &Arguments, directory: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = arguments.tests.clone();
    if let Some(list) = &arguments.list {
        let text =
            std::fs::read_to_string(list).with_context(|| format!("reading {}", list.display()))?;
        let words = text
            .lines()
            .filter_map(|line| line.split_whitespace().next());
        names.extend(
            words
                .filter(|word| !word.starts_with('#'))
                .map(str::to_owned),
        );
    }
    if names.is_empty() {
        return suite::host_tests(directory);
    }
    Ok(names
        .iter()
        .map(|name| suite::full_name(directory, name))
        .collect())
}

fn counts(results: &[(String, Verdict)]) -> String {
    let count =
        |is: fn(&Verdict) -> bool| results.iter().filter(|(_, verdict)| is(verdict)).count();
    format!(
        "{} passed, {} failed, {} skipped of {}",
        count(|verdict| *verdict == Verdict::Passed),
        count(|verdict| matches!(verdict, Verdict::Failed(_))),
        count(|verdict| matches!(verdict, Verdict::Skipped(_))),
        results.len()
    )
}

fn document(results: &[(String, Verdict)], options: &str) -> anyhow::Result<String> {
    let mut text = String::new();
    let with = if options.is_empty() {
        String::new()
    } else {
        format!(" with `{options}`")
    };
    writeln!(
        text,
        "# CRIU's test-suite\n\n\
         Written by `cargo xtask zdtm --checkout PATH --write`: the host flavour of ZDTM{with}, one test\n\
         after the other.\n\n\
         {}.\n\n## What does not pass\n\n| test | cause |\n| --- | --- |",
        counts(results)
    )?;
    for (name, verdict) in results {
        if let Verdict::Failed(cause) = verdict {
            writeln!(text, "| {name} | {} |", cell(cause))?;
        }
    }
    writeln!(
        text,
        "\n## What the suite skips here\n\n| test | reason |\n| --- | --- |"
    )?;
    for (name, verdict) in results {
        if let Verdict::Skipped(why) = verdict {
            writeln!(text, "| {name} | {} |", cell(why))?;
        }
    }
    Ok(text)
}

/// Text that fits a cell: no bars, not too long.
fn cell(text: &str) -> String {
    let short: String = text.chars().take(200).collect();
    short.replace('|', "\\|")
}
