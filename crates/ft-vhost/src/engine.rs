//! Engine `device`: a device of a stock VMM that is replicated. From joining ft-log to serving, and to the end.
//!
//! ```text
//!  disk: join (its seat and the shim's) ─► follow ─┬─ Recording: first entry committed ─► socket opens ─► serve, replicate
//!  card: join (its seat) ────────────────► attend ─┴─ Live: socket opens ─► serve; there is no backup
//! ```
//! Until it is to serve, a daemon has no socket: nobody can start the VM on the wrong host.

use std::sync::Arc;

use ft_client::{
    events::{Events, wall_ns},
    handshake::{self, DeviceSession, EngineSession, JoinError, ShimSession},
};
use ft_protocol::{Body, Role};
use tracing::info;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    daemon::{Doors, Membership, Options, Signals},
    device::{
        Device, Part,
        alone::Alone,
        attend::attend,
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
    /// Those that are open all the time: nobody is accepted yet.
    pub(crate) doors: Option<Doors>,
    pub(crate) description: Description,
    pub(crate) sender: CommandSender,
    pub(crate) commands: CommandReceiver,
}

/// A side that is to serve.
struct Joined {
    seat: DeviceSession,
    role: Role,
    service: Service,
    /// The end of either of a disk's sockets is the end of the replica for ft-log: the link has both until the process ends.
    shim: Option<ShimSession>,
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
    let is_card = device.is_network();
    let joined = match is_card {
        true => join_card(&mut device, membership, &signals, *fingerprint)?,
        false => join_disk(&mut device, membership, &signals, *fingerprint)?,
    };
    let Some(Joined {
        seat,
        role,
        service,
        shim,
    }) = joined
    else {
        return Ok(());
    };
    let Parts {
        options,
        doors,
        description,
        sender,
        commands,
    } = parts;
    let open = move || {
        let doors = doors.map_or_else(|| Doors::open(&options), Ok)?;
        doors.let_in(description, sender)?;
        info!(socket = %options.source, ?role, "listening");
        Ok(doors)
    };
    let boot = Body::Boot {
        fingerprint: *fingerprint,
        wall_ns: wall_ns(),
        devices: &[],
    };
    let (link, mirror) = Link::begin(seat, shim, role, (!is_card).then_some(&boot), Box::new(open));
    device.mirror(mirror)?;
    let never = EventFd::new(EFD_NONBLOCK).map_err(End::environment)?;
    Alone::new(device, commands, Arc::new(signals), never, events, service)?
        .linked(link)
        .run()
}

/// Joins as the VM's disk and follows, until this side is to serve; `None` if the VM is over before.
fn join_disk(
    device: &mut impl Device,
    membership: &Membership,
    signals: &Signals,
    fingerprint: [u8; 32],
) -> Result<Option<Joined>, End> {
    let place = membership.clone();
    device.take_part(Part::Joins)?;
    let shape = device.shape();
    let join = move || handshake::join_engine(&place.ft_log, &place.vm, &place.device, &fingerprint, shape);
    let EngineSession { device: seat, mut shim } = match signals.unless_asked_to_end(join)? {
        Some(Ok(joined)) => joined,
        Some(Err(error)) => {
            // Nothing else says that no pair was made of it.
            if matches!(error, JoinError::Connect { .. } | JoinError::Refused(_)) {
                device.take_part(Part::NeverJoined)?;
            }
            return Err(End::environment(error));
        }
        None => return Ok(None),
    };
    let service = has_joined();
    let followed = follow(device, &mut shim, signals);
    to_serve(followed, seat, service, Some(shim))
}

/// Joins as a network card, which has no state: it waits until this side is to serve; `None` if the VM is over before.
fn join_card(
    device: &mut impl Device,
    membership: &Membership,
    signals: &Signals,
    fingerprint: [u8; 32],
) -> Result<Option<Joined>, End> {
    let place = membership.clone();
    let join = move || handshake::join_device(&place.ft_log, &place.vm, &place.device, &fingerprint);
    let Some(joined) = signals.unless_asked_to_end(join)? else {
        return Ok(None);
    };
    let seat = joined.map_err(End::environment)?;
    device.count_in(seat.counters.clone());
    let service = has_joined();
    let attended = attend(device, &seat, signals);
    to_serve(attended, seat, service, None)
}

fn has_joined() -> Service {
    let service = Service::from_environment();
    service.ready();
    info!("joined; the socket opens when this side is to serve");
    service
}

/// What waiting came to. ft-log is told where this side is the cause of its end.
fn to_serve(
    followed: Result<Followed, End>,
    mut seat: DeviceSession,
    service: Service,
    shim: Option<ShimSession>,
) -> Result<Option<Joined>, End> {
    match followed {
        Ok(Followed::Serve(role)) => Ok(Some(Joined {
            seat,
            role,
            service,
            shim,
        })),
        Ok(Followed::Over) => Ok(None),
        Err(end) => {
            if matches!(end, End::Replica(_) | End::Environment(_)) {
                handshake::report_failure(&mut seat.stream, &end.to_string());
            }
            Err(end)
        }
    }
}
