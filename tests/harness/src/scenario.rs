//! One run from power-on to judgement.
//!
//! ```text
//!  build the network ─► start both hosts' daemons ─► paired ─► guest listens ─► witness connects and appends
//!                                                                                        │ the fault's moment
//!  judge ◄─ survivor's disk ◄─ processes end ◄─ witness audits, powers off ◄─ goes on ◄──┘ fault
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::capture::{Capture, Seen};
use crate::clock::{ms, now_ns};
use crate::download::{Download, Downloading};
use crate::error::{HarnessError, IoContext};
use crate::events::{CONSOLE, Event};
use crate::faults::{self, Expected, Fault, FaultPlan, Moment};
use crate::guest::{Guest, LEDGER_BYTES, Linux, WORK_DONE, Work};
use crate::judge::{Connection, Transcript, judge};
use crate::ledger::{DiskImage, SECTOR};
use crate::offline::{self, Replayed};
use crate::output_rule;
use crate::pair::{Pair, PairSetup};
use crate::process::{EXITED, Exit};
use crate::report::{Report, Timeline, since};
use crate::roles::{PROCESSES, Roles};
use crate::topology::{GUEST, GUEST_HTTP, HostId};
use crate::witness::{Plan, Witness};

/// Records that fit on a run's disk: sector 0 is the header.
pub const RECORDS_MAX: u64 = LEDGER_BYTES / SECTOR as u64 - 1;

/// What to run.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Where the four daemons are.
    pub bin_dir: PathBuf,
    /// The guest.
    pub guest: Guest,
    /// Seeds payloads and the fault's moment.
    pub seed: u64,
    /// Records to append.
    pub records: u64,
    /// Records a second.
    pub rate: u32,
    /// What is done to the pair.
    pub plan: FaultPlan,
    /// More arguments for both ft-logs (heartbeat timers).
    pub ft_log_arguments: Vec<String>,
    /// More arguments for both shims (patience).
    pub shim_arguments: Vec<String>,
    /// Execute what host A recorded again, twice, when the run is over, and compare every stop.
    pub replay: bool,
    /// Capture at the switch, and hold it against the journal of host B, which must be left in the end.
    pub capture: bool,
    /// Tell on stderr what is going on.
    pub verbose: bool,
}

impl Setup {
    /// The part that concerns the daemons.
    #[must_use]
    pub fn pair(&self) -> PairSetup {
        let crash = match &self.plan {
            FaultPlan::CrashPoint { host, at } => Some((*host, at.clone())),
            FaultPlan::At(..) | FaultPlan::CutThenKill { .. } => None,
        };
        PairSetup {
            bin_dir: self.bin_dir.clone(),
            guest: self.guest.clone(),
            ft_log_arguments: self.ft_log_arguments.clone(),
            shim_arguments: self.shim_arguments.clone(),
            crash,
        }
    }

    fn say(&self, what: &str) {
        if self.verbose {
            eprintln!("[{:.3}] {what}", ms(now_ns()) / 1e3);
        }
    }
}

/// What a run showed.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The figures.
    pub report: Report,
    /// The fault's moments.
    pub timeline: Timeline,
    /// Everything the witness saw.
    pub transcript: Transcript,
    /// Everything the processes said.
    pub events: Vec<Event>,
    /// What left against what was committed, where that was captured.
    pub output_rule: Option<output_rule::Verdict>,
}

/// Carries a run out in `directory`, which must be empty.
///
/// # Errors
/// When the run cannot be carried out; what it shows is never an error.
pub fn run(setup: &Setup, directory: &Path) -> Result<Outcome, HarnessError> {
    let patience = setup.guest.patience();
    let deadline = Instant::now() + patience.boot;
    let mut pair = Pair::new(setup.pair(), directory)?;
    let capture = setup.capture.then(|| Capture::start(pair.topology())).transpose()?;
    pair.start(deadline)?;
    setup.say("everything is started");
    pair.wait_for_pairing(deadline)?;
    setup.say("paired");
    pair.wait_for_guest(deadline)?;
    let stream = Witness::connect(pair.topology().client(), GUEST.into(), deadline)?;
    let plan = Plan {
        seed: setup.seed,
        records: setup.records,
        rate: setup.rate,
        patience: patience.answer,
    };
    let mut download = download(setup, &pair)?;
    let downloaded = download.as_ref().map(Downloading::end);
    let worked = works_to_the_end(setup).then(|| pair.events().until(patience.boot, says_that_it_worked));
    let witness = Witness::start_and_hold(stream, plan, move || {
        downloaded.into_iter().for_each(|wait| wait());
        worked.into_iter().for_each(|wait| wait());
    })?;
    setup.say("the witness is connected");
    let fault_ns = inject(setup, &pair, &witness, download.as_mut())?;
    let transcript = witness.finish();
    setup.say("the witness is done");
    let download = download.map(Downloading::finish);
    if transcript.connection == Connection::Intact {
        wait_for_the_end(setup, &pair);
    }
    let seen = capture.map(Capture::finish).transpose()?;
    judge_run(setup, &pair, transcript, download, seen.as_deref(), fault_ns)
}

/// Whether the guest has work that ends by itself and that nothing will interrupt: it is not powered off before.
fn works_to_the_end(setup: &Setup) -> bool {
    let Guest::Linux(linux) = &setup.guest else {
        return false;
    };
    matches!(linux.work, Some(Work::Everything { .. })) && setup.plan.expected() == Expected::Both
}

fn says_that_it_worked(event: &Event) -> bool {
    event.source == CONSOLE && event.text("text").is_some_and(|text| text.contains(WORK_DONE))
}

/// Starts the download that is to be in progress at the fault, if the guest can serve one.
fn download(setup: &Setup, pair: &Pair) -> Result<Option<Downloading>, HarnessError> {
    if !setup.guest.has_http() {
        return Ok(None);
    }
    let duration = Duration::from_secs(setup.records).div_f64(f64::from(setup.rate));
    let patience = setup.guest.patience().answer;
    let started = Downloading::start(pair.topology().client(), GUEST_HTTP.into(), duration, patience)?;
    setup.say("the download is in progress");
    Ok(Some(started))
}

/// Waits for the fault's moment and lets it strike. Returns when it did, if the plan has a moment at all.
fn inject(
    setup: &Setup,
    pair: &Pair,
    witness: &Witness,
    download: Option<&mut Downloading>,
) -> Result<Option<u64>, HarnessError> {
    let reach = |moment: &Moment| {
        let reached = witness.wait_until(|progress| progress.answered >= moment.answers);
        if reached {
            // Not waiting for anything: this is the moment the seed chose.
            thread::sleep(moment.offset);
            setup.say("the fault strikes");
        }
        reached
    };
    let kill = |id| faults::kill_host(pair.topology(), id, pair.host(id));
    match &setup.plan {
        FaultPlan::At(fault, moment) if *fault != Fault::None && reach(moment) => {
            if let Some(download) = download {
                download.note_fault()?;
            }
            match fault {
                Fault::KillPrimary => kill(HostId::A).map(Some),
                Fault::KillBackup => kill(HostId::B).map(Some),
                Fault::Partition | Fault::None => faults::partition(pair.topology()).map(Some),
            }
        }
        FaultPlan::CutThenKill { moment, requests } if reach(moment) => {
            let fault_ns = faults::partition(pair.topology())?;
            let enough = witness.progress().sent + requests;
            // When all records are sent before that, the primary dies at the end of them.
            let _ = witness.wait_until(|progress| progress.sent >= enough || progress.sent == setup.records);
            kill(HostId::A)?;
            Ok(Some(fault_ns))
        }
        FaultPlan::At(..) | FaultPlan::CutThenKill { .. } | FaultPlan::CrashPoint { .. } => Ok(None),
    }
}

/// Everything that is expected to end gets the time to do so; whether it did is for [`Roles`] to say.
fn wait_for_the_end(setup: &Setup, pair: &Pair) {
    let ends = |events: &[Event]| {
        let roles = Roles::new(events, 0);
        let ended = |id: &HostId| PROCESSES.iter().all(|process| roles.exit(*id, process).is_some());
        let all = match setup.plan.expected() {
            Expected::Both | Expected::One => HostId::BOTH.iter().all(ended),
            Expected::Only(survivor) => ended(&survivor),
        };
        all.then_some(())
    };
    let waited = pair
        .events()
        .wait(Instant::now() + setup.guest.patience().end, ends, |_| None);
    setup.say(if waited.is_ok() {
        "everything has ended"
    } else {
        "not everything has ended"
    });
}

fn judge_run(
    setup: &Setup,
    pair: &Pair,
    transcript: Transcript,
    download: Option<Download>,
    seen: Option<&[Seen]>,
    fault_ns: Option<u64>,
) -> Result<Outcome, HarnessError> {
    let plan = &setup.plan;
    let events = pair.events().all();
    let fault_ns = fault_ns.or_else(|| {
        // A crash point kills with a signal; an orderly end is not the fault.
        let died = |event: &&Event| {
            Some(event.host) == plan.victim()
                && event.name == EXITED
                && matches!(Exit::from_event(event), Some(Exit::Signal(_)))
        };
        events.iter().find(died).map(|event| event.t_ns)
    });
    let roles = Roles::new(&events, since(plan, fault_ns));
    let mut problems = roles.problems(plan.expected());
    match plan {
        FaultPlan::CrashPoint { host, at } if fault_ns.is_none() => {
            problems = vec![format!("host {host} never reached the crash point {at}")];
        }
        FaultPlan::At(fault, _) if *fault != Fault::None && fault_ns.is_none() => {
            problems.insert(0, "the run ended before the fault's moment".to_owned());
        }
        _ => {}
    }
    let survivor = roles.survivor(plan.expected());
    let image = read_image(pair, survivor)?;
    let ledger = &image[..usize::try_from(LEDGER_BYTES).expect("16 MiB")];
    let disk = DiskImage::read(ledger).map_err(|source| HarnessError::Ledger {
        what: format!("disk image of host {survivor}"),
        source,
    })?;
    if plan.expected() == Expected::Both && read_image(pair, survivor.peer())? != image {
        problems.push("after an orderly end the two hosts' disk images differ".to_owned());
    }
    let verdict = judge(&transcript, &disk);
    if setup.replay {
        setup.say("host A's journal is executed again");
        match offline::replay(pair, HostId::A)? {
            Replayed::Same(said) => setup.say(&said),
            Replayed::Different(said) => problems.push(format!("host A's journal executes differently: {said}")),
        }
    }
    let output_rule = match seen {
        Some(seen) => Some(output_rule::judge(seen, &offline::frames(pair, HostId::B)?)),
        None => None,
    };
    problems.extend(output_rule.iter().flat_map(output_rule::Verdict::problems));
    if let Guest::Linux(Linux { work: Some(work), .. }) = &setup.guest {
        let console = events.iter().filter(|event| event.source == CONSOLE);
        let lines = console.filter_map(|event| event.fields.get("text")?.as_str());
        problems.extend(work.problems(lines, plan.expected() == Expected::Both));
    }
    problems.extend(download.iter().flat_map(|download| download.problems.clone()));
    let timeline = Timeline::new(&events, plan, fault_ns);
    let mut report = Report::new(plan, setup.seed, &transcript, &verdict, &problems, &events, &timeline);
    report.guest = setup.guest.name();
    report.download = download;
    Ok(Outcome {
        report,
        timeline,
        transcript,
        events,
        output_rule,
    })
}

fn read_image(pair: &Pair, id: HostId) -> Result<Vec<u8>, HarnessError> {
    let path = pair.image(id);
    fs::read(&path).context(|| format!("read {}", path.display()))
}
