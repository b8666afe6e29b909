//! Command line of the vCPU shim; see docs/interfaces.md §3.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ft_vcpu_shim::command::{bisect, check, replay, rewrite, run};
use tracing_subscriber::EnvFilter;

/// Runs a virtual machine in lockstep, or replays the journal of one.
#[derive(Parser, Debug)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run one replica of a protected VM: ft-log says whether it records or replays.
    Run(run::RunArgs),
    /// Execute a finished journal again, offline, and print the digests at its end.
    Replay(replay::ReplayArgs),
    /// Find the first stop at which two journals, or a journal and its replay, differ: exit status 0 the same, 1 different.
    Bisect(bisect::BisectArgs),
    /// Say what this host allows, and with --with whether it can pair with another: exit status 0 yes, 1 no.
    Check(check::CheckArgs),
    /// Show what the loader does to the RDTSC, RDTSCP and PAUSE of a kernel or module, without running it.
    Rewrite(rewrite::RewriteArgs),
}

/// SIGTERM ends this replica in order: nothing here needs flushing, and ft-log sees the socket close.
extern "C" fn on_terminate(_signal: libc::c_int) {
    // SAFETY: _exit is async-signal-safe.
    unsafe { libc::_exit(0) }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,gdbstub=warn")))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let handler = nix::sys::signal::SigHandler::Handler(on_terminate);
    // SAFETY: the handler only calls _exit.
    let installed = unsafe { nix::sys::signal::signal(nix::sys::signal::Signal::SIGTERM, handler) };
    if let Err(errno) = installed {
        eprintln!("ft-vcpu-shim: cannot handle SIGTERM: {errno}");
        return ExitCode::from(3);
    }
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(&args).map(|()| 0),
        Command::Replay(args) => replay::replay(&args).map(|()| 0),
        Command::Bisect(args) => bisect::bisect(&args).map(bisect::Verdict::exit_code),
        Command::Check(args) => check::check(&args).map(|findings| {
            print!("{}", findings.text);
            u8::from(!findings.yes)
        }),
        Command::Rewrite(args) => rewrite::rewrite(&args).map(|text| {
            print!("{text}");
            0
        }),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("ft-vcpu-shim: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
