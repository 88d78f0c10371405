//! The programs under test: each sets up kernel state, says that it is ready, and checks that
//! state whenever it is asked.
//!
//! One binary holds them all: `testkit-fixture NAME DIRECTORY`. It is asked by `SIGUSR1` and
//! answers with a line in the fifo `answer` of its directory, which it opens only to write that
//! line, so that talking to the test leaves no trace in a dump. A check can be repeated.

mod bench;
mod blocked;
mod bpf;
mod churn;
mod churn_shared;
mod events;
mod files;
mod identity;
mod inet;
mod ipc;
mod locks;
mod memory;
mod mounted;
mod pipes;
mod queues;
mod rounds;
mod security;
mod signals;
mod tasks;
mod terminal;
mod timers;
mod unix;
mod watches;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::sys;

/// Compares the state with what was set up; the error says what differs.
pub type Check = Box<dyn FnMut() -> anyhow::Result<()>>;

/// A program under test.
pub struct Program {
    /// Its name on the command line and in tables.
    pub name: &'static str,
    /// Options that dump and restore need for it, by CRIU's names.
    pub options: &'static [&'static str],
    /// Whether it runs in a mount namespace of its own.
    own_mounts: bool,
    setup: fn(&Place) -> anyhow::Result<Check>,
}

impl Program {
    const fn new(name: &'static str, setup: fn(&Place) -> anyhow::Result<Check>) -> Self {
        Self {
            name,
            options: &[],
            own_mounts: false,
            setup,
        }
    }

    const fn with(self, options: &'static [&'static str]) -> Self {
        Self { options, ..self }
    }

    const fn in_own_mounts(self) -> Self {
        Self {
            own_mounts: true,
            ..self
        }
    }
}

/// Where a program keeps its files.
pub struct Place {
    /// A directory of its own, writable for everybody.
    pub directory: PathBuf,
}

impl Place {
    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

/// A kernel feature or a right that the program needs and this machine lacks.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Missing(pub String);

/// All programs for tests, in the order of the tables.
pub fn programs() -> Vec<&'static Program> {
    [
        memory::PROGRAMS,
        tasks::PROGRAMS,
        identity::PROGRAMS,
        signals::PROGRAMS,
        timers::PROGRAMS,
        files::PROGRAMS,
        pipes::PROGRAMS,
        unix::PROGRAMS,
        inet::PROGRAMS,
        events::PROGRAMS,
        bpf::PROGRAMS,
        terminal::PROGRAMS,
        locks::PROGRAMS,
        ipc::PROGRAMS,
        queues::PROGRAMS,
        security::PROGRAMS,
        blocked::PROGRAMS,
        rounds::PROGRAMS,
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Programs in mount namespaces of their own, which CRIU restores only with a root of their own.
pub fn in_own_mounts() -> impl Iterator<Item = &'static Program> {
    watches::PROGRAMS.iter().chain(mounted::PROGRAMS)
}

/// The workloads of the benchmark.
pub fn workloads() -> Vec<&'static Program> {
    bench::PROGRAMS.iter().collect()
}

/// A program or workload by its name.
pub fn find(name: &str) -> Option<&'static Program> {
    programs()
        .into_iter()
        .chain(workloads())
        .chain(bench::IN_ROUNDS)
        .chain(churn::PROGRAMS)
        .chain(rounds::NOT_DUMPED)
        .chain(bpf::REFUSED)
        .chain(in_own_mounts())
        .chain(mounted::REFUSED)
        .chain(queues::REFUSED)
        .chain(inet::WITH_PEER)
        .find(|program| program.name == name)
}

/// Set in a program that is in its own mount namespace.
const INSIDE: &str = "TESTKIT_INSIDE";

/// The `main` of `testkit-fixture`.
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let [_, name, directory] = args.as_slice() else {
        eprintln!("usage: testkit-fixture NAME DIRECTORY");
        return ExitCode::from(2);
    };
    let Some(program) = find(name) else {
        eprintln!("testkit-fixture: no program `{name}`");
        return ExitCode::from(2);
    };
    let place = Place {
        directory: directory.into(),
    };
    if program.own_mounts && std::env::var_os(INSIDE).is_none() {
        let error = sys::mounts::start_again_inside(&place.path("output"), INSIDE);
        eprintln!("testkit-fixture: {name} in a mount namespace: {error}");
        return ExitCode::FAILURE;
    }
    // The program is its own session, as a daemon is; fails only if it is one already.
    let _ = rustix::process::setsid();
    sys::signal::block(&[libc::SIGUSR1]);
    rustix::process::umask(rustix::fs::Mode::empty());
    match (program.setup)(&place) {
        Ok(check) => serve(&place.directory, check),
        Err(error) => {
            let word = if error.is::<Missing>() {
                "skipped"
            } else {
                "not ready"
            };
            answer(&place.directory, &format!("{word}: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn serve(directory: &Path, mut check: Check) -> ExitCode {
    answer(directory, "ready");
    loop {
        if let Err(error) = sys::signal::take(&[libc::SIGUSR1], None) {
            answer(
                directory,
                &format!("not ok: waiting for the question: {error}"),
            );
            return ExitCode::FAILURE;
        }
        match check() {
            Ok(()) => answer(directory, "ok"),
            Err(error) => answer(directory, &format!("not ok: {error:#}")),
        }
    }
}

fn answer(directory: &Path, line: &str) {
    let line = format!("{}\n", line.replace('\n', "; "));
    let fifo = File::options().write(true).open(directory.join("answer"));
    if let Err(error) = fifo.and_then(|mut fifo| fifo.write_all(line.as_bytes())) {
        eprintln!("testkit-fixture: answering {line:?}: {error}");
    }
}

/// A check that everything `take` finds stays as it is now.
pub(crate) fn unchanged(
    take: impl Fn() -> anyhow::Result<Vec<(String, String)>> + 'static,
) -> anyhow::Result<Check> {
    let before = take()?;
    Ok(Box::new(move || {
        let now = take()?;
        for (old, new) in before.iter().zip(&now) {
            anyhow::ensure!(old == new, "{} was {:?}, is {:?}", old.0, old.1, new);
        }
        anyhow::ensure!(
            before.len() == now.len(),
            "{} facts were {}",
            now.len(),
            before.len()
        );
        Ok(())
    }))
}

/// A check of several checks.
pub(crate) fn all(checks: Vec<Check>) -> Check {
    let mut checks = checks;
    Box::new(move || checks.iter_mut().try_for_each(|check| check()))
}

/// One fact for [`unchanged`].
pub(crate) fn fact(name: impl ToString, value: impl ToString) -> (String, String) {
    (name.to_string(), value.to_string())
}
