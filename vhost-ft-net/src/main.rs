//! `vhost-ft-net`: see `--help`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = vhost_ft_net::cli::Arguments::parse();
    ft_vhost::daemon::main(|| vhost_ft_net::cli::run(arguments))
}
