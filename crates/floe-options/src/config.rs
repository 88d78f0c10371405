//! Configuration files: one long option a line, without dashes, `#` for comments.

use std::path::{Path, PathBuf};

use crate::parse::{Given, config_option};
use crate::{Settings, UsageError};

/// Where configuration may come from, lowest precedence first. The command line and an RPC
/// request come after these.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfigSources {
    /// `/etc/criu/default.conf`, unless defaults are off.
    pub global: Option<PathBuf>,
    /// `$HOME/.criu/default.conf`, unless defaults are off.
    pub user: Option<PathBuf>,
    /// What `CRIU_CONFIG_FILE` names.
    pub environment: Option<PathBuf>,
    /// What `--config` names; this one must exist.
    pub explicit: Option<PathBuf>,
}

impl ConfigSources {
    /// The sources for a command line that said `settings`, with the environment's values
    /// given by the caller. `--config` turns the default files off, as in CRIU.
    pub fn new(settings: &Settings, home: Option<&Path>, environment: Option<PathBuf>) -> Self {
        let defaults = !settings.no_default_config && settings.config.is_none();
        Self {
            global: defaults.then(|| PathBuf::from("/etc/criu/default.conf")),
            user: home
                .filter(|_| defaults)
                .map(|home| home.join(".criu/default.conf")),
            environment,
            explicit: settings.config.clone(),
        }
    }

    /// Reads what exists, in order, into `settings`.
    pub fn apply(&self, settings: &mut Settings) -> Result<(), UsageError> {
        for file in [&self.global, &self.user, &self.environment]
            .into_iter()
            .flatten()
        {
            // `$HOME` may still be that of the user who became another one.
            let foreign = Some(file) == self.user.as_ref() && is_closed(file);
            if !foreign {
                apply_file(file, MayBeAbsent::Yes, settings)?;
            }
        }
        self.explicit
            .as_deref()
            .map_or(Ok(()), |file| apply_file(file, MayBeAbsent::No, settings))
    }
}

fn is_closed(file: &Path) -> bool {
    let denied = std::io::ErrorKind::PermissionDenied;
    std::fs::metadata(file).is_err_and(|error| error.kind() == denied)
}

/// Whether a file that is not there is an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MayBeAbsent {
    Yes,
    No,
}

/// Reads one configuration file into `settings`.
pub fn apply_file(
    file: &Path,
    absent: MayBeAbsent,
    settings: &mut Settings,
) -> Result<(), UsageError> {
    match std::fs::read_to_string(file) {
        Ok(text) => apply_text(&text, file, settings),
        Err(error)
            if error.kind() == std::io::ErrorKind::NotFound && absent == MayBeAbsent::Yes =>
        {
            Ok(())
        }
        Err(error) => Err(UsageError::ReadConfig {
            file: file.into(),
            reason: error.to_string(),
        }),
    }
}

/// Reads the text of a configuration file; `file` is for messages only.
pub fn apply_text(text: &str, file: &Path, settings: &mut Settings) -> Result<(), UsageError> {
    for (index, line) in text.lines().enumerate() {
        let outcome = parse_line(line).and_then(|given| {
            given.map_or(Ok(()), |given| {
                given.apply(settings).map_err(|error| error.to_string())
            })
        });
        outcome.map_err(|reason| UsageError::Config {
            file: file.into(),
            line: index + 1,
            reason,
        })?;
    }
    Ok(())
}

fn parse_line(line: &str) -> Result<Option<Given>, String> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    if line.starts_with('-') {
        return Err(format!(
            "options are written without dashes here: `{}`",
            line.trim_start_matches('-')
        ));
    }
    let end = line
        .find(|c: char| c.is_whitespace() || matches!(c, '=' | '#'))
        .unwrap_or(line.len());
    let (name, rest) = line.split_at(end);
    let rest = rest.trim_start();
    let rest = rest.strip_prefix('=').unwrap_or(rest).trim_start();
    let value = parse_value(rest)?;
    config_option(name, value)
        .map(Some)
        .map_err(|error| error.to_string().replacen("`--", "`", 2))
}

/// A bare word, or text in double quotes with `\"` for a quote; then nothing but a comment.
fn parse_value(text: &str) -> Result<Option<String>, String> {
    if text.is_empty() || text.starts_with('#') {
        return Ok(None);
    }
    let (value, rest) = match text.strip_prefix('"') {
        Some(quoted) => unquote(quoted)?,
        None => {
            let end = text
                .find(|c: char| c.is_whitespace() || c == '#')
                .unwrap_or(text.len());
            (text[..end].to_owned(), &text[end..])
        }
    };
    match rest.trim_start() {
        "" => Ok(Some(value)),
        comment if comment.starts_with('#') => Ok(Some(value)),
        more => Err(format!(
            "one value only; put it in double quotes if it has spaces (excess: `{more}`)"
        )),
    }
}

fn unquote(text: &str) -> Result<(String, &str), String> {
    let mut value = String::new();
    let mut letters = text.char_indices().peekable();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' if letters.peek().is_some_and(|(_, next)| *next == '"') => {
                value.push('"');
                letters.next();
            }
            other => value.push(other),
        }
    }
    Err("the closing double quote is missing".into())
}
