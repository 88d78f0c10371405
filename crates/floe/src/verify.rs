//! `floe verify`: is a checkpoint whole, and can it be restored here?

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Parser;
use floe_archive::check::{self, HashReport, Row, State};
use floe_kernel::features::KernelFeatures;
use floe_options::{Place, RestoreOptions};

use crate::exit::{Exit, Failure};
use crate::own;

/// Checks a checkpoint: files, checksums, the chain, and whether this machine can restore it.
#[derive(Parser)]
#[command(name = "floe verify", after_help = Exit::HELP, disable_version_flag = true)]
struct Verify {
    /// A directory of images (the newest of a chain), or an archive.
    path: PathBuf,
    /// Look at names and sizes only, as a restore does first.
    #[arg(long)]
    quick: bool,
    /// Do not look at this machine: the checkpoint is for another one.
    #[arg(long)]
    no_machine: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs `floe verify`; 5 where the images are not whole, 3 where they cannot be restored here.
pub fn run(args: &[OsString]) -> Result<Exit, Failure> {
    let verify: Verify = match own::parse("floe verify", args) {
        Ok(parsed) => parsed,
        Err(exit) => return Ok(exit),
    };
    let dir = own::open_images(&verify.path)?;
    let (mut rows, hashed) = match verify.quick {
        true => (check::quick(&dir), HashReport::default()),
        false => check::full(&dir, own::processors()),
    };
    let is_bad = |rows: &[Row]| rows.iter().any(|row| row.state == State::Bad);
    let mut exit = if is_bad(&rows) {
        Exit::BadImage
    } else {
        Exit::Done
    };
    if exit == Exit::Done && !verify.quick && !verify.no_machine {
        let options = RestoreOptions::new(Place::new(&verify.path));
        let here = floe_restore::check_machine(&dir, &options, &KernelFeatures::probe());
        if is_bad(&here) {
            exit = Exit::Unsupported;
        }
        rows.extend(here);
    }
    own::print(&if verify.json {
        json(&rows, exit)
    } else {
        text(&rows, &hashed, exit)
    })?;
    Ok(exit)
}

fn text(rows: &[Row], hashed: &HashReport, exit: Exit) -> String {
    let mut out = String::new();
    for row in rows {
        let mark = match row.state {
            State::Good => "ok   ",
            State::Note => "note ",
            State::Bad => "BAD  ",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{mark}{:10} {}", row.about, row.text);
        if let Some(remedy) = &row.remedy {
            let _ = writeln!(out, "                -> {remedy}");
        }
    }
    if hashed.bytes > 0 {
        let seconds = hashed.time.as_secs_f64().max(1e-9);
        let _ = writeln!(
            out,
            "{} bytes compared with their checksums at {:.1} GiB/s",
            hashed.bytes,
            hashed.bytes as f64 / seconds / (1u64 << 30) as f64
        );
    }
    out.push_str(match exit {
        Exit::Done => "The checkpoint is whole.\n",
        Exit::BadImage => "The checkpoint is NOT whole.\n",
        _ => "The checkpoint is whole, but cannot be restored here as things are.\n",
    });
    out
}

fn json(rows: &[Row], exit: Exit) -> String {
    let row = |row: &Row| {
        let state = match row.state {
            State::Good => "good",
            State::Note => "note",
            State::Bad => "bad",
        };
        serde_json::json!({"about": row.about, "state": state, "text": row.text, "remedy": row.remedy})
    };
    let rows: Vec<_> = rows.iter().map(row).collect();
    let value = serde_json::json!({"whole": exit != Exit::BadImage, "restorable": exit == Exit::Done, "checks": rows});
    format!("{value:#}\n")
}
