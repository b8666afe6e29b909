//! `ft-vcpu-shim rewrite`: what the loader will do to a kernel's or module's text, shown beforehand.

use std::{fmt::Write as _, path::PathBuf};

use clap::Args;

use crate::{
    error::Error,
    rewrite::{Kind, Report, image},
};

/// Shows the RDTSC, RDTSCP and PAUSE sites of a kernel or a module.
#[derive(Args, Debug)]
pub struct RewriteArgs {
    /// A vmlinux, or a kernel module: ELF for x86-64, not compressed.
    pub image: PathBuf,
    /// Writes the rewritten file here.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Lists the address of every site.
    #[arg(long)]
    pub list: bool,
}

/// Rewrites the image in memory and gives the report as text.
///
/// # Errors
/// A file that cannot be read or written, and a kernel that cannot be made deterministic.
pub fn rewrite(args: &RewriteArgs) -> Result<String, Error> {
    let failed = |what: &str, path: &PathBuf, source: std::io::Error| {
        Error::environment(format!("cannot {what} {}: {source}", path.display()))
    };
    let mut file = std::fs::read(&args.image).map_err(|source| failed("read", &args.image, source))?;
    let report =
        image::rewrite(&mut file).map_err(|error| Error::environment(format!("{}: {error}", args.image.display())))?;
    if let Some(output) = &args.output {
        std::fs::write(output, &file).map_err(|source| failed("write", output, source))?;
    }
    Ok(describe(&report, args.list))
}

fn describe(report: &Report, list: bool) -> String {
    let mut text = format!(
        "{} RDTSC, {} RDTSCP and {} PAUSE rewritten, {} byte patterns of the first two inside other instructions left alone\n",
        report.count(Kind::Rdtsc),
        report.count(Kind::Rdtscp),
        report.count(Kind::Pause),
        report.operands.len()
    );
    for (kind, name) in [
        (Kind::Rdrand, "RDRAND"),
        (Kind::Rdseed, "RDSEED"),
        (Kind::Rdpid, "RDPID"),
        (Kind::Rdpmc, "RDPMC"),
    ] {
        let _ = writeln!(text, "{} {name} hidden by CPUID", report.count(kind));
    }
    if list {
        for site in report.rewritten.iter().chain(&report.hidden) {
            let _ = writeln!(text, "{:#018x} {:?}", site.address, site.kind);
        }
    }
    text
}
