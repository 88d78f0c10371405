//! What Floe's own commands share: reading their words, printing.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use clap::Parser;
use floe_archive::check::{self, State};
use floe_archive::summary::Summary;
use floe_image::{ImageDir, ImageKind};

use crate::exit::{Exit, Failure};

/// Reads the words behind a command; on help or a mistake prints it and gives the exit code.
pub fn parse<T: Parser>(name: &'static str, args: &[OsString]) -> Result<T, Exit> {
    let name = std::iter::once(OsString::from(name));
    T::try_parse_from(name.chain(args.iter().cloned())).map_err(|error| {
        // Nobody is left to tell if the terminal is gone.
        let _ = error.print();
        if error.use_stderr() {
            Exit::Usage
        } else {
            Exit::Done
        }
    })
}

/// Writes to standard output.
pub fn print(text: &str) -> Result<(), Failure> {
    let written = std::io::stdout().write_all(text.as_bytes());
    Ok(written.context("writing to standard output")?)
}

/// Becomes the process that unlocks the network if an engine is killed, which writes what it locks to our input.
/// With a word behind it, the command only ends.
pub fn unlock(words: &[OsString]) -> Result<Exit, Failure> {
    if words.is_empty() {
        floe_resources::netlock::watch(std::io::stdin());
    }
    Ok(Exit::Done)
}

/// Threads for work that fills all processors.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Refuses a chain of which something is missing; a pre-dump may well be packed.
pub fn refuse_incomplete(dir: &ImageDir) -> Result<(), Failure> {
    let rows = check::quick(dir);
    let bad = rows
        .iter()
        .filter(|row| row.state == State::Bad && row.about != "kind");
    let lines: Vec<String> = bad
        .map(|row| match &row.remedy {
            Some(remedy) => format!("{}: {remedy}", row.text),
            None => row.text.clone(),
        })
        .collect();
    match lines.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(
            Exit::BadImage,
            anyhow::anyhow!(lines.join("\n")),
        )),
    }
}

/// Refuses a directory in which no dump has put anything.
pub fn refuse_other(dir: &ImageDir) -> Result<(), Failure> {
    let inventory = dir.has(ImageKind::Inventory, 0);
    match inventory || dir.images().is_ok_and(|images| !images.is_empty()) {
        true => Ok(()),
        false => Err(Failure::new(
            Exit::BadImage,
            anyhow::anyhow!("{} holds no checkpoint", dir.path().display()),
        )),
    }
}

/// What is in a directory of images or an archive, with all that it builds on.
pub fn summary(path: &Path) -> Result<Summary, Failure> {
    let dir = open_images(path)?;
    refuse_other(&dir)?;
    if let Some(row) = check::absent_parent(&dir) {
        let error = anyhow::anyhow!("{}: {}", row.text, row.remedy.unwrap_or_default());
        return Err(Failure::new(Exit::BadImage, error));
    }
    Summary::read(&dir).map_err(|error| Failure::new(Exit::BadImage, error))
}

/// Opens a directory of images or an archive; `-` is an archive on standard input.
pub fn open_images(path: &Path) -> Result<ImageDir, Failure> {
    let bad = |error: anyhow::Error| Failure::new(Exit::BadImage, error);
    let is_other = std::fs::metadata(path).map_or(true, |found| found.is_dir());
    if path != Path::new("-") && is_other {
        return ImageDir::open(path).map_err(|error| bad(error.into()));
    }
    floe_archive::archive::open_images(path).map_err(|error| bad(error.into()))
}

/// Bytes for people, such as `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", units[unit])
}

/// A time in seconds since 1970, as `2026-11-23 16:09:27 UTC`.
pub fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86400, seconds % 86400);
    // Days since 0000-03-01, so that a leap day is the last of its year.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_read_well() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_795_450_167), "2026-11-23 16:09:27 UTC");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536 << 20), "1.5 GiB");
    }
}
