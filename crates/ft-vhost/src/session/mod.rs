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
    os::unix::net::{UnixListener, UnixStream},
    sync::{Arc, Mutex},
};

use tracing::{debug, error, info, warn};
use vhost::vhost_user::{BackendReqHandler, Error};

mod coming;
mod commands;
mod config;
mod handler;
pub mod listener;
pub mod memory;
pub mod operator;

pub use commands::{Answer, Command, CommandReceiver, CommandSender, QueueCommand, Reply, SharedCommand, channel};
pub use config::ConfigSpace;
pub use listener::{Frontends, ListenError, Listener, Source};

/// What the control thread tells a frontend about the device.
#[derive(Clone, Debug)]
pub struct Description {
    /// Virtio feature bits.
    pub features: u64,
    /// Configuration space.
    pub config: ConfigSpace,
    /// Queues.
    pub queues: u16,
    /// Entries a queue may have.
    pub queue_size_max: u16,
    /// Whether it can take up the requests of a killed predecessor.
    pub tracks_inflight: bool,
    /// Whether the VM may migrate and its disk change under it: not one that is protected.
    pub alone: bool,
    /// It is a network device: the frontend says its MTU, and when to announce it.
    pub network: bool,
    /// Whether the frontend may add and take memory while queues run: any but the shim.
    pub adds_memory: bool,
}

/// Serves frontends one after the other: for ever, or the one that is connected already.
pub fn serve(frontends: Accepting, description: &Description, commands: &Arc<CommandSender>) {
    let accept = match frontends {
        Accepting::From(listener) => listener,
        Accepting::Only(stream) => {
            let left =
                serve_one(stream, description, commands).and_then(|()| commands.shared(SharedCommand::Close).map(drop));
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
        if let Err(reason) = serve_one(stream, description, commands) {
            debug!(reason, "no more frontends");
            return;
        }
    }
}

/// Serves one frontend until it leaves.
fn serve_one(stream: UnixStream, description: &Description, commands: &Arc<CommandSender>) -> Result<(), String> {
    debug!("a frontend connected");
    let mut peeked = stream.try_clone().map_err(|error| error.to_string())?;
    let handler = handler::Handler::new(description.clone(), Arc::clone(commands));
    let handler = Arc::new(Mutex::new(handler));
    let mut server = BackendReqHandler::from_stream(stream, Arc::clone(&handler));
    let mut spoke = false;
    let end = loop {
        let coming = coming::Coming::peek(&peeked);
        if let (true, Some(coming)) = (description.network, &coming) {
            match coming.serve_network(&mut peeked, &handler, commands) {
                Ok(true) => {
                    spoke = true;
                    continue;
                }
                Ok(false) => {}
                Err(error) => break Error::SocketError(error),
            }
        }
        let channel = coming.and_then(config::coming_channel);
        match server.handle_request() {
            Ok(()) => spoke = true,
            Err(error) => break error,
        }
        if channel.is_some() {
            description.config.listen(channel);
        }
    };
    description.config.listen(None);
    // First the device: whoever reads that the frontend left may rely on it, and end the daemon in good order.
    let left = commands.shared(SharedCommand::Left).map(drop);
    match end {
        Error::Disconnected if !spoke => debug!("a frontend left without a word"),
        Error::Disconnected => info!("the frontend left"),
        error => warn!(%error, "the frontend is dropped"),
    }
    left
}

/// The control thread's handle on [`Frontends`].
#[derive(Debug)]
pub enum Accepting {
    /// Those that connect.
    From(UnixListener),
    /// This one.
    Only(UnixStream),
}
