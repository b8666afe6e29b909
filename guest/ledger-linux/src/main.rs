//! `ledger-linux`: serves the ledger on a disk of this machine. Its standard output is the console of the bundled guest.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ledger_core::chain::Head;
use ledger_core::command_line;
use ledger_core::ledger::Buffers;
use ledger_core::opening;
use ledger_linux::disk::Disk;
use ledger_linux::service::Service;

/// The ledger service of docs/interfaces.md §2. Ends with status 0 when a client asks for power off; whoever started it powers off then.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    /// The disk: a block device, or a file.
    #[arg(long, value_name = "PATH")]
    disk: PathBuf,
    /// Use only so many sectors of it.
    #[arg(long, value_name = "N")]
    sectors: Option<u64>,
    /// The kernel's command line: `ip=ADDRESS/PREFIX port=PORT`, other words are ignored. The address must be up.
    #[arg(long, value_name = "TEXT")]
    cmdline: String,
}

fn main() -> ExitCode {
    match serve(&Arguments::parse()) {
        Ok(()) => {
            println!("ledger: power off");
            ExitCode::SUCCESS
        }
        Err(what) => {
            println!("ledger: fatal: {what}");
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &Arguments) -> Result<(), String> {
    println!("ledger: booting");
    let settings = command_line::parse(&arguments.cmdline).map_err(|error| format!("command line: {error}"))?;
    let mut disk = Disk::open(&arguments.disk, arguments.sectors)
        .map_err(|error| format!("open {}: {error}", arguments.disk.display()))?;
    let mut buffers = Box::new(Buffers::new());
    let capacity = disk.sectors();
    let head = opening::open(&mut disk, &mut buffers.group, capacity).map_err(|error| error.to_string())?;
    let Head { n, hash } = head;
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("ledger: {n} records, head {hex}");
    let (address, port) = (settings.address, settings.port);
    let listener =
        TcpListener::bind((address, port)).map_err(|error| format!("listen on {address}:{port}: {error}"))?;
    println!("ledger: listening on {address}:{port}");
    Service::new(listener, disk, &mut buffers, head)
        .and_then(|mut service| service.run())
        .map_err(|error| format!("serve: {error}"))
}
