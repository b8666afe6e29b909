//! The network daemon next to DPDK's testpmd, and protected next to alone: one guest's driver without a VM, in turns.
//!
//! ```text
//!  testpmd, net_virtio_user ──vhost-user──► ours, or testpmd net_vhost + net_tap ──► TAP       frames/s the TAP took
//!                                           the same with engine `device`: two ft-logs, disks and cards on loopback
//!  this program ──UDP──► TAP ──► daemon ──► testpmd turns it round ──► daemon ──► TAP          requests/s, latency
//! ```

mod backend;
mod load;
mod testpmd;

use std::net::Ipv4Addr;
use std::path::Path;

use self::backend::{Backend, GUEST_MAC, TAP, TAP_BACKUP, Which};
use self::load::{GUEST, HOST, REQUEST_BYTES, REQUESTS};
use super::log::peer::Wire;
use super::row::Row;
use super::stats;
use crate::error::{HarnessError, IoContext};
use crate::netns::Namespace;

pub use self::backend::Programs;

/// Sizes of frames, without their checksums.
const FRAME_BYTES: [usize; 2] = [64, 1500];

/// Measures every row; `only` names those that are wanted.
///
/// # Errors
/// When a process does not start, or ends early, or a request has no answer.
pub fn rows(
    programs: &Programs,
    directory: &Path,
    rounds: u8,
    only: Option<&str>,
    mut row: impl FnMut(Row) + Send,
) -> Result<(), HarnessError> {
    let network = Namespace::new("bench")?;
    network.ip(&format!(
        "tuntap add {TAP} mode tap\n\
         tuntap add {TAP_BACKUP} mode tap\n\
         link set {TAP} up\n\
         link set {TAP_BACKUP} up\n\
         address add {HOST}/24 dev {TAP}\n\
         neighbour add {GUEST} lladdr {GUEST_MAC} dev {TAP}"
    ))?;
    let bench = Bench {
        programs,
        directory,
        rounds,
        network: &network,
    };
    let is_wanted = |name: &str| only.is_none_or(|only| name.contains(only));
    // Processes that this thread starts are in the namespace.
    let measured = network.run(|| {
        Ok((|| {
            for (kind, ours, peer, peer_is) in [
                (
                    "unprotected net transmit",
                    Which::Ours,
                    Which::Peer,
                    "testpmd, net_vhost and net_tap",
                ),
                (
                    "protected bulk net transmit",
                    Which::Protected,
                    Which::Ours,
                    "the same daemon alone; engine device, both hosts on this one",
                ),
            ] {
                for bytes in FRAME_BYTES {
                    let name = format!("{kind}, {bytes} B frames");
                    if is_wanted(&name) {
                        bench.transmit(&name, bytes, [ours, peer], peer_is, &mut row)?;
                    }
                }
            }
            if is_wanted("protected request-response") {
                bench.requests(&mut row)?;
            }
            Ok(())
        })())
    });
    measured.context(|| "enter the bench's network".to_owned())?
}

/// What all measurements need.
#[derive(Clone, Copy, Debug)]
struct Bench<'a> {
    programs: &'a Programs,
    directory: &'a Path,
    rounds: u8,
    network: &'a Namespace,
}

impl Bench<'_> {
    fn transmit(
        &self,
        name: &str,
        bytes: usize,
        which: [Which; 2],
        peer_is: &str,
        row: &mut impl FnMut(Row),
    ) -> Result<(), HarnessError> {
        let mut measured = [Vec::new(), Vec::new()];
        for _ in 0..self.rounds {
            for (which, into) in which.into_iter().zip(&mut measured) {
                let mut backend = Backend::start(self.programs, which, self.directory)?;
                into.push(load::transmit(&mut backend, self.directory, bytes)?);
            }
        }
        let conditions = format!(
            "peer: {peer_is}; guest: testpmd net_virtio_user, 1 queue; as the TAP counts; {} rounds in turns, ours {}, peer {}",
            self.rounds,
            stats::range(&measured[0]),
            stats::range(&measured[1])
        );
        let [ours, peer] = measured.map(|values| stats::median(&values));
        row(Row::new(name, ours, peer, "frames/s", conditions));
        let megabits = |frames: f64| frames * bytes as f64 * 8.0 / 1e6;
        row(Row::new(
            format!("{name}, throughput"),
            megabits(ours),
            megabits(peer),
            "Mbit/s",
            "the row before in bits".to_owned(),
        ));
        Ok(())
    }

    fn requests(&self, row: &mut impl FnMut(Row)) -> Result<(), HarnessError> {
        let loopback = Ipv4Addr::LOCALHOST;
        let channel = Wire {
            name: "loopback",
            a: (self.network, loopback),
            b: (self.network, loopback),
        };
        // Of each round: the mean and the median of requests, protected and alone, and of the channel's echo.
        let (mut means, mut medians) = ([const { Vec::new() }; 3], [const { Vec::new() }; 3]);
        for _ in 0..self.rounds {
            let start = |which| Backend::start(self.programs, which, self.directory);
            let mut backend = start(Which::Protected)?;
            let (protected, guest) = load::requests_us(&mut backend, self.directory)?;
            // A guest ends before its backend.
            drop(guest);
            drop(backend);
            let mut backend = start(Which::Ours)?;
            let (alone, guest) = load::requests_us(&mut backend, self.directory)?;
            // While a guest polls, as in the other two: processors that sleep wake up slowly.
            let echo = channel
                .echo_us(REQUESTS, REQUEST_BYTES)
                .context(|| "echo over loopback".to_owned())?;
            drop(guest);
            for (at, times) in [protected, alone, echo].into_iter().enumerate() {
                means[at].push(times.iter().sum::<f64>() / times.len() as f64);
                medians[at].push(stats::median(&times));
            }
        }
        let conditions = format!(
            "peer: the same daemon alone; engine device, both hosts on this one; UDP of {REQUEST_BYTES} bytes, 1 in flight, {REQUESTS} a round, \
             {} rounds in turns, medians of rounds in us: protected {}, alone {}, TCP echo {}",
            self.rounds,
            stats::range(&medians[0]),
            stats::range(&medians[1]),
            stats::range(&medians[2])
        );
        let rate = |microseconds: f64| 1e6 / microseconds;
        let [protected, alone, echo] = means.map(|values| stats::median(&values));
        let name = "protected request-response net";
        row(Row::new(name, rate(protected), rate(alone), "requests/s", conditions));
        if protected > echo {
            row(Row::new(
                format!("{name}, less a round trip"),
                rate(protected - echo),
                rate(alone),
                "requests/s",
                format!("a TCP echo over loopback, {echo:.1} us (mean), taken off each protected request"),
            ));
        } else {
            eprintln!("ft-bench: no row less a round trip: an echo took longer than a protected request");
        }
        let [protected, alone, echo] = medians.map(|values| stats::median(&values));
        row(Row::new(
            format!("{name}, latency added"),
            protected - alone,
            echo,
            "us",
            format!("p50 protected {protected:.1} less alone {alone:.1}; peer: p50 of a TCP echo over loopback"),
        ));
        Ok(())
    }
}
