//! `floe image`: what CRIU's image tool does.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use floe_image::json::{self, JsonOptions, Payload, Style};
use floe_image::{ImageDir, ImageError, explore};
use serde_json::json;

use crate::exit::{Exit, Failure};

/// Shows image files, and converts them to JSON and back.
#[derive(Parser)]
#[command(name = "floe image", after_help = Exit::HELP, disable_version_flag = true)]
struct Image {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Show an image for reading, or what a directory holds.
    Show {
        /// An image file or a directory of images.
        path: PathBuf,
        /// Leave out the data behind entries.
        #[arg(long)]
        nopl: bool,
    },
    /// Convert an image to JSON.
    Decode {
        #[command(flatten)]
        files: Files,
        /// Indent, and show numbers by their meaning.
        #[arg(long)]
        pretty: bool,
        /// Leave out the data behind entries (such JSON cannot be encoded again).
        #[arg(long)]
        nopl: bool,
    },
    /// Convert JSON to an image.
    Encode {
        #[command(flatten)]
        files: Files,
    },
    /// Show kind, number of entries and size.
    Info {
        /// An image file or a directory of images.
        path: PathBuf,
    },
    /// List the files of a directory, or what is in them.
    Ls {
        /// A directory of images.
        #[arg(default_value = ".")]
        path: PathBuf,
        /// What to list.
        #[arg(value_enum, default_value_t = What::Files)]
        what: What,
    },
}

#[derive(Args)]
struct Files {
    /// The file to read; standard input when not given.
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// The file to read, as CRIU's tool calls it.
    #[arg(short = 'i', long = "in", value_name = "FILE", conflicts_with = "file")]
    input: Option<PathBuf>,
    /// The file to write; standard output when not given.
    #[arg(short = 'o', long = "out", value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// The files.
    Files,
    /// The tasks.
    Ps,
    /// The descriptors of each task.
    Fds,
    /// The mappings of each task.
    Mems,
    /// The saved pages of each task.
    Rss,
}

/// Runs `floe image` with the words behind `image`.
pub fn run(args: &[OsString]) -> Result<Exit, Failure> {
    let name = OsString::from("floe image");
    let image = match Image::try_parse_from(std::iter::once(&name).chain(args)) {
        Ok(image) => image,
        Err(error) => {
            let exit = if error.use_stderr() {
                Exit::Usage
            } else {
                Exit::Done
            };
            // Nobody is left to tell if the terminal is gone.
            let _ = error.print();
            return Ok(exit);
        }
    };
    match image.verb {
        Verb::Show { path, nopl } => show(&path, payload(nopl)),
        Verb::Decode {
            files,
            pretty,
            nopl,
        } => {
            let style = if pretty { Style::Pretty } else { Style::Plain };
            decode(
                &files,
                JsonOptions {
                    style,
                    payload: payload(nopl),
                },
            )
        }
        Verb::Encode { files } => encode(&files),
        Verb::Info { path } => info(&path),
        Verb::Ls { path, what } => list(&path, what),
    }
    .map(|()| Exit::Done)
}

fn payload(omit: bool) -> Payload {
    if omit { Payload::Omit } else { Payload::Keep }
}

/// Reading an image failed: it is damaged, unless the file could not be opened at all.
fn bad_image(error: ImageError) -> Failure {
    Failure::new(Exit::BadImage, error)
}

fn print(text: &str) -> Result<(), Failure> {
    let written = std::io::stdout().write_all(text.as_bytes());
    written
        .context("writing to standard output")
        .map_err(Failure::from)
}

fn print_lines(lines: &[impl Display]) -> Result<(), Failure> {
    lines
        .iter()
        .try_for_each(|line| print(&format!("{line}\n")))
}

impl Files {
    fn read(&self) -> Result<(PathBuf, Vec<u8>), Failure> {
        let path = self
            .file
            .as_ref()
            .or(self.input.as_ref())
            .filter(|path| *path != Path::new("-"));
        let Some(path) = path else {
            let mut bytes = Vec::new();
            std::io::stdin()
                .read_to_end(&mut bytes)
                .context("reading standard input")?;
            return Ok((PathBuf::from("standard input"), bytes));
        };
        let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()));
        let bytes = bytes.map_err(|error| Failure::new(Exit::BadImage, error))?;
        Ok((path.clone(), bytes))
    }

    fn write(&self, bytes: &[u8]) -> Result<(), Failure> {
        match &self.output {
            Some(path) => std::fs::write(path, bytes)
                .with_context(|| format!("writing {}", path.display()))?,
            None => std::io::stdout()
                .write_all(bytes)
                .context("writing to standard output")?,
        }
        Ok(())
    }
}

fn decode(files: &Files, options: JsonOptions) -> Result<(), Failure> {
    let (path, bytes) = files.read()?;
    let length = bytes.len() as u64;
    let reader = json::reader_by_magic(Cursor::new(bytes), length, path).map_err(bad_image)?;
    let image = json::decode_image(reader, options).map_err(bad_image)?;
    let mut text = json::render(&image, options.style);
    if files.output.is_none() {
        text.push('\n');
    }
    files.write(text.as_bytes())
}

fn encode(files: &Files) -> Result<(), Failure> {
    let (path, bytes) = files.read()?;
    let bad = |error: anyhow::Error| Failure::new(Exit::BadImage, error);
    let value =
        serde_json::from_slice(&bytes).with_context(|| format!("{} is not JSON", path.display()));
    let image = json::encode_from_json(&value.map_err(bad)?);
    files.write(
        &image
            .with_context(|| path.display().to_string())
            .map_err(bad)?,
    )
}

fn show(path: &Path, payload: Payload) -> Result<(), Failure> {
    if path.is_dir() {
        list(path, What::Ps)?;
        return list(path, What::Files);
    }
    let options = JsonOptions {
        style: Style::Pretty,
        payload,
    };
    let image = json::decode_to_json(path, options).map_err(bad_image)?;
    print(&format!("{}\n", json::render(&image, options.style)))
}

/// For a file what CRIU's tool prints, and its size; for a directory the same of each file.
fn info(path: &Path) -> Result<(), Failure> {
    let object = |info: &json::ImageInfo| json!({"magic": info.kind.name(), "count": info.count, "size": info.size});
    let value = if path.is_dir() {
        let dir = ImageDir::open(path).map_err(bad_image)?;
        let files = explore::list(&dir).map_err(bad_image)?;
        let named = files.iter().map(|file| {
            let raw = || json!({"size": file.size, "damage": file.damage});
            (
                file.name.clone(),
                file.info.as_ref().map_or_else(raw, object),
            )
        });
        serde_json::Value::Object(named.collect())
    } else {
        object(&json::image_info(path).map_err(bad_image)?)
    };
    print(&format!("{}\n", json::render(&value, Style::Pretty)))
}

fn list(path: &Path, what: What) -> Result<(), Failure> {
    let dir = ImageDir::open(path).map_err(bad_image)?;
    match what {
        What::Files => files(&dir),
        What::Ps => {
            print("    PID   PGID    SID   COMM\n")?;
            print_lines(&explore::tasks(&dir).map_err(bad_image)?)
        }
        What::Fds => print_lines(&explore::descriptors(&dir).map_err(bad_image)?),
        What::Mems => print_lines(&explore::mappings(&dir).map_err(bad_image)?),
        What::Rss => print_lines(&explore::pages(&dir).map_err(bad_image)?),
    }
}

/// The table of files; a damaged one is shown as such and makes the whole a failure.
fn files(dir: &ImageDir) -> Result<(), Failure> {
    let files = explore::list(dir).map_err(bad_image)?;
    let width = files
        .iter()
        .map(|file| file.name.len())
        .max()
        .unwrap_or(4)
        .max(4);
    print(&format!(
        "{:width$}  {:>12}  {:>8}  kind\n",
        "file", "bytes", "entries"
    ))?;
    for file in &files {
        let (count, kind) = match (&file.info, &file.damage) {
            (Some(info), _) => (info.count.to_string(), info.kind.name().to_owned()),
            (None, Some(damage)) => ("-".into(), format!("DAMAGED: {damage}")),
            (None, None) => ("-".into(), "-".into()),
        };
        print(&format!(
            "{:width$}  {:>12}  {count:>8}  {kind}\n",
            file.name, file.size
        ))?;
    }
    match files.iter().find_map(|file| file.damage.as_ref()) {
        Some(damage) => Err(Failure::new(Exit::BadImage, anyhow::anyhow!("{damage}"))),
        None => Ok(()),
    }
}
