//! Command line, and the way from it to a running daemon.

use std::path::PathBuf;

use clap::Parser;
use ft_vhost::{
    conventions::Conventions,
    daemon::{self, Signals},
    exit::End,
};

use crate::{disk::Disk, image::Image};

/// What `--print-capabilities` says of the options of QEMU's schema.
const CAPABILITIES: &[&str] = &["read-only", "blk-file"];

/// vhost-user block device on a raw image. Exit codes: 0 ordinary end, 2 wrong usage, 3 environment, 4 halted, 6 this replica failed.
#[derive(Debug, Parser)]
#[command(name = "vhost-ft-blk", version)]
pub struct Arguments {
    #[command(flatten)]
    conventions: Conventions,
    /// Raw image; its size is the disk's, a multiple of 512 bytes.
    #[arg(long, value_name = "IMAGE", required_unless_present = "print_capabilities")]
    blk_file: Option<PathBuf>,
    /// Refuse writes.
    #[arg(long)]
    read_only: bool,
}

/// Runs the daemon.
///
/// # Errors
/// [`End`].
pub fn run(arguments: Arguments) -> Result<(), End> {
    let conventions = &arguments.conventions;
    if let Some(capabilities) = conventions.capabilities("block", CAPABILITIES) {
        println!("{capabilities}");
        return Ok(());
    }
    let blk_file = arguments.blk_file.as_deref().expect("clap asks for it");
    let options = conventions.options();
    let signals = Signals::take().map_err(End::environment)?;
    let image = Image::open(blk_file, arguments.read_only).map_err(End::environment)?;
    let fingerprinted = image.try_clone().map_err(End::environment)?;
    let fingerprint = move || fingerprinted.fingerprint().map_err(End::environment);
    daemon::serve(&options, "vhost-ft-blk", Disk::new(image), signals, fingerprint)
}
