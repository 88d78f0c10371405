//! From words to settings, by the rules of getopt_long(3) that CRIU's users rely on: options
//! before and after the command, `-vvv`, `-v4`, `-tPID`, clusters, unambiguous beginnings, `--`.

use crate::command::Command;
use crate::error::nearest;
use crate::flags::{FLAGS, Flag, Kind};
use crate::{Settings, UsageError};

/// One option as given, not applied yet.
pub struct Given {
    flag: &'static Flag,
    /// As typed, for messages.
    name: String,
    input: Input,
}

enum Input {
    On,
    Off,
    Value(String),
}

impl Given {
    /// Writes the value to its place.
    pub fn apply(&self, settings: &mut Settings) -> Result<(), UsageError> {
        let value = match &self.input {
            Input::Value(value) => Some(value.as_str()),
            Input::On | Input::Off => None,
        };
        let on = !matches!(self.input, Input::Off);
        let result = match self.flag.kind {
            Kind::Switch(field) => {
                *field(settings) = on;
                Ok(())
            }
            Kind::Plain(set) => {
                set(settings);
                Ok(())
            }
            Kind::Value(_, set) => set(settings, value.unwrap_or_default()),
            Kind::Optional(_, set) => set(settings, value),
        };
        result.map_err(|reason| UsageError::BadValue {
            option: self.name.clone(),
            value: value.unwrap_or_default().into(),
            reason,
        })
    }
}

/// A command line, taken apart.
pub struct CommandLine {
    /// The options in the order given.
    pub given: Vec<Given>,
    /// The other words: the command, and what follows it.
    pub words: Vec<String>,
}

impl CommandLine {
    /// Takes `args` (without the program's name) apart.
    pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Self, UsageError> {
        let mut line = Self {
            given: Vec::new(),
            words: Vec::new(),
        };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            if arg == "--" {
                line.words.extend(args.by_ref());
            } else if let Some(long) = arg.strip_prefix("--") {
                let given = long_option(long, || args.next())?;
                line.given.push(given);
            } else if arg.len() > 1 && arg.starts_with('-') {
                short_options(&arg[1..], || args.next(), &mut line.given)?;
            } else {
                line.words.push(arg);
            }
        }
        Ok(line)
    }

    /// The command and the words after it; `extra` are names that only the error may propose.
    pub fn command(&self, extra: &[&str]) -> Result<(Command, &[String]), UsageError> {
        let (command, taken) = Command::take(&self.words, extra)?;
        Ok((command, &self.words[taken..]))
    }

    /// Refuses options of our own that would mean nothing: scripts that were written for CRIU have none, and
    /// pass many of its options to commands that have no use for them. `settings` are those in effect.
    pub fn refuse_idle(&self, command: Command, settings: &Settings) -> Result<(), UsageError> {
        for given in self.given.iter().filter(|given| given.flag.own) {
            if !given.flag.is_for(command) {
                return Err(UsageError::NotFor {
                    option: given.name.clone(),
                    commands: given.flag.commands(),
                    given: command.name(),
                });
            }
            let in_rounds = command == Command::PreDump || settings.iterate;
            let why = match given.flag.long {
                "max-freeze" | "max-rounds" | "max-time" if !settings.iterate => {
                    "it limits the rounds of --iterate, which is not given"
                }
                "max-freeze" | "max-rounds" if settings.rounds.fixed => {
                    "--iterate=N makes N rounds, whatever they give"
                }
                "max-rate" if !in_rounds => {
                    "it holds back the rounds of --iterate, which is not given; a plain dump copies as fast \
                     as it can, for the tree stands still"
                }
                _ => continue,
            };
            let option = given.name.clone();
            return Err(UsageError::Idle { option, why });
        }
        Ok(())
    }

    /// Applies every option in order.
    pub fn apply(&self, settings: &mut Settings) -> Result<(), UsageError> {
        self.given
            .iter()
            .try_for_each(|given| given.apply(settings))
    }
}

/// An option by its long name, with `=value` or a value from `next`.
fn long_option(text: &str, next: impl FnOnce() -> Option<String>) -> Result<Given, UsageError> {
    let (name, attached) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    let (flag, negated) = find_long(name)?;
    let shown = format!("--{}{}", if negated { "no-" } else { "" }, flag.long);
    let input = match (flag.kind, attached) {
        (Kind::Switch(_) | Kind::Plain(_), Some(value)) => {
            return Err(UsageError::UnexpectedValue {
                option: shown,
                value,
            });
        }
        (Kind::Switch(_) | Kind::Plain(_), None) if negated => Input::Off,
        (Kind::Switch(_) | Kind::Plain(_) | Kind::Optional(..), None) => Input::On,
        (Kind::Value(..) | Kind::Optional(..), Some(value)) => Input::Value(value),
        (Kind::Value(value, _), None) => Input::Value(next().ok_or(UsageError::MissingValue {
            option: shown.clone(),
            value,
        })?),
    };
    Ok(Given {
        flag,
        name: shown,
        input,
    })
}

/// Sets one option by its long name, as a configuration line would: for values that come in text
/// from elsewhere, such as a request.
pub fn set_option(name: &str, value: &str, settings: &mut Settings) -> Result<(), UsageError> {
    config_option(name, Some(value.to_owned()))?.apply(settings)
}

/// A configuration line: the same names, but an optional value may stand apart.
pub(crate) fn config_option(name: &str, value: Option<String>) -> Result<Given, UsageError> {
    let (flag, _) = find_long(name)?;
    match (flag.kind, value) {
        (Kind::Value(..) | Kind::Optional(..), Some(value)) => {
            long_option(&format!("{name}={value}"), || None)
        }
        (_, Some(value)) => Err(UsageError::UnexpectedValue {
            option: name.into(),
            value,
        }),
        (_, None) => long_option(name, || None),
    }
}

/// A flag by its exact name, `no-` and its name, or an unambiguous beginning of either.
fn find_long(name: &str) -> Result<(&'static Flag, bool), UsageError> {
    let positive = FLAGS.iter().map(|flag| (flag.long.to_owned(), flag, false));
    let negative = FLAGS
        .iter()
        .filter(|flag| flag.is_negatable())
        .map(|f| (format!("no-{}", f.long), f, true));
    let all: Vec<_> = positive.chain(negative).collect();
    if let Some((_, flag, negated)) = all.iter().find(|(long, ..)| long == name) {
        return Ok((flag, *negated));
    }
    let starting: Vec<_> = all
        .iter()
        .filter(|(long, ..)| !name.is_empty() && long.starts_with(name))
        .collect();
    match starting.as_slice() {
        [(_, flag, negated)] => Ok((flag, *negated)),
        [] => Err(UsageError::UnknownOption {
            given: format!("--{name}"),
            nearest: nearest(name, all.iter().map(|(long, ..)| long.as_str()))
                .map(|long| format!("--{long}")),
        }),
        several => Err(UsageError::Ambiguous {
            given: format!("--{name}"),
            candidates: several
                .iter()
                .map(|(long, ..)| format!("--{long}"))
                .collect(),
        }),
    }
}

/// A cluster such as `Rj`, `vvv`, `v4` or `t1234`.
fn short_options(
    cluster: &str,
    mut next: impl FnMut() -> Option<String>,
    given: &mut Vec<Given>,
) -> Result<(), UsageError> {
    let mut rest = cluster;
    while let Some(letter) = rest.chars().next() {
        rest = &rest[letter.len_utf8()..];
        let name = format!("-{letter}");
        let Some(flag) = FLAGS.iter().find(|flag| flag.short == Some(letter)) else {
            return Err(unknown_short(name, cluster));
        };
        // `-i` is ours alone, so no script of CRIU's means a value by `-images-dir`.
        let word = cluster.split('=').next().unwrap_or(cluster);
        if letter == 'i' && FLAGS.iter().any(|flag| flag.long == word) {
            return Err(unknown_short(name, cluster));
        }
        let input = match flag.kind {
            Kind::Switch(_) | Kind::Plain(_) => Input::On,
            Kind::Optional(..) if rest.is_empty() => Input::On,
            Kind::Value(value, _) if rest.is_empty() => {
                Input::Value(next().ok_or(UsageError::MissingValue {
                    option: name.clone(),
                    value,
                })?)
            }
            Kind::Value(..) | Kind::Optional(..) => Input::Value(rest.into()),
        };
        let done = matches!(input, Input::Value(_));
        given.push(Given { flag, name, input });
        if done {
            break;
        }
    }
    Ok(())
}

/// A whole word behind one dash most likely misses the other one.
fn unknown_short(name: String, cluster: &str) -> UsageError {
    let word = cluster.split('=').next().unwrap_or(cluster);
    let long = (word.len() > 2)
        .then(|| nearest(word, FLAGS.iter().map(|flag| flag.long)))
        .flatten();
    let other_case = |flag: &&Flag| {
        flag.short
            .is_some_and(|short| name[1..].eq_ignore_ascii_case(&short.to_string()))
    };
    let short = || {
        FLAGS
            .iter()
            .find(other_case)
            .and_then(|flag| flag.short)
            .map(|short| format!("-{short}"))
    };
    UsageError::UnknownOption {
        nearest: long.map(|long| format!("--{long}")).or_else(short),
        given: name,
    }
}
