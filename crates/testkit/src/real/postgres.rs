//! PostgreSQL with several backends and an open transaction.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, ensure};

use super::{CONNECTED, Engines, Tree, detached, eventually, find, free_port, place};

/// A session of `psql`, outside of the tree.
struct Session {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Session {
    fn start(port: u16) -> anyhow::Result<Self> {
        let mut child = Command::new(find("psql").context("psql is not installed")?)
            .args([
                "-X",
                "-q",
                "-A",
                "-t",
                "-h",
                "127.0.0.1",
                "-U",
                "postgres",
                "-p",
            ])
            .args([&port.to_string(), "postgres"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let input = child.stdin.take().context("a pipe to psql")?;
        let output = BufReader::new(child.stdout.take().context("a pipe from psql")?);
        let mut session = Self {
            child,
            input,
            output,
        };
        ensure!(session.ask("select 1;")? == "1", "psql does not answer");
        Ok(session)
    }

    /// Runs statements, the last of which answers with one line.
    fn ask(&mut self, statements: &str) -> anyhow::Result<String> {
        writeln!(self.input, "{statements}")?;
        let mut line = String::new();
        let length = self.output.read_line(&mut line)?;
        ensure!(length > 0, "psql ended at {statements:?}");
        Ok(line.trim().to_owned())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command as the user that PostgreSQL insists on.
fn as_postgres(command: &str) -> anyhow::Result<Command> {
    let mut detached = detached("setpriv")?;
    detached.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]);
    detached.arg(find(command).with_context(|| format!("{command} is not installed"))?);
    Ok(detached)
}

fn initialise(data: &Path) -> anyhow::Result<()> {
    let output = as_postgres("initdb")?
        .arg("-D")
        .arg(data)
        .args(["-A", "trust", "-N", "--no-locale"])
        .current_dir("/")
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "initdb: {said}");
    Ok(())
}

/// Names of shared memory that outlive their program: files, and numbers of System V segments. What is
/// there when this is dropped is removed.
#[derive(Default)]
struct SharedMemory(Vec<String>);

impl SharedMemory {
    /// What a process has mapped.
    fn of(pid: i32) -> anyhow::Result<Vec<String>> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let mut names: Vec<String> = Vec::new();
        for line in maps.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.get(5) {
                Some(name) if name.starts_with("/SYSV") => names.push(words[4].to_owned()),
                Some(name) if name.starts_with("/dev/shm/") => names.push((*name).to_owned()),
                _ => {}
            }
        }
        Ok(names)
    }

    /// What of it is there.
    fn left(&self) -> Vec<&str> {
        let listed = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
        let numbers: Vec<&str> = listed
            .lines()
            .filter_map(|line| line.split_whitespace().nth(1))
            .collect();
        let is_left = |name: &&str| numbers.contains(name) || Path::new(name).exists();
        self.0.iter().map(String::as_str).filter(is_left).collect()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        for name in self.left() {
            // After a failure only; there is nobody to tell if it cannot be removed.
            let _ = match name.starts_with('/') {
                true => fs::remove_file(name),
                false => Command::new("ipcrm").args(["-m", name]).status().map(drop),
            };
        }
    }
}

pub fn run(engines: &Engines<'_>) -> anyhow::Result<()> {
    let (directory, port) = (place()?, free_port()?);
    // Declared first, and so the last to go.
    let mut memory = SharedMemory::default();
    let data = directory.path().join("data");
    initialise(&data)?;
    let mut command = as_postgres("postgres")?;
    command.arg("-D").arg(&data).args(["-p", &port.to_string()]);
    command.arg("-k").arg(directory.path());
    command.args(["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]);
    let mut tree = Tree::start(command, directory.path())?;
    let started = eventually(|| Session::start(port));
    let mut first = started.with_context(|| format!("connecting: {}", tree.said()))?;
    memory.0 = SharedMemory::of(tree.root)?;
    ensure!(
        !memory.0.is_empty(),
        "PostgreSQL has other shared memory than it used to have"
    );
    let made = first
        .ask("create table t (n int); insert into t values (1), (2); select sum(n) from t;")?;
    ensure!(made == "3", "the table's sum is {made}");
    let mut others: Vec<Session> = Vec::new();
    for _ in 0..3 {
        others.push(Session::start(port)?);
    }
    let open = first.ask("begin; insert into t values (40); select sum(n) from t;")?;
    ensure!(open == "43", "inside the transaction {open}");
    let prepared = others[0].ask("create temp table own as select 7 as n; select n from own;")?;
    ensure!(prepared == "7", "the temporary table has {prepared}");
    tree.pass_through(engines, &CONNECTED)?;
    let seen = others[1].ask("select sum(n) from t;")?;
    ensure!(
        seen == "3",
        "the open transaction is seen from outside: {seen}"
    );
    let kept = others[0].ask("select n from own;")?;
    ensure!(kept == "7", "the temporary table has {kept}");
    let inside = first.ask("select sum(n) from t;")?;
    ensure!(inside == "43", "inside the transaction {inside}");
    first.ask("commit; select 1;")?;
    let seen = others[1].ask("select sum(n) from t;")?;
    ensure!(seen == "43", "after the commit {seen}");
    let mut new = Session::start(port)?;
    ensure!(
        new.ask("select sum(n) from t;")? == "43",
        "a new session sees another table"
    );
    drop((first, others, new));
    ensure!(
        memory.left().len() == memory.0.len(),
        "shared memory is gone before the end"
    );
    // It removes its shared memory by the names and numbers that it has in mind since its start.
    tree.end().with_context(|| tree.said())?;
    let left = memory.left();
    ensure!(left.is_empty(), "the server left behind {left:?}");
    Ok(())
}
