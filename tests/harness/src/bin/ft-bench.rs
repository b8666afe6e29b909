//! `ft-bench`: what protection costs, as rows of ours against a peer's, measured in one run.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use ft_harness::bench::blk;
use ft_harness::bench::failover::{self, Heartbeat};
use ft_harness::bench::machine::Medium;
use ft_harness::bench::row::Row;
use ft_harness::bench::{linux, lockstep, log, net};
use ft_harness::error::{HarnessError, IoContext};
use ft_harness::faults::{Fault, FaultPlan, Moment};
use ft_harness::guest::{Guest, Linux};
use ft_harness::scenario::Setup;
use ft_harness::signals;

/// What protection costs: figures of ours next to a peer's, measured in the same run.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    /// Which figures.
    #[arg(value_enum, default_value = "lockstep")]
    suite: Suite,
    /// Write the rows there.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the four daemons are [default: where this program is].
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// The guest.
    #[arg(
        long,
        value_name = "ELF",
        default_value = "guest/ledger/target/x86_64-unknown-linux-gnu/release/ledger"
    )]
    guest: PathBuf,
    /// The guest is a stock Linux, and this its initrd.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// More arguments for both ft-logs of the suite `linux`, separated by blanks.
    #[arg(long, value_name = "ARGUMENTS", default_value = "", allow_hyphen_values = true)]
    ft_log: String,
    /// More arguments for both shims of the suite `linux`, separated by blanks.
    #[arg(long, value_name = "ARGUMENTS", default_value = "", allow_hyphen_values = true)]
    shim: String,
    /// Rounds whose median is taken.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=50))]
    rounds: u8,
    /// Of the suites blk and net: only the rows whose names contain this; of the suite log, only the parts ("commit latency, veth, 1 VM"); of the
    /// suite linux, costs or failover.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Failovers of each setting.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=1000))]
    failovers: u64,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Suite {
    /// The lockstep engine: throughput, latency, log bytes, failover gap.
    Lockstep,
    /// A stock Linux: compile-like work, log, failover under load. Needs --initrd.
    Linux,
    /// The block daemon alone: IOPS and CPU per I/O.
    Blk,
    /// The network daemon: frames a second alone and protected, requests a second and latency protected.
    Net,
    /// The log daemon: commit latency, throughput, processor time, idle traffic.
    Log,
}

/// Exit status when a run lost or forked something, or did not end as it must.
const NOT_GOOD: u8 = 1;
/// Exit status when the runs could not be carried out.
const NOT_RUN: u8 = 3;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let measured = match arguments.suite {
        Suite::Lockstep => bench_lockstep(&arguments),
        Suite::Linux => bench_linux(&arguments),
        Suite::Blk => bench_blk(&arguments),
        Suite::Net => bench_net(&arguments),
        Suite::Log => bench_log(&arguments),
    };
    match measured {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(NOT_GOOD),
        Err(error) => {
            eprintln!("ft-bench: {error}");
            ExitCode::from(NOT_RUN)
        }
    }
}

/// Rows so far; each is printed when it is there.
#[derive(Default)]
struct Rows(Vec<Row>);

impl Rows {
    fn add(&mut self, rows: Vec<Row>) {
        for row in rows {
            println!("{row}");
            self.0.push(row);
        }
    }
}

fn bench_blk(arguments: &Arguments) -> Result<bool, HarnessError> {
    let programs = blk::Programs {
        ours: bin_dir(arguments)?.join("vhost-ft-blk"),
        log: bin_dir(arguments)?.join("ft-log"),
        peer: "qemu-storage-daemon".into(),
    };
    let directory = directory(Medium::Disk)?;
    signals::clean_up(vec![directory.path().to_owned()])?;
    let mut rows = Rows::default();
    blk::rows(
        &programs,
        directory.path(),
        arguments.rounds,
        arguments.only.as_deref(),
        |row| {
            rows.add(vec![row]);
        },
    )?;
    write_json(arguments, &rows)?;
    Ok(true)
}

fn bench_net(arguments: &Arguments) -> Result<bool, HarnessError> {
    let bin_dir = bin_dir(arguments)?;
    let programs = net::Programs {
        ours: bin_dir.join("vhost-ft-net"),
        log: bin_dir.join("ft-log"),
        disk: bin_dir.join("vhost-ft-blk"),
    };
    let directory = directory(Medium::Memory)?;
    signals::clean_up(vec![directory.path().to_owned()])?;
    let mut rows = Rows::default();
    let only = arguments.only.as_deref();
    net::rows(&programs, directory.path(), arguments.rounds, only, |row| {
        rows.add(vec![row]);
    })?;
    write_json(arguments, &rows)?;
    Ok(true)
}

fn bench_lockstep(arguments: &Arguments) -> Result<bool, HarnessError> {
    let setup = setup(arguments)?;
    let pair = setup.pair();
    pair.check()?;
    let in_memory = directory(Medium::Memory)?;
    let on_disk = directory(Medium::Disk)?;
    signals::clean_up(vec![in_memory.path().to_owned(), on_disk.path().to_owned()])?;
    let mut rows = Rows::default();
    rows.add(lockstep::costs(
        &pair,
        Medium::Memory,
        in_memory.path(),
        arguments.rounds,
    )?);
    if Medium::Disk.is_memory()? {
        eprintln!(
            "ft-bench: {} is in memory: no rows on disk (set TMPDIR)",
            Medium::Disk.directory().display()
        );
    } else {
        rows.add(lockstep::costs(&pair, Medium::Disk, on_disk.path(), arguments.rounds)?);
    }
    rows.add(lockstep::log_bytes(&pair, in_memory.path())?);
    let mut good = true;
    for heartbeat in [Heartbeat::DEFAULT, Heartbeat::FAST] {
        let seen = failover::runs(&setup, heartbeat, arguments.failovers, on_disk.path())?;
        rows.add(seen.rows(heartbeat, arguments.failovers));
        for problem in &seen.bad {
            eprintln!("ft-bench: {problem}");
            good = false;
        }
    }
    write_json(arguments, &rows)?;
    Ok(good)
}

fn bench_linux(arguments: &Arguments) -> Result<bool, HarnessError> {
    let Some(initrd) = &arguments.initrd else {
        return Err(HarnessError::Environment(
            "the suite linux needs --initrd and the kernel as --guest: scripts/bench linux gives both".to_owned(),
        ));
    };
    let linux = Linux {
        kernel: absolute(&arguments.guest)?,
        initrd: absolute(initrd)?,
        ram_mib: 256,
        work: None,
    };
    let setup = Setup {
        guest: Guest::Linux(linux.clone()),
        ft_log_arguments: words(&arguments.ft_log),
        shim_arguments: words(&arguments.shim),
        ..setup(arguments)?
    };
    setup.pair().check()?;
    let files = directory(Medium::Disk)?;
    signals::clean_up(vec![files.path().to_owned()])?;
    let mut rows = Rows::default();
    let wanted = |part: &str| arguments.only.as_deref().is_none_or(|only| part.contains(only));
    if wanted("costs") {
        rows.add(linux::costs(&setup.pair(), &linux, files.path())?);
    }
    let mut problems = Vec::new();
    if wanted("failover") {
        let (failover, found) = linux::failover(&setup, &linux, files.path())?;
        rows.add(failover);
        problems = found;
    }
    for problem in &problems {
        eprintln!("ft-bench: {problem}");
    }
    write_json(arguments, &rows)?;
    Ok(problems.is_empty())
}

fn bench_log(arguments: &Arguments) -> Result<bool, HarnessError> {
    let setup = setup(arguments)?;
    let directory = directory(Medium::Memory)?;
    signals::clean_up(vec![directory.path().to_owned()])?;
    let mut rows = Rows::default();
    log::rows(
        &setup.bin_dir,
        directory.path(),
        arguments.rounds,
        arguments.only.as_deref(),
        &mut |more| rows.add(more),
    )?;
    write_json(arguments, &rows)?;
    Ok(true)
}

fn words(arguments: &str) -> Vec<String> {
    arguments.split_whitespace().map(str::to_owned).collect()
}

fn write_json(arguments: &Arguments, rows: &Rows) -> Result<(), HarnessError> {
    let Some(path) = &arguments.json else { return Ok(()) };
    let mut json = serde_json::to_string_pretty(&rows.0).expect("rows are JSON");
    json.push('\n');
    std::fs::write(path, json).context(|| format!("write {}", path.display()))
}

fn directory(medium: Medium) -> Result<tempfile::TempDir, HarnessError> {
    let parent = medium.directory();
    tempfile::Builder::new()
        .prefix("ft-bench-")
        .tempdir_in(&parent)
        .context(|| format!("create a directory in {}", parent.display()))
}

fn bin_dir(arguments: &Arguments) -> Result<PathBuf, HarnessError> {
    match &arguments.bin_dir {
        Some(directory) => absolute(directory),
        None => {
            let own = std::env::current_exe().context(|| "find this program".to_owned())?;
            Ok(own.parent().expect("a program is in a directory").to_owned())
        }
    }
}

fn setup(arguments: &Arguments) -> Result<Setup, HarnessError> {
    Ok(Setup {
        bin_dir: bin_dir(arguments)?,
        guest: absolute(&arguments.guest)?.into(),
        seed: 1,
        records: 1,
        rate: 1,
        plan: FaultPlan::At(Fault::None, Moment::seeded(1, 1, 1)),
        ft_log_arguments: Vec::new(),
        shim_arguments: Vec::new(),
        replay: false,
        capture: false,
        verbose: false,
    })
}

fn absolute(path: &Path) -> Result<PathBuf, HarnessError> {
    std::path::absolute(path).context(|| format!("resolve {}", path.display()))
}
