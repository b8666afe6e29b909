//! The backup's half of engine `device` for a device without a state of its own: a network card. It waits until this side is to serve.
//!
//! ```text
//!  Pairing ─► Replaying ─► GoingLive ─► Live: serve       the disk's daemon follows the log; nothing of it concerns the card
//!     └─────► Recording: serve                            Off, asked to end: the end
//! ```

use std::os::fd::AsRawFd;

use ft_client::handshake::DeviceSession;
use ft_protocol::Role;
use tracing::info;

use super::{Device, Part, Uring, follow::Followed};
use crate::{daemon::Signals, exit::End};

const TOKEN_SIGNALS: u64 = 0;
const TOKEN_LOG: u64 = 1;
const TOKEN_ROLE: u64 = 2;

/// Waits until this side is to serve.
///
/// # Errors
/// [`End`].
pub(crate) fn attend(device: &mut impl Device, session: &DeviceSession, signals: &Signals) -> Result<Followed, End> {
    let mut io = Uring::new().map_err(End::environment)?;
    io.poll(signals.as_raw_fd(), TOKEN_SIGNALS);
    io.poll(session.stream.as_raw_fd(), TOKEN_LOG);
    io.poll(session.commit_event.as_raw_fd(), TOKEN_ROLE);
    let mut told = Role::Pairing;
    // What is rung after the role was looked at wakes.
    loop {
        let role = session.region.role();
        if std::mem::replace(&mut told, role) != role {
            info!(?role, "waiting");
        }
        match role {
            Role::Recording => return Ok(Followed::Serve(role)),
            Role::Live => {
                device.take_part(Part::Last)?;
                return Ok(Followed::Serve(role));
            }
            Role::Halted => return Err(End::Halted),
            Role::Off => return Ok(Followed::Over),
            _ => {}
        }
        io.wait(None);
        while let Some(completion) = io.next_completion() {
            match completion.token {
                TOKEN_SIGNALS => {
                    info!("asked to end: this ends the replica");
                    return Ok(Followed::Over);
                }
                // It says nothing after its welcome: readable is its end, which may have a reason.
                TOKEN_LOG => {
                    return match session.region.role() {
                        Role::Off => Ok(Followed::Over),
                        Role::Halted => Err(End::Halted),
                        _ => Err(End::LogGone),
                    };
                }
                _ => {
                    let _ = session.commit_event.read();
                    io.poll(session.commit_event.as_raw_fd(), TOKEN_ROLE);
                }
            }
        }
    }
}
