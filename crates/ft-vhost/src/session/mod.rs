//! The vhost-user conversation with a frontend.
//!
//! ```text
//!  control thread: accept ─► [handler] one message at a time ─► Command ─► bell ─► device thread
//!                                                     ◄── reply (the index a stopped queue got to) ──┘
//! ```
//! The control thread never touches guest memory or queues: it hands every change to the device thread and waits. A new
//! frontend is accepted after the last one left.

use std::{
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{Arc, Mutex, mpsc},
};

use tracing::{debug, error, info, warn};
use vhost::vhost_user::{BackendReqHandler, Error};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest_side::{QueueSetup, inflight::InflightRegion};

mod handler;
pub mod listener;
pub mod memory;

pub use listener::{Frontends, ListenError, Listener, Source};

/// What the frontend changes.
#[derive(Debug)]
pub enum Command {
    /// Guest memory.
    Memory(GuestMemoryMmap),
    /// Virtio features the driver took.
    Features(u64),
    /// Where the chains that the device holds are tracked.
    Inflight(InflightRegion),
    /// The driver writes to the configuration space.
    Config {
        /// Where.
        offset: u32,
        /// What.
        bytes: Vec<u8>,
    },
    /// A queue starts.
    Start {
        /// Its index.
        queue: u16,
        /// Its layout.
        setup: QueueSetup,
        /// Where the guest notifies.
        kick: Option<EventFd>,
        /// Where to interrupt the guest.
        call: Option<EventFd>,
        /// Where to say that the queue is broken.
        error: Option<EventFd>,
    },
    /// The interrupt of a running queue moves.
    Call {
        /// Queue.
        queue: u16,
        /// Where to.
        call: Option<EventFd>,
    },
    /// A queue stops; the answer is the index of its next available entry.
    Stop {
        /// Queue.
        queue: u16,
    },
    /// The frontend is gone.
    Left,
    /// No other frontend will come.
    Close,
}

/// Where the answer to a command goes.
#[derive(Debug)]
pub struct Reply(mpsc::SyncSender<Result<u16, String>>);

impl Reply {
    /// Answers the control thread.
    pub fn answer(self, answer: Result<u16, String>) {
        // The control thread waits for every answer; if it is gone, so is the frontend.
        let _ = self.0.send(answer);
    }
}

/// A command, and where its answer goes.
pub type Pending = (Command, Reply);

/// The control thread's end.
#[derive(Debug)]
pub struct CommandSender {
    commands: mpsc::Sender<Pending>,
    bell: EventFd,
}

/// The device thread's end.
#[derive(Debug)]
pub struct CommandReceiver {
    commands: mpsc::Receiver<Pending>,
    bell: EventFd,
}

impl CommandSender {
    fn call(&self, command: Command) -> Result<u16, String> {
        let ended = || "the device ended".to_owned();
        let (reply, answer) = mpsc::sync_channel(1);
        self.commands.send((command, Reply(reply))).map_err(|_| ended())?;
        // A bell that cannot be rung is full, and thus rung.
        let _ = self.bell.write(1);
        answer.recv().map_err(|_| ended())?
    }
}

impl CommandReceiver {
    /// Readable when a command waits.
    #[must_use]
    pub fn bell(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    /// The next command, if any.
    pub fn take(&self) -> Option<Pending> {
        if let Ok(pending) = self.commands.try_recv() {
            return Some(pending);
        }
        // Silence the bell first, look again second: a command in between rings it anew.
        let _ = self.bell.read();
        self.commands.try_recv().ok()
    }
}

/// Both ends.
///
/// # Errors
/// As eventfd(2).
pub fn channel() -> io::Result<(CommandSender, CommandReceiver)> {
    let (sender, receiver) = mpsc::channel();
    let bell = EventFd::new(EFD_NONBLOCK)?;
    Ok((
        CommandSender {
            commands: sender,
            bell: bell.try_clone()?,
        },
        CommandReceiver {
            commands: receiver,
            bell,
        },
    ))
}

/// What the control thread tells a frontend about the device.
#[derive(Clone, Debug)]
pub struct Description {
    /// Virtio feature bits.
    pub features: u64,
    /// Configuration space.
    pub config: Vec<u8>,
    /// Queues.
    pub queues: u16,
    /// Whether it can take up the requests of a killed predecessor.
    pub tracks_inflight: bool,
}

/// Serves frontends one after the other: for ever, or the one that is connected already.
pub fn serve(frontends: Accepting, description: &Description, commands: CommandSender) {
    let commands = Arc::new(commands);
    let accept = match frontends {
        Accepting::From(listener) => listener,
        Accepting::Only(stream) => {
            let left = serve_one(stream, description, &commands).and_then(|()| commands.call(Command::Close).map(drop));
            if let Err(reason) = left {
                debug!(reason, "the device ended first");
            }
            return;
        }
    };
    loop {
        let stream = match accept.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => {
                error!(%error, "no more frontends can be accepted");
                return;
            }
        };
        if let Err(reason) = serve_one(stream, description, &commands) {
            debug!(reason, "no more frontends");
            return;
        }
    }
}

/// Serves one frontend until it leaves.
fn serve_one(stream: UnixStream, description: &Description, commands: &Arc<CommandSender>) -> Result<(), String> {
    debug!("a frontend connected");
    let handler = handler::Handler::new(description.clone(), Arc::clone(commands));
    let mut server = BackendReqHandler::from_stream(stream, Arc::new(Mutex::new(handler)));
    let mut spoke = false;
    let end = loop {
        match server.handle_request() {
            Ok(()) => spoke = true,
            Err(error) => break error,
        }
    };
    match end {
        Error::Disconnected if !spoke => debug!("a frontend left without a word"),
        Error::Disconnected => info!("the frontend left"),
        error => warn!(%error, "the frontend is dropped"),
    }
    commands.call(Command::Left).map(drop)
}

/// The control thread's handle on [`Frontends`].
#[derive(Debug)]
pub enum Accepting {
    /// Those that connect.
    From(UnixListener),
    /// This one.
    Only(UnixStream),
}
