//! `floe track`: what is tracked of a tree between two commands; and the keeper that holds it.

use std::ffi::OsString;

use clap::{Parser, Subcommand};
use floe_dump::keeper::{self, KeeperError, Purpose, Session, TreeKey, Waiting};
use floe_dump::{DumpError, FreezeError};
use floe_image::ImageDir;
use floe_kernel::ids::HostPid;
use floe_kernel::proc::ProcDir;
use floe_memory::DedupError;
use floe_options::Place;

use crate::exit::{Exit, Failure};
use crate::{engine, own};

/// Shows or ends the tracking of a tree's memory.
#[derive(Parser)]
#[command(name = "floe track", after_help = Exit::HELP, disable_version_flag = true)]
struct Track {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Say whether changes of a tree's memory are tracked, and since which round.
    Status(Tree),
    /// Stop tracking: the next dump copies everything.
    Stop(Tree),
}

#[derive(clap::Args)]
struct Tree {
    /// The root of the tree.
    #[arg(value_name = "PID", required_unless_present = "tree")]
    root: Option<i32>,
    /// The same, as a dump takes it.
    #[arg(short, long, value_name = "PID", conflicts_with = "root")]
    tree: Option<i32>,
}

impl Tree {
    fn pid(&self) -> i32 {
        let pid = self.root.or(self.tree);
        pid.expect("one of the two is required")
    }
}

/// Runs `floe track`; the exit code of `status` is 1 where nothing is tracked.
pub fn run(args: &[OsString]) -> Result<Exit, Failure> {
    let track: Track = match own::parse("floe track", args) {
        Ok(parsed) => parsed,
        Err(exit) => return Ok(exit),
    };
    let (Action::Status(tree) | Action::Stop(tree)) = &track.action;
    let root = tree.pid();
    if ProcDir::open(HostPid(root)).is_err() {
        let error = DumpError::Freeze(FreezeError::NoTask { pid: HostPid(root) });
        return Err(Failure::new(Exit::Usage, error));
    }
    match track.action {
        Action::Status(_) => status(root),
        Action::Stop(_) => stop(root),
    }
}

fn open(root: i32, waiting: Waiting) -> Result<Option<Session>, KeeperError> {
    let key = TreeKey::of(HostPid(root))?;
    Session::open(&key, Purpose::Read, waiting)
}

fn status(root: i32) -> Result<Exit, Failure> {
    let session = match open(root, Waiting::Not) {
        Ok(session) => session,
        Err(KeeperError::InUse { by, .. }) => {
            own::print(&format!(
                "The tree of task {root} is tracked: process {by} is dumping it now.\n"
            ))?;
            return Ok(Exit::Done);
        }
        Err(error) => return Err(Failure::new(Exit::Failed, error)),
    };
    let Some(session) = session else {
        own::print(&format!("The tree of task {root} is not tracked.\n"))?;
        return Ok(Exit::Failed);
    };
    let mut text = format!(
        "The tree of task {root} is tracked: {} descriptors",
        session.fds.len()
    );
    let mut words = session.state.split_ascii_whitespace();
    match (words.next(), words.next()) {
        (Some(round), Some(tracker)) => {
            text.push_str(&format!(" ({tracker}), since round {round}.\n"));
        }
        _ => text
            .push_str(", but the last round was not finished: the next dump copies everything.\n"),
    }
    own::print(&text)?;
    Ok(Exit::Done)
}

fn stop(root: i32) -> Result<Exit, Failure> {
    say_busy(HostPid(root));
    let stopped =
        open(root, Waiting::Patiently).and_then(|session| session.map_or(Ok(()), Session::stop));
    stopped.map_err(|error| Failure::new(Exit::Failed, error))?;
    Ok(Exit::Done)
}

/// Says on standard error whom a command has to wait for.
pub fn say_busy(root: HostPid) {
    if let Some(busy) = keeper::busy_with(root) {
        engine::say(&format!("floe: {busy}\n"));
    }
}

/// `floe dedup`: gives back the room of pages that later generations of a chain replace.
pub fn dedup(place: &Place) -> Result<Exit, Failure> {
    let bad = |error: DedupError| Failure::new(Exit::BadImage, error);
    let images = ImageDir::open(&place.images_dir).map_err(|error| bad(error.into()))?;
    own::refuse_other(&images)?;
    let punched = floe_memory::punch_chain(&images).map_err(bad)?;
    tracing::info!(bytes = punched.0, "gave back room in the chain");
    Ok(Exit::Done)
}

/// Becomes the keeper of a tree: `floe keeper PID`, called by the engine.
pub fn keep(args: &[OsString]) -> Result<Exit, Failure> {
    let root = args.first().and_then(|arg| arg.to_str());
    let Some(root) = root.and_then(|root| root.parse().ok()) else {
        return Err(Failure::new(
            Exit::Usage,
            anyhow::anyhow!("keeper needs a pid"),
        ));
    };
    keeper::serve(HostPid(root)).map_err(|error| Failure::new(Exit::Failed, error))?;
    Ok(Exit::Done)
}
