//! Engine `device`: a device of a stock VMM that is replicated. From joining ft-log to serving, and to the end.
//!
//! ```text
//!  join (the device's seat and the shim's) ─► follow ─┬─ Recording: first entry committed ─► socket opens ─► serve, replicate
//!                                                     └─ Live: socket opens ─► serve; there is no backup
//! ```
//! Until it is to serve, a daemon has no socket: nobody can start the VM on the wrong host.

use ft_client::{
    events::{Events, wall_ns},
    handshake::{self, EngineSession, JoinError},
};
use tracing::info;

use crate::{
    daemon::{Doors, Membership, Options, Signals},
    device::{
        Device, Part,
        alone::Alone,
        follow::{Followed, follow},
        mirror::Link,
    },
    exit::End,
    service::Service,
    session::{CommandReceiver, CommandSender, Description},
};

/// What the daemon is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) options: Options,
    pub(crate) doors: Doors,
    pub(crate) description: Description,
    pub(crate) sender: CommandSender,
    pub(crate) commands: CommandReceiver,
}

/// Serves until the end.
pub(crate) fn serve(
    parts: Parts,
    membership: &Membership,
    mut device: impl Device,
    signals: Signals,
    events: Events,
    fingerprint: &[u8; 32],
) -> Result<(), End> {
    let Parts {
        options,
        doors,
        description,
        sender,
        commands,
    } = parts;
    // That they can be opened is known from here on.
    let doors = doors.shut();
    let (place, fingerprint) = (membership.clone(), *fingerprint);
    device.take_part(Part::Joins)?;
    let join = move || handshake::join_engine(&place.ft_log, &place.vm, &place.device, &fingerprint);
    let EngineSession { device: mut seat, shim } = match signals.unless_asked_to_end(join)? {
        Some(Ok(joined)) => joined,
        Some(Err(error)) => {
            // Nothing else says that no pair was made of it.
            if matches!(error, JoinError::Connect { .. } | JoinError::Refused(_)) {
                device.take_part(Part::NeverJoined)?;
            }
            return Err(End::environment(error));
        }
        None => return Ok(()),
    };
    let service = Service::from_environment();
    service.ready();
    info!("joined; the socket opens when this side is to serve");
    // The end of either of its sockets is the end of the replica for ft-log: this one stays until the process ends.
    let _seat_of_the_shim = shim.stream.try_clone().map_err(End::environment)?;
    let role = match follow(&mut device, shim, &signals) {
        Ok(Followed::Serve(role)) => role,
        Ok(Followed::Over) => return Ok(()),
        Err(end) => {
            if matches!(end, End::Replica(_) | End::Environment(_)) {
                handshake::report_failure(&mut seat.stream, &end.to_string());
            }
            return Err(end);
        }
    };
    let open = move || {
        let doors = doors.map_or_else(|| Doors::open(&options), Ok)?;
        doors.let_in(description, sender)?;
        info!(socket = %options.source, ?role, "listening");
        Ok(doors)
    };
    let (link, mirror) = Link::begin(seat, role, fingerprint, wall_ns(), Box::new(open));
    device.mirror(mirror)?;
    let signals = std::sync::Arc::new(signals);
    let never = vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).map_err(End::environment)?;
    Alone::new(device, commands, signals, never, events, service)?
        .linked(link)
        .run()
}
