//! The `ft-log` program.

use std::{io::IsTerminal, process::ExitCode};

use ft_log::{config::Config, exit::Exit, start};
use tracing::error;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let config = Config::from_command_line();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    let exit = match start::run(config) {
        Ok(exit) => exit,
        Err(error) => {
            error!("{error}");
            Exit::Environment
        }
    };
    ExitCode::from(exit as u8)
}
