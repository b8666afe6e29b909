//! `vhost-ft-blk`: see `--help`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = vhost_ft_blk::cli::Arguments::parse();
    ft_vhost::daemon::main(|| vhost_ft_blk::cli::run(arguments))
}
