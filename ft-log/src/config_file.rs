//! The configuration file: its keys are the daemon's options without their dashes, so that there is one list of them and one check.
//!
//! ```text
//!  --config FILE ──► TOML table ──key by key──► --key=value ──┐
//!  command line ──────────────────────── what it has wins ────┴─► clap, Config::check
//! ```
//! A key that is wrong is told by name, with its value and what is allowed.
//!
//! A file may be about several VMs: each has a table `[vm.NAME]`, and what stands above the tables is for all of them. The command line
//! wins over both.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
};

use clap::{Arg, ArgAction, ArgMatches, Command, error::ErrorKind};
use thiserror::Error;
use toml::{Table, Value};

use crate::config::VMS_MAX;

/// Options that a file cannot have.
const NOT_IN_FILE: [&str; 4] = ["config", "check-config", "help", "version"];
/// Options of the process, which a VM's table cannot have.
const OF_PROCESS: [&str; 2] = ["control", "metrics"];
/// The option that names the VM, and the table of tables.
const VM: &str = "vm";

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
    #[error("{path}: {place}there is no key '{key}'; the keys are: {keys}")]
    Key {
        /// The file.
        path: PathBuf,
        /// The table, if it is a VM's.
        place: String,
        /// The key.
        key: String,
        /// Every key.
        keys: String,
    },
    /// A value that a key cannot have.
    #[error("{path}: {place}{key} = {value}: {reason}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The table, if it is a VM's.
        place: String,
        /// The key.
        key: String,
        /// The value as it is written.
        value: String,
        /// What is allowed.
        reason: String,
    },
    /// Tables of VMs that cannot be.
    #[error("{path}: {reason}")]
    Tables {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// The options of one VM.
#[derive(Debug)]
pub(crate) struct Options {
    /// Its table, as messages name it; empty for a file without tables.
    pub(crate) place: String,
    /// What the command line does not say itself.
    pub(crate) words: Vec<OsString>,
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

/// Reads `path` and gives what it says as options of `daemon`, but for those that `arguments` has: once for each VM.
pub(crate) fn read(path: &Path, daemon: &Command, arguments: &[OsString]) -> Result<Vec<Options>, FileError> {
    let text = std::fs::read_to_string(path).map_err(|source| FileError::Read {
        path: path.to_owned(),
        source,
    })?;
    let mut table: Table = text.parse().map_err(|source| FileError::Syntax {
        path: path.to_owned(),
        source,
    })?;
    let file = File {
        path,
        daemon,
        arguments,
    };
    let vms = match table.remove(VM) {
        Some(Value::Table(vms)) => vms,
        Some(name) => {
            table.insert(VM.into(), name);
            Table::new()
        }
        None => Table::new(),
    };
    let common = file.words(&table, "")?;
    if vms.is_empty() {
        let words = common.into_iter().map(|(_, word)| word).collect();
        let place = String::new();
        return Ok(vec![Options { place, words }]);
    }
    if vms.len() > VMS_MAX {
        return Err(file.wrong(format!(
            "there are {} tables [vm.NAME]; {VMS_MAX} is the most",
            vms.len()
        )));
    }
    if is_given(arguments, VM) {
        return Err(file.wrong("it has tables [vm.NAME], whose names are the VMs': leave --vm out".into()));
    }
    vms.iter().map(|(name, table)| file.vm(name, table, &common)).collect()
}

/// A file that is being read.
struct File<'a> {
    path: &'a Path,
    daemon: &'a Command,
    arguments: &'a [OsString],
}

impl File<'_> {
    fn wrong(&self, reason: String) -> FileError {
        let path = self.path.to_owned();
        FileError::Tables { path, reason }
    }

    /// One VM: what its table says, and what is for all where it does not.
    fn vm(&self, name: &str, table: &Value, common: &[(String, OsString)]) -> Result<Options, FileError> {
        let place = format!("[vm.{name}] ");
        let Value::Table(table) = table else {
            let reason = format!("vm.{name} = {table}: a table [vm.{name}] with the keys of that VM is allowed here");
            return Err(self.wrong(reason));
        };
        let named = format!("--{VM}={name}");
        check(self.daemon, &named).map_err(|reason| self.wrong(format!("[vm.{name}]: {reason}")))?;
        if let Some(key) = OF_PROCESS.iter().find(|key| table.contains_key(**key)) {
            let reason = format!("{place}{key}: the process has one for all VMs: put it above the tables");
            return Err(self.wrong(reason));
        }
        if table.contains_key(VM) {
            return Err(self.wrong(format!("{place}{VM}: the table's name is the VM's")));
        }
        let own = self.words(table, &place)?;
        let common = common.iter().filter(|(key, _)| !table.contains_key(key));
        let words = common.cloned().chain(own).map(|(_, word)| word);
        Ok(Options {
            words: std::iter::once(named.into()).chain(words).collect(),
            place,
        })
    }

    /// The keys of a table, each with its option.
    fn words(&self, table: &Table, place: &str) -> Result<Vec<(String, OsString)>, FileError> {
        let mut words = Vec::new();
        for (key, value) in table {
            let option = self
                .daemon
                .get_arguments()
                .find(|option| option.get_long() == Some(key) && !NOT_IN_FILE.contains(&key.as_str()))
                .ok_or_else(|| FileError::Key {
                    path: self.path.to_owned(),
                    place: place.into(),
                    key: key.clone(),
                    keys: keys(self.daemon).collect::<Vec<_>>().join(", "),
                })?;
            let word = word(option, value).and_then(|word| match word {
                Some(word) => check(self.daemon, &word).map(|()| Some(word)),
                None => Ok(None),
            });
            let word = word.map_err(|reason| FileError::Value {
                path: self.path.to_owned(),
                place: place.into(),
                key: key.clone(),
                value: value.to_string(),
                reason,
            })?;
            if let Some(word) = word.filter(|_| !is_given(self.arguments, key)) {
                words.push((key.clone(), word.into()));
            }
        }
        Ok(words)
    }
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
    Err(one_line(&error))
}

/// What clap has to say, without its hints.
pub(crate) fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("For more") && !line.starts_with("Usage:"))
        .filter(|line| !line.is_empty());
    let text = lines.collect::<Vec<_>>().join(" ");
    text.strip_prefix("error: ").unwrap_or(&text).to_owned()
}

/// What is in force, defaults included, as a configuration file: of one VM, or of several with a table each.
pub(crate) fn effective(daemon: &Command, vms: &[ArgMatches]) -> String {
    if let [only] = vms {
        return lines(daemon, only, |_| true);
    }
    let process = vms
        .first()
        .map(|first| lines(daemon, first, |key| OF_PROCESS.contains(&key)));
    let tables = vms.iter().map(|matches| {
        let name = matches.get_one::<String>(VM).map_or("", String::as_str);
        let is_own = |key: &str| key != VM && !OF_PROCESS.contains(&key);
        // A name may have a dot in it.
        format!("\n[vm.\"{name}\"]\n{}", lines(daemon, matches, is_own))
    });
    process.into_iter().chain(tables).collect()
}

fn lines(daemon: &Command, matches: &ArgMatches, is_shown: impl Fn(&str) -> bool) -> String {
    let mut lines = String::new();
    for option in daemon.get_arguments() {
        let is_key = |key: &&str| !NOT_IN_FILE.contains(key) && is_shown(key);
        let Some(key) = option.get_long().filter(is_key) else {
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
