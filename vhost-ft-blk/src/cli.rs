//! Command line, and the way from it to a running daemon.

use std::path::PathBuf;

use clap::Parser;
use ft_vhost::{
    daemon::{self, Membership, Options, Signals},
    exit::End,
};

use crate::{disk::Disk, image::Image};

/// vhost-user block device on a raw image. Exit codes: 0 ordinary end, 2 wrong usage, 3 environment, 4 halted, 6 this replica failed.
#[derive(Debug, Parser)]
#[command(name = "vhost-ft-blk", version)]
pub struct Arguments {
    /// Socket on which frontends connect.
    #[arg(long, value_name = "VHOST_SOCK")]
    socket_path: PathBuf,
    /// Raw image; its size is the disk's, a multiple of 512 bytes.
    #[arg(long, value_name = "IMAGE")]
    blk_file: PathBuf,
    /// Refuse writes.
    #[arg(long)]
    read_only: bool,
    /// Socket of the ft-log of this host: the device is one of a fault-tolerant VM.
    #[arg(long, value_name = "SOCK", requires = "vm", requires = "device")]
    ft_log: Option<PathBuf>,
    /// Name of the VM.
    #[arg(long, value_name = "NAME", requires = "ft_log")]
    vm: Option<String>,
    /// Name of this device in the VM, as in ft-log's --devices.
    #[arg(long, value_name = "NAME", requires = "ft_log")]
    device: Option<String>,
    /// Append one JSON object per event to this file.
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
}

/// Runs the daemon.
///
/// # Errors
/// [`End`].
pub fn run(arguments: Arguments) -> Result<(), End> {
    let signals = Signals::take().map_err(End::environment)?;
    let image = Image::open(&arguments.blk_file, arguments.read_only).map_err(End::environment)?;
    let membership = arguments
        .ft_log
        .zip(arguments.vm)
        .zip(arguments.device)
        .map(|((ft_log, vm), device)| Membership { ft_log, vm, device });
    let options = Options {
        socket_path: arguments.socket_path,
        membership,
        events: arguments.events,
    };
    let fingerprinted = image.try_clone().map_err(End::environment)?;
    let fingerprint = move || fingerprinted.fingerprint().map_err(End::environment);
    daemon::serve(&options, "vhost-ft-blk", Disk::new(image), signals, fingerprint)
}
