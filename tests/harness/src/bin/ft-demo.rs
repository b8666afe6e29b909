//! `ft-demo`: boots a protected virtual machine on two hosts, breaks something, and lets a witness judge.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use ft_harness::error::{HarnessError, IoContext};
use ft_harness::faults::{Fault, FaultPlan, Moment};
use ft_harness::guest::{Guest, Linux, Work};
use ft_harness::picture;
use ft_harness::scenario::{self, Setup};
use ft_harness::signals;

/// A virtual machine that survives the loss of its host: boot the pair, break something, judge.
#[derive(Debug, Parser)]
#[command(version, about, args_override_self = true)]
struct Arguments {
    /// What happens to the pair.
    #[arg(long, value_enum, default_value = "kill-primary")]
    fault: Fault,
    /// How long the client sends records.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Records a second.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// Seeds the payloads and the moment of the fault.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the figures there.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw latency over time there.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Where the four daemons are [default: where this program is].
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// The guest: the bundled one, or with --initrd the kernel of a Linux.
    #[arg(
        long,
        value_name = "FILE",
        default_value = "guest/ledger/target/x86_64-unknown-linux-gnu/release/ledger"
    )]
    guest: PathBuf,
    /// The guest is a stock Linux, and this its initrd, made with guest/ledger-linux/init.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Memory of a Linux guest.
    #[arg(long, default_value_t = 256, requires = "initrd", value_name = "MIB", value_parser = clap::value_parser!(u32).range(64..=2048))]
    ram_mib: u32,
    /// A Linux guest works as hard as it can for so long, beside its service.
    #[arg(long, requires = "initrd", value_name = "SECONDS")]
    load: Option<u32>,
    /// Milliseconds between two heartbeats.
    #[arg(long, value_name = "MS")]
    heartbeat_interval_ms: Option<u32>,
    /// Heartbeats that must be missed before the peer is suspected.
    #[arg(long, value_name = "N")]
    heartbeat_misses: Option<u32>,
    /// Milliseconds that the backup's replay may stand still.
    #[arg(long, value_name = "MS")]
    replay_timeout_ms: Option<u32>,
    /// How long the guest may go without a stop while something waits for it.
    #[arg(long, value_name = "MS")]
    patience_ms: Option<u32>,
    /// Keep the run's directory (logs, events, disk images).
    #[arg(long)]
    keep: bool,
    /// When the run is over, execute host A's journal again, twice, and compare every stop.
    #[arg(long)]
    replay: bool,
    /// Say what is going on.
    #[arg(long)]
    verbose: bool,
}

/// Exit status when the run was carried out and was not good.
const NOT_GOOD: u8 = 1;
/// Exit status when the run could not be carried out.
const NOT_RUN: u8 = 3;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match demo(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(NOT_GOOD),
        Err(error) => {
            eprintln!("ft-demo: {error}");
            ExitCode::from(NOT_RUN)
        }
    }
}

fn demo(arguments: &Arguments) -> Result<bool, HarnessError> {
    let records = arguments.seconds * u64::from(arguments.rate);
    if records >= scenario::RECORDS_MAX {
        return Err(HarnessError::Environment(format!(
            "{records} records do not fit on the demo's disk ({} do): lower --seconds or --rate",
            scenario::RECORDS_MAX
        )));
    }
    let plan = FaultPlan::At(arguments.fault, Moment::seeded(arguments.seed, records, arguments.rate));
    let options = |options: &[(&str, Option<u32>)]| {
        let given = options
            .iter()
            .filter_map(|(name, value)| Some([(*name).to_owned(), (*value)?.to_string()]));
        given.flatten().collect()
    };
    let setup = Setup {
        bin_dir: bin_dir(arguments)?,
        guest: guest(arguments)?,
        seed: arguments.seed,
        records,
        rate: arguments.rate,
        plan: plan.clone(),
        ft_log_arguments: options(&[
            ("--heartbeat-interval-ms", arguments.heartbeat_interval_ms),
            ("--heartbeat-misses", arguments.heartbeat_misses),
            ("--replay-timeout-ms", arguments.replay_timeout_ms),
        ]),
        shim_arguments: options(&[("--patience-ms", arguments.patience_ms)]),
        replay: arguments.replay,
        capture: false,
        verbose: arguments.verbose,
    };
    setup.pair().check()?;
    let directory = tempfile::Builder::new()
        .prefix("ft-demo-")
        .disable_cleanup(arguments.keep)
        .tempdir()
        .context(|| "create a directory for the run".to_owned())?;
    if arguments.keep {
        println!("The run's files: {}", directory.path().display());
    }
    let removed = (!arguments.keep).then(|| directory.path().to_owned());
    signals::clean_up(removed.into_iter().collect())?;
    println!(
        "A virtual machine on hosts A and B, {} records a second for {} s, fault: {}.",
        arguments.rate,
        arguments.seconds,
        arguments.fault.name()
    );
    let outcome = scenario::run(&setup, directory.path())?;
    print!("{}", outcome.report.text(&plan));
    if arguments.verbose {
        for event in &outcome.events {
            let fields = serde_json::Value::from(event.fields.clone());
            eprintln!("{} {} {} {} {fields}", event.t_ns, event.host, event.source, event.name);
        }
    }
    if let Some(path) = &arguments.json {
        let mut json = serde_json::to_string_pretty(&outcome.report).expect("a report is JSON");
        json.push('\n');
        std::fs::write(path, json).context(|| format!("write {}", path.display()))?;
    }
    if let Some(path) = &arguments.svg {
        let svg = picture::svg(&outcome.report, &outcome.transcript, &outcome.timeline);
        std::fs::write(path, svg).context(|| format!("write {}", path.display()))?;
        println!("  picture     {}", path.display());
    }
    Ok(outcome.report.good())
}

fn guest(arguments: &Arguments) -> Result<Guest, HarnessError> {
    let kernel = absolute(&arguments.guest)?;
    Ok(match &arguments.initrd {
        None => Guest::Bundled(kernel),
        Some(initrd) => Guest::Linux(Linux {
            kernel,
            initrd: absolute(initrd)?,
            ram_mib: arguments.ram_mib,
            work: arguments.load.map(|seconds| Work::Everything { seconds }),
        }),
    })
}

fn bin_dir(arguments: &Arguments) -> Result<PathBuf, HarnessError> {
    if let Some(directory) = &arguments.bin_dir {
        return absolute(directory);
    }
    let own = std::env::current_exe().context(|| "find this program".to_owned())?;
    Ok(own.parent().expect("a program is in a directory").to_owned())
}

fn absolute(path: &Path) -> Result<PathBuf, HarnessError> {
    std::path::absolute(path).context(|| format!("resolve {}", path.display()))
}
