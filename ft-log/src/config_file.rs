//! The configuration file: its keys are the daemon's options without their dashes, so that there is one list of them and one check.
//!
//! ```text
//!  --config FILE ──► TOML table ──key by key──► --key=value ──┐
//!  command line ──────────────────────── what it has wins ────┴─► clap, Config::check
//! ```
//! A key that is wrong is told by name, with its value and what is allowed.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
};

use clap::{Arg, ArgAction, ArgMatches, Command, error::ErrorKind};
use thiserror::Error;
use toml::{Table, Value};

/// Options that a file cannot have.
const NOT_IN_FILE: [&str; 4] = ["config", "check-config", "help", "version"];

/// Why a configuration file cannot be used.
#[derive(Debug, Error)]
pub(crate) enum FileError {
    /// It is not there.
    #[error("{path}: cannot read the configuration (--config): {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is not TOML.
    #[error("{path}: this is not TOML: {source}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: toml::de::Error,
    },
    /// A key that does not exist.
    #[error("{path}: there is no key '{key}'; the keys are: {keys}")]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Every key.
        keys: String,
    },
    /// A value that a key cannot have.
    #[error("{path}: {key} = {value}: {reason}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The value as it is written.
        value: String,
        /// What is allowed.
        reason: String,
    },
}

/// The file that the command line names, if it names one.
pub(crate) fn named(arguments: &[OsString]) -> Option<PathBuf> {
    let mut arguments = arguments.iter().skip(1);
    while let Some(argument) = arguments.next() {
        let argument = argument.to_str().unwrap_or_default();
        if argument == "--config" {
            return arguments.next().map(PathBuf::from);
        }
        if let Some(path) = argument.strip_prefix("--config=") {
            return Some(path.into());
        }
    }
    None
}

/// Reads `path` and gives what it says as options of `daemon`, but for those that `arguments` has.
pub(crate) fn read(path: &Path, daemon: &Command, arguments: &[OsString]) -> Result<Vec<OsString>, FileError> {
    let text = std::fs::read_to_string(path).map_err(|source| FileError::Read {
        path: path.to_owned(),
        source,
    })?;
    let table: Table = text.parse().map_err(|source| FileError::Syntax {
        path: path.to_owned(),
        source,
    })?;
    let mut options = Vec::new();
    for (key, value) in &table {
        let option = daemon
            .get_arguments()
            .find(|option| option.get_long() == Some(key) && !NOT_IN_FILE.contains(&key.as_str()))
            .ok_or_else(|| FileError::Key {
                path: path.to_owned(),
                key: key.clone(),
                keys: keys(daemon).collect::<Vec<_>>().join(", "),
            })?;
        let word = word(option, value).and_then(|word| match word {
            Some(word) => check(daemon, &word).map(|()| Some(word)),
            None => Ok(None),
        });
        let word = word.map_err(|reason| FileError::Value {
            path: path.to_owned(),
            key: key.clone(),
            value: value.to_string(),
            reason,
        })?;
        if !is_given(arguments, key) {
            options.extend(word.map(OsString::from));
        }
    }
    Ok(options)
}

fn keys(daemon: &Command) -> impl Iterator<Item = &str> {
    let longs = daemon.get_arguments().filter_map(Arg::get_long);
    longs.filter(|long| !NOT_IN_FILE.contains(long))
}

fn is_given(arguments: &[OsString], key: &str) -> bool {
    arguments
        .iter()
        .filter_map(|argument| argument.to_str())
        .any(|argument| {
            let option = argument.strip_prefix("--");
            option.is_some_and(|option| option.split('=').next() == Some(key))
        })
}

/// A value as an option; `None` for a flag that is off.
fn word(option: &Arg, value: &Value) -> Result<Option<String>, String> {
    let key = option.get_long().unwrap_or_default();
    if matches!(option.get_action(), ArgAction::SetTrue) {
        return match value {
            Value::Boolean(true) => Ok(Some(format!("--{key}"))),
            Value::Boolean(false) => Ok(None),
            _ => Err("true or false".into()),
        };
    }
    let text = match value {
        Value::Array(values) if option.get_value_delimiter().is_some() => {
            let texts: Result<Vec<_>, _> = values.iter().map(scalar).collect();
            texts?.join(",")
        }
        value => scalar(value)?,
    };
    Ok(Some(format!("--{key}={text}")))
}

fn scalar(value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        _ => Err("a string or a whole number is allowed here".into()),
    }
}

/// Checks one option by itself, by the rules of the command line.
fn check(daemon: &Command, word: &str) -> Result<(), String> {
    // Values are looked at before what is missing is.
    let parsed = daemon.clone().try_get_matches_from(["ft-log", word]);
    let Some(error) = parsed
        .err()
        .filter(|error| error.kind() != ErrorKind::MissingRequiredArgument)
    else {
        return Ok(());
    };
    let text = error.to_string();
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("For more"))
        .filter(|line| !line.is_empty());
    let text = lines.collect::<Vec<_>>().join(" ");
    Err(text.strip_prefix("error: ").unwrap_or(&text).to_owned())
}

/// What is in force, defaults included, as a configuration file.
pub(crate) fn effective(daemon: &Command, matches: &ArgMatches) -> String {
    let mut lines = String::new();
    for option in daemon.get_arguments() {
        let Some(key) = option.get_long().filter(|key| !NOT_IN_FILE.contains(key)) else {
            continue;
        };
        let id = option.get_id().as_str();
        let value = if matches!(option.get_action(), ArgAction::SetTrue) {
            Value::Boolean(matches.get_flag(id))
        } else {
            let Some(raw) = matches.get_raw(id) else { continue };
            let mut values = raw.map(|value| value.to_string_lossy().into_owned());
            match option.get_value_delimiter() {
                Some(_) => Value::Array(values.map(Value::String).collect()),
                None => match values.next() {
                    Some(text) => text.parse().map_or(Value::String(text), Value::Integer),
                    None => continue,
                },
            }
        };
        lines += &format!("{key} = {value}\n");
    }
    lines
}
