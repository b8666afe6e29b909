//! Conventions of a daemon: the log goes to stderr, SIGTERM and SIGINT end it in order.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use ft_client::{events::Events, handshake};
use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use tracing::{error, info};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    device::{Device, Uring, alone::Alone, gated::Gated},
    engine,
    exit::{End, Status},
    sandbox::Sandbox,
    service::Service,
    session::{self, CommandReceiver, CommandSender, ConfigSpace, Description, Frontends, Listener, Source, operator},
    shared_file,
};

const TOKEN_DONE: u64 = 0;
const TOKEN_ASKED: u64 = 1;

/// Readable once the daemon is asked to end.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Takes SIGTERM and SIGINT over. Call it before any thread starts.
    ///
    /// # Errors
    /// As signalfd(2).
    pub fn take() -> io::Result<Self> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        set.thread_block()?;
        Ok(Self(SignalFd::with_flags(
            &set,
            SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
        )?))
    }
}

impl Signals {
    /// Runs something that may block for long, in a thread of its own; `None` if the daemon is asked to end before it is done.
    pub(crate) fn unless_asked_to_end<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Option<T>, End> {
        let done = EventFd::new(EFD_NONBLOCK).map_err(End::environment)?;
        let bell = done.try_clone().map_err(End::environment)?;
        let thread = std::thread::spawn(move || {
            let result = work();
            let _ = bell.write(1);
            result
        });
        let mut io = Uring::new().map_err(End::environment)?;
        io.poll(done.as_raw_fd(), TOKEN_DONE);
        io.poll(self.as_raw_fd(), TOKEN_ASKED);
        loop {
            io.wait(None);
            match io.next_completion().map(|completion| completion.token) {
                None => {}
                Some(TOKEN_ASKED) => return Ok(None),
                Some(_) => return Ok(Some(thread.join().expect("a panic aborts the process"))),
            }
        }
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Sets up the log, runs the daemon and says how it ended.
pub fn main(run: impl FnOnce() -> Result<(), End>) -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    match run() {
        Ok(()) => {
            info!("ended in order");
            Status::Ordinary.into()
        }
        Err(end) => {
            error!("{end}");
            end.status().into()
        }
    }
}

/// How the backup stays equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// The VM is run by ft-vcpu-shim, and its backup executes the same.
    #[default]
    Lockstep,
    /// The VM is run by a stock VMM; what its device changes is replicated, and it restarts on the backup.
    Device,
}

/// Membership of a fault-tolerant VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// ft-log's socket.
    pub ft_log: PathBuf,
    /// Name of the VM.
    pub vm: String,
    /// Name of this device in it.
    pub device: String,
    /// How the backup stays equal.
    pub engine: Engine,
}

/// What both daemons are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where frontends come from.
    pub source: Source,
    /// The VM it belongs to; alone without.
    pub membership: Option<Membership>,
    /// Where events go.
    pub events: Option<PathBuf>,
    /// Where operators' commands come from.
    pub control: Option<PathBuf>,
    /// Largest queue a driver may configure.
    pub queue_size: u16,
    /// What the daemon confines itself to.
    pub sandbox: Option<Sandbox>,
}

/// Makes the device, or the part of it that one of several threads has: all parts know all queues, and each serves its own.
pub trait MakeDevice: Fn() -> Result<Self::Device, End> + Send + Sync + 'static {
    /// What it makes.
    type Device: Device;
}

impl<D: Device, F: Fn() -> Result<D, End> + Send + Sync + 'static> MakeDevice for F {
    type Device = D;
}

/// Serves a device until the end, alone with `threads` threads. `fingerprint` names what must be equal on both hosts; it is asked for
/// only where there are two.
///
/// # Errors
/// [`End`].
pub fn serve(
    options: &Options,
    source: &'static str,
    threads: usize,
    make: impl MakeDevice,
    signals: Signals,
    fingerprint: impl FnOnce() -> Result<[u8; 32], End>,
) -> Result<(), End> {
    let events = Events::open(source, options.events.as_deref()).map_err(|error| {
        let path = options.events.as_deref().unwrap_or(Path::new("")).display();
        End::environment(format!("cannot open --events {path}: {error}"))
    })?;
    shared_file::end_clearly_on_sigbus().map_err(End::environment)?;
    let doors = Doors::open(options)?;
    if let Some(sandbox) = &options.sandbox {
        sandbox.enter()?;
    }
    let mut device = make()?;
    let config = ConfigSpace::new(device.config());
    let guest = device.guest();
    let alone = options.membership.is_none();
    // Nobody replays what a frontend does.
    let is_free = options
        .membership
        .as_ref()
        .is_none_or(|membership| membership.engine == Engine::Device);
    let description = Description {
        features: guest.features(),
        config,
        queues: guest.queue_count(),
        queue_size_max: options.queue_size,
        tracks_inflight: alone && guest.tracks_inflight(),
        alone,
        network: is_free && device.is_network(),
        adds_memory: is_free,
    };
    let (sender, receivers) = session::channel(if alone { threads } else { 1 }).map_err(End::environment)?;
    if let Some(membership) = &options.membership
        && membership.engine == Engine::Device
    {
        let parts = engine::Parts {
            options: options.clone(),
            // That they can be opened is known from here on.
            doors: doors.shut(),
            description,
            sender,
            commands: receivers.into_iter().next().expect("there is one thread"),
        };
        return engine::serve(parts, membership, device, signals, events, &fingerprint()?);
    }
    doors.let_in(description, sender)?;
    info!(socket = %options.source, "listening");
    let service = Service::from_environment();
    service.ready();
    match &options.membership {
        None => serve_alone(source, device, make, receivers, signals, events, service),
        Some(Membership {
            ft_log,
            vm,
            device: name,
            ..
        }) => {
            let fingerprint = fingerprint()?;
            let (ft_log, vm, name) = (ft_log.clone(), vm.clone(), name.clone());
            match signals.unless_asked_to_end(move || handshake::join_device(&ft_log, &vm, &name, &fingerprint))? {
                None => Ok(()),
                Some(joined) => {
                    let joined = joined.map_err(End::environment)?;
                    let commands = receivers.into_iter().next().expect("there is one thread");
                    Gated::new(device, joined, commands, signals, events, service)?.run()
                }
            }
        }
    }
}

/// Where frontends and operators come from; the socket files go with it.
#[derive(Debug)]
pub(crate) struct Doors {
    frontends: Frontends,
    control: Option<Listener>,
}

impl Doors {
    /// Takes what the operator named.
    pub(crate) fn open(options: &Options) -> Result<Self, End> {
        let frontends = Frontends::open(&options.source).map_err(End::environment)?;
        let control = options.control.as_deref().map(Listener::bind);
        Ok(Self {
            frontends,
            control: control.transpose().map_err(End::environment)?,
        })
    }

    /// Without those that come by a path: nobody finds a socket there until [`Doors::open`]. What was inherited stays, and waits.
    pub(crate) fn shut(self) -> Option<Self> {
        self.frontends.is_inherited().then_some(self)
    }

    /// Starts the threads that talk to frontends and operators.
    pub(crate) fn let_in(&self, description: Description, sender: CommandSender) -> Result<(), End> {
        let sender = Arc::new(sender);
        if let Some(control) = &self.control {
            let listener = control.try_clone().map_err(End::environment)?;
            let (config, sender) = (description.config.clone(), Arc::clone(&sender));
            std::thread::Builder::new()
                .name("operator".into())
                .spawn(move || operator::serve(&listener, &config, &sender))
                .map_err(End::environment)?;
        }
        let accepting = self.frontends.accepting().map_err(End::environment)?;
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || session::serve(accepting, &description, &sender))
            .map_err(End::environment)?;
        Ok(())
    }
}

/// One loop for each receiver, the first one here; over when the first is.
fn serve_alone(
    source: &'static str,
    device: impl Device,
    make: impl MakeDevice,
    receivers: Vec<CommandReceiver>,
    signals: Signals,
    events: Events,
    service: Service,
) -> Result<(), End> {
    let signals = Arc::new(signals);
    let make = Arc::new(make);
    let mut receivers = receivers.into_iter();
    let commands = receivers.next().expect("there is a thread");
    let mut threads = Vec::new();
    // Rung by a thread that failed, this one included: the others end too.
    let failed = EventFd::new(EFD_NONBLOCK).map_err(End::environment)?;
    for (number, commands) in (1..).zip(receivers) {
        let (make, signals) = (Arc::clone(&make), Arc::clone(&signals));
        let (bell, failed) = (
            failed.try_clone().map_err(End::environment)?,
            failed.try_clone().map_err(End::environment)?,
        );
        let run = move || {
            let result = make().and_then(|device| {
                // The first thread speaks to the service manager, and tells of events.
                let events = Events::open(source, None).map_err(End::environment)?;
                Alone::new(device, commands, signals, failed, events, Service::silent())?.run()
            });
            if result.is_err() {
                let _ = bell.write(1);
            }
            result
        };
        let thread = std::thread::Builder::new().name(format!("io-{number}")).spawn(run);
        threads.push(thread.map_err(End::environment)?);
    }
    let bell = failed.try_clone().map_err(End::environment)?;
    let mut result = Alone::new(device, commands, signals, failed, events, service)?.run();
    if result.is_err() {
        let _ = bell.write(1);
    }
    for thread in threads {
        result = result.and(thread.join().expect("a panic aborts the process"));
    }
    result
}
