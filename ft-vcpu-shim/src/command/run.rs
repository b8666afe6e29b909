//! `ft-vcpu-shim run`: one replica of a protected VM. ft-log says whether it records or replays.

use std::{
    fs::File,
    io::Read,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use clap::Args;
use ft_client::{
    Region,
    events::Events,
    handshake::{ShimSession, join_shim, report_failure},
    log::Ended,
};
use ft_protocol::replica::Role;
use serde_json::json;

use super::machine::MachineArgs;
use crate::{
    debug::report::{self, Report},
    device::{
        Port,
        gated::{GatedPort, Kind},
    },
    error::Error,
    lockstep::{
        divergence::Divergence,
        execution::{End, Execution, Step},
        position::Unrecorded,
        record::Recorder,
        replay::Replayer,
        source::Online,
        timeline::Timeline,
    },
};

/// Flags of `run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// Name of the VM, as ft-log knows it.
    #[arg(long)]
    vm: String,
    /// Socket of ft-log.
    #[arg(long, value_name = "SOCK")]
    ft_log: PathBuf,
    #[command(flatten)]
    machine: MachineArgs,
    /// vhost-user socket of vhost-ft-blk.
    #[arg(long, value_name = "SOCK")]
    blk: PathBuf,
    /// vhost-user socket of vhost-ft-net.
    #[arg(long, value_name = "SOCK")]
    net: PathBuf,
    /// File for the guest's console; created or appended to.
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// File for events, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
    /// Directory for the report of a divergence, and for the last stops of a side that loses its backup; the journal's, for example.
    #[arg(long, value_name = "DIR")]
    reports: Option<PathBuf>,
    /// How long a guest may go without a stop of its own while something waits for it; then it is stopped anywhere, at the price of a
    /// state delta in the log. More where the processor is shared or emulated.
    #[arg(long, value_name = "MS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    patience_ms: u64,
    /// Runs the guest as a VMM does that records nothing: no entry for what it sees, no state deltas, its kernel as it is. Nobody can replay
    /// that, so ft-log must be --alone. To measure what recording costs.
    #[arg(long)]
    unrecorded: bool,
}

fn open_console(path: Option<&Path>) -> Result<File, Error> {
    let path = path.unwrap_or(Path::new("/dev/null"));
    File::options().create(true).append(true).open(path).map_err(|source| {
        Error::environment(format!(
            "cannot open the console file {}: {source}. Check --console",
            path.display()
        ))
    })
}

/// Runs a replica to its end.
///
/// # Errors
/// Every way of ending but the guest's own power-off.
pub fn run(args: &RunArgs) -> Result<(), Error> {
    let mut events = Events::open("ft-vcpu-shim", args.events.as_deref())
        .map_err(|source| Error::environment(format!("cannot open the events file: {source}. Check --events")))?;
    let console = open_console(args.console.as_deref())?;
    let machine = match args.unrecorded {
        false => args.machine.load()?,
        true => args.machine.load_unrecorded()?,
    };
    let session = join_shim(&args.ft_log, &args.vm, &machine.fingerprint)?;
    let ShimSession {
        mut stream,
        region,
        log,
        replay,
        gates,
    } = session;
    let failing = Arc::new(AtomicBool::new(false));
    watch_socket(&stream, Arc::clone(&region), Arc::clone(&failing))?;

    let role = wait_for_role(&region)?;
    if args.unrecorded && role != Role::Live {
        return Err(Error::environment(format!(
            "--unrecorded makes no log that a backup could follow, and ft-log has this side as {role:?}: give ft-log --alone"
        )));
    }
    let mut ports: Vec<Box<dyn Port>> = Vec::new();
    for gate in gates {
        let (path, kind) = match gate.device() {
            name if name.starts_with("blk") => (&args.blk, Kind::BLOCK),
            name if name.starts_with("net") => (&args.net, Kind::NET),
            name => {
                return Err(Error::environment(format!(
                    "ft-log has a device '{name}' that is neither blk nor net: check its --devices"
                )));
            }
        };
        ports.push(Box::new(GatedPort::connect(
            path,
            kind,
            gate,
            Arc::clone(&machine.ram),
        )?));
    }
    let timeline: Box<dyn Timeline> = if role == Role::Replaying || role == Role::GoingLive {
        Box::new(Replayer::new(
            Online::new(replay, Arc::clone(&region), log),
            Some(console),
        ))
    } else {
        events.emit("live", json!({"generation": region.generation().0, "exits": 0}));
        let recorder = Recorder::new(log, Arc::clone(&region), console, vec![0; ports.len()], 0);
        Box::new(match args.unrecorded {
            false => recorder,
            true => recorder.unrecorded(),
        })
    };
    tracing::info!("VM '{}': {role:?}", args.vm);
    let live_events = args.events.clone();
    let on_live = Box::new(
        move |generation: ft_protocol::Generation, position: &ft_protocol::Position| {
            tracing::info!("live in generation {generation} at exit {}", position.exits);
            if let Ok(mut events) = Events::open("ft-vcpu-shim", live_events.as_deref()) {
                events.emit("live", json!({"generation": generation.0, "exits": position.exits}));
            }
        },
    );
    let reports = Reports::new(args, Arc::clone(&region));
    let result = machine.power_on(ports, timeline, on_live).and_then(|mut execution| {
        execution.set_patience(Duration::from_millis(args.patience_ms));
        if args.unrecorded {
            execution.set_clock(Box::new(Unrecorded));
        }
        let asleep_events = args.events.clone();
        execution.set_on_asleep(Box::new(move |what| {
            tracing::warn!("{what}");
            if let Ok(mut events) = Events::open("ft-vcpu-shim", asleep_events.as_deref()) {
                events.emit("asleep", json!({"what": what}));
            }
        }));
        let end = run_to_end(&mut execution, &reports);
        if let Err(Error::Diverged(divergence)) = &end {
            events.emit("diverged", reports.diverged(divergence, &execution));
        }
        let end = end?;
        report_end(&execution, end);
        Ok(end)
    });
    match result {
        Ok(end) => {
            events.emit("power_off", json!({"reset": end == End::Reset}));
            Ok(())
        }
        Err(error) => {
            // An operator reads one cause: where ft-log ended the replica, its log has it.
            if !matches!(error, Error::Ended(_)) {
                failing.store(true, Ordering::Release);
                report_failure(&mut stream, &error.to_string());
            }
            Err(error)
        }
    }
}

/// Runs to the end, and notes it when this side loses its backup.
fn run_to_end(execution: &mut Execution, reports: &Reports) -> Result<End, Error> {
    execution.start()?;
    let mut protected = false;
    loop {
        if let Step::End(end) = execution.step()? {
            return Ok(end);
        }
        let role = reports.region.role();
        if protected && role == Role::Live {
            reports.unprotected(execution);
        }
        protected = role == Role::Recording || (protected && role == Role::Arbitrating);
    }
}

/// What this side leaves behind for whoever has to explain an end.
struct Reports {
    directory: Option<PathBuf>,
    vm: String,
    region: Arc<Region>,
}

impl Reports {
    fn new(args: &RunArgs, region: Arc<Region>) -> Self {
        Self {
            directory: args.reports.clone(),
            vm: args.vm.clone(),
            region,
        }
    }

    fn file(&self, generation: u32, kind: &str) -> Option<PathBuf> {
        let directory = self.directory.as_deref()?;
        Some(report::file(directory, &self.vm, generation, kind))
    }

    /// Writes down the divergence, and gives what its event says.
    fn diverged(&self, divergence: &Divergence, execution: &Execution) -> serde_json::Value {
        let report = Report::new(divergence, execution);
        let (text, mut event) = (report.text(), report.json());
        tracing::error!("{text}");
        let generation = self.region.generation().0;
        for (kind, content) in [
            ("diverged.txt", text),
            ("diverged.json", format!("{}\n", report.file_json())),
        ] {
            let Some(path) = self.file(generation, kind) else {
                break;
            };
            match std::fs::write(&path, content) {
                Ok(()) => event["report"] = json!(path.display().to_string()),
                Err(error) => tracing::warn!("cannot write {}: {error}", path.display()),
            }
        }
        event
    }

    /// The backup is gone; if it diverged, the stops of this side tell where. Written beside the guest, which goes on.
    fn unprotected(&self, execution: &Execution) {
        // The generation in which there was a backup is the one before this side's arbitration.
        let generation = self.region.generation().0.saturating_sub(1);
        let Some(path) = self.file(generation, "stops.jsonl") else {
            return;
        };
        let history = execution.history().clone();
        let started = std::thread::Builder::new().name("stops".into()).spawn(move || {
            match report::write_stops(&history, &path) {
                Ok(()) => tracing::info!("the backup is gone; the last stops with it are in {}", path.display()),
                Err(error) => tracing::warn!("cannot write {}: {error}", path.display()),
            }
        });
        if let Err(error) = started {
            tracing::warn!("cannot start the thread that writes the last stops: {error}");
        }
    }
}

fn report_end(execution: &Execution, end: End) {
    let digests = execution.digests();
    tracing::info!(
        "the guest ended ({end:?}) at exit {}: exits {:016x} registers {:016x} outputs {:016x}",
        execution.position().exits,
        digests.exits,
        digests.registers,
        digests.outputs
    );
}

/// The first role that says what to do.
fn wait_for_role(region: &Region) -> Result<Role, Error> {
    loop {
        let ticket = region.shim_ticket();
        match region.role() {
            Role::Pairing => region.sleep_shim(ticket, Some(Duration::from_millis(500))),
            role @ (Role::Halted | Role::Off) => return Err(Ended { role }.into()),
            role => return Ok(role),
        }
    }
}

/// Ends this process with the replica, even while the guest does not exit: a thread waits for the end of ft-log's socket. While
/// this process is `failing` itself, ft-log ends the replica because of it: then the main thread's exit code is the cause.
fn watch_socket(stream: &UnixStream, region: Arc<Region>, failing: Arc<AtomicBool>) -> Result<(), Error> {
    let failed = |source| Error::environment(format!("cannot watch ft-log's socket: {source}"));
    let mut stream = stream.try_clone().map_err(failed)?;
    std::thread::Builder::new()
        .name("ft-log-watch".into())
        .spawn(move || {
            let mut byte = [0];
            while matches!(stream.read(&mut byte), Ok(count) if count > 0) {}
            if failing.load(Ordering::Acquire) {
                return;
            }
            match region.role() {
                // The main thread sees this role itself and ends with success.
                Role::Off => {}
                Role::Halted => {
                    eprintln!("ft-vcpu-shim: halted: ft-log ended this replica, its log says why");
                    std::process::exit(4);
                }
                _ => {
                    eprintln!("ft-vcpu-shim: ft-log is gone, so this replica is over");
                    std::process::exit(6);
                }
            }
        })
        .map_err(failed)?;
    Ok(())
}
