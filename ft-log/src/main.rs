//! The `ft-log` program.

use std::{
    io::{self, IsTerminal},
    process::ExitCode,
};

use ft_log::{
    cli::{Asked, Command},
    config::Process,
    control::client,
    exit::Exit,
    inspect, start,
};
use tracing::error;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let exit = match Asked::from_command_line() {
        Asked::Daemon(process) => daemon(process),
        Asked::Check(effective) => {
            print!("{effective}");
            Exit::Ordinary
        }
        Asked::Command(Command::Inspect(command)) => inspect(&command),
        Asked::Command(Command::Ask(ask)) => match client::run(&ask, &mut io::stdout().lock()) {
            Ok(()) => Exit::Ordinary,
            Err(error) => {
                eprintln!("ft-log: {error}");
                Exit::Environment
            }
        },
    };
    ExitCode::from(exit as u8)
}

fn daemon(process: Process) -> Exit {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    start::run(process).unwrap_or_else(|error| {
        error!("{error}");
        Exit::Environment
    })
}

fn inspect(command: &inspect::Inspect) -> Exit {
    let mut out = io::BufWriter::new(io::stdout().lock());
    inspect::run(command, &mut out).unwrap_or_else(|error| {
        eprintln!("ft-log: {error}");
        Exit::Environment
    })
}
