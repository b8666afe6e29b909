//! The command line: the daemon itself, or one of the subcommands beside it.

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::{config::Config, inspect::Inspect};

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
}

/// What was asked for.
#[derive(Debug)]
pub enum Asked {
    /// To be the daemon.
    Daemon(Box<Config>),
    /// Something else.
    Command(Command),
}

impl Asked {
    /// Reads the command line; wrong usage ends the process with status 2.
    #[must_use]
    pub fn from_command_line() -> Self {
        Self::parse(std::env::args_os()).unwrap_or_else(|error| error.exit())
    }

    fn parse(arguments: impl IntoIterator<Item = impl Into<std::ffi::OsString> + Clone>) -> Result<Self, clap::Error> {
        let matches = CommandLine::command().try_get_matches_from(arguments)?;
        if let Some(command) = CommandLine::from_arg_matches(&matches)?.command {
            return Ok(Self::Command(command));
        }
        let config = Config::from_arg_matches(&matches)?;
        match config.check() {
            Ok(()) => Ok(Self::Daemon(Box::new(config))),
            Err(message) => Err(CommandLine::command().error(clap::error::ErrorKind::ValueValidation, message)),
        }
    }
}
