//! The command line: the daemon itself, or one of the subcommands beside it.

use std::ffi::OsString;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, error::ErrorKind};

use crate::{
    config::{Config, Process},
    config_file,
    control::client::Ask,
    exit::Exit,
    inspect::Inspect,
};

/// Orders, journals and replicates the log of a fault-tolerant VM, and decides with its peer who goes live.
#[derive(Debug, Parser)]
#[command(
    name = "ft-log",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
struct CommandLine {
    #[command(flatten)]
    daemon: Option<Config>,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What runs beside the daemon.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Looks at journals.
    #[command(flatten)]
    Inspect(Inspect),
    /// Asks a running daemon.
    #[command(flatten)]
    Ask(Ask),
}

/// What was asked for.
#[derive(Debug)]
pub enum Asked {
    /// To be the daemon.
    Daemon(Process),
    /// Only whether the daemon would start with this configuration, which is shown.
    Check(String),
    /// Something else.
    Command(Command),
}

impl Asked {
    /// Reads the command line and the file it names. Wrong usage ends the process with status 2, a file that cannot be read with 3.
    #[must_use]
    pub fn from_command_line() -> Self {
        let arguments: Vec<_> = std::env::args_os().collect();
        Self::parse(&arguments).unwrap_or_else(|error| match error.kind() {
            ErrorKind::Io => {
                eprint!("{error}");
                std::process::exit(Exit::Environment as i32)
            }
            _ => error.exit(),
        })
    }

    fn parse(arguments: &[OsString]) -> Result<Self, clap::Error> {
        let mut command = CommandLine::command();
        command.build();
        let is_daemon = arguments
            .get(1)
            .is_none_or(|first| command.find_subcommand(first).is_none());
        let file = config_file::named(arguments).filter(|_| is_daemon);
        let wrong = |message: String| {
            let place = file
                .as_ref()
                .map_or_else(String::new, |path| format!("{}: ", path.display()));
            CommandLine::command().error(ErrorKind::ValueValidation, format!("{place}{message}"))
        };
        let vms = match &file {
            Some(path) => config_file::read(path, &command, arguments).map_err(|error| {
                let kind = match error {
                    config_file::FileError::Read { .. } => ErrorKind::Io,
                    _ => ErrorKind::ValueValidation,
                };
                CommandLine::command().error(kind, error)
            })?,
            None => vec![config_file::Options {
                place: String::new(),
                words: Vec::new(),
            }],
        };
        let (mut matches, mut configs) = (Vec::new(), Vec::new());
        for config_file::Options { place, words } in vms {
            let mut arguments = arguments.to_vec();
            let at = arguments.len().min(1);
            arguments.splice(at..at, words);
            let matched = CommandLine::command().try_get_matches_from(arguments);
            let matched = matched.map_err(|error| match place.is_empty() {
                true => error,
                false => wrong(format!("{place}{}", config_file::one_line(&error))),
            })?;
            if let Some(command) = CommandLine::from_arg_matches(&matched)?.command {
                return Ok(Self::Command(command));
            }
            let config = Config::from_arg_matches(&matched)?;
            config.check().map_err(|message| wrong(format!("{place}{message}")))?;
            matches.push(matched);
            configs.push(config);
        }
        let process = Process { vms: configs };
        process.check().map_err(wrong)?;
        match process.vms.iter().any(|config| config.check_config) {
            true => Ok(Self::Check(config_file::effective(&command, &matches))),
            false => Ok(Self::Daemon(process)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USUAL: &str = "vm = 'v'\nrole = 'primary'\nsocket-path = '/s'\narbiter = '/a'\nlisten = '127.0.0.1:1'\npeer = '127.0.0.1:2'\n";

    fn parse(file: &str, more: &[&str]) -> Result<Asked, String> {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("ft-log.toml");
        std::fs::write(&path, file).unwrap();
        let arguments = ["ft-log".into(), "--config".into(), path.into_os_string()];
        let arguments: Vec<OsString> = arguments.into_iter().chain(more.iter().map(OsString::from)).collect();
        Asked::parse(&arguments).map_err(|error| error.to_string())
    }

    fn config(file: &str, more: &[&str]) -> Config {
        match parse(file, more).unwrap() {
            Asked::Daemon(mut process) if process.vms.len() == 1 => process.vms.remove(0),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_file_says_what_options_say_and_options_win() {
        let file = format!("{USUAL}heartbeat-interval-ms = 7\ndevices = ['a', 'b']\nalone = false\n");
        let config_of = config(&file, &["--heartbeat-misses", "3", "--vm=w"]);
        assert_eq!((config_of.heartbeat_interval_ms, config_of.heartbeat_misses), (7, 3));
        assert_eq!(
            (config_of.vm.as_str(), config_of.devices.join("+")),
            ("w", "a+b".into())
        );
        assert!(!config_of.alone);
        assert!(config(&format!("{USUAL}alone = true\n"), &[]).alone);
    }

    #[test]
    fn a_wrong_key_or_value_is_told_with_what_is_allowed() {
        for (line, parts) in [
            ("heart-beat = 3", ["no key 'heart-beat'", "heartbeat-interval-ms"]),
            ("config = 'x'", ["no key 'config'", "heartbeat-misses"]),
            ("heartbeat-interval-ms = 0", ["heartbeat-interval-ms = 0", "1..=60000"]),
            ("leave-timeout-ms = 9", ["leave-timeout-ms = 9", "10..=60000"]),
            ("journal-backlog-mib = 1", ["journal-backlog-mib = 1", "4..=4096"]),
            ("heartbeat-interval-ms = 'often'", ["\"often\"", "invalid digit"]),
            (
                "heartbeat-interval-ms = [1, 2]",
                ["heartbeat-interval-ms = [1, 2]", "a whole number"],
            ),
            ("alone = 1", ["alone = 1", "true or false"]),
            ("journal = 1.5", ["journal = 1.5", "a string"]),
            ("devices = ['a', 3.5]", ["devices", "a string"]),
            ("devices = ['a', '../b']", ["../b", "A-Z a-z 0-9"]),
            ("alone = ", ["not TOML", "line 7"]),
        ] {
            let error = parse(&format!("{USUAL}{line}\n"), &[]).unwrap_err();
            for part in parts.iter().chain(&["ft-log.toml"]) {
                assert!(error.contains(part), "{line}: '{part}' is not in: {error}");
            }
        }
        let error = parse(&USUAL.replace("'primary'", "'first'"), &[]).unwrap_err();
        assert!(
            error.contains("role = \"first\"") && error.contains("primary, backup"),
            "{error}"
        );
        // Between keys, and keys that are missing.
        let error = parse(&USUAL.replace("127.0.0.1:2", "127.0.0.1:1"), &[]).unwrap_err();
        assert!(
            error.contains("ft-log.toml: --listen and --peer are the same address"),
            "{error}"
        );
        let error = parse("vm = 'v'\n", &[]).unwrap_err();
        assert!(error.contains("--role") && error.contains("--arbiter"), "{error}");
    }

    #[test]
    fn what_is_in_force_is_shown_as_a_file_that_says_the_same() {
        let Ok(Asked::Check(shown)) = parse(USUAL, &["--check-config", "--heartbeat-misses=4"]) else {
            panic!("not checked");
        };
        let shown_again = match parse(&shown, &["--check-config"]) {
            Ok(Asked::Check(shown)) => shown,
            other => panic!("{other:?} of:\n{shown}"),
        };
        assert_eq!(shown, shown_again);
        assert!(
            shown.contains("heartbeat-misses = 4\n") && shown.contains("devices = [\"blk0\", \"net0\"]\n"),
            "{shown}"
        );
        assert!(parse("vm = '/'\n", &["--check-config"]).is_err());
    }
}
