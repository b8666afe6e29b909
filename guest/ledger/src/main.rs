//! The ledger guest: a freestanding program for one vCPU, a disk, a network card and a clock.
//!
//! It keeps a chain of records on the disk and serves it over TCP. Whatever happens to the hosts below, a client that
//! knows the hash of record n can tell whether the machine it talks to has exactly the past it should have.
//!
//! ```text
//! ┌─ round ───────────────────────────────────────────────────────────────────────────────────┐
//! │ disk completions ─► frames in ─► requests, answers, one group to the disk ─► frames out   │
//! └──▲─────────────────────────────────────────────────────────────────────────────────┬──────┘
//!    └────── wait: doorbells, alarm, HLT, clock (one trap into ring 0) ◄───────────────┘
//! ```
//!
//! No heap, no threads, no randomness; time is read once a round.

// A test harness needs a host; the parts that can have one are in the library.
#![cfg(not(test))]
#![no_std]
#![no_main]

mod device;
mod disk;
mod machine;
mod network;
mod service;
mod stream;

use crate::disk::Disk;
use crate::machine::clock::{Clock, wall_clock_ns};
use crate::machine::console::{fatal, print};
use crate::machine::static_cell::StaticCell;
use crate::machine::traps::power_off;
use crate::network::Network;
use crate::service::Service;
use core::fmt;
use ledger_core::chain::{Hash, Head};
use ledger_core::command_line::{self, Settings};
use ledger_core::ledger::Buffers;
use ledger_core::opening;
use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpCidr};

static BUFFERS: StaticCell<Buffers> = StaticCell::new(Buffers::new());

/// Where boot.S enters ring 3.
#[unsafe(no_mangle)]
extern "C" fn ring3_main() -> ! {
    print(format_args!("booting"));
    let settings = command_line::parse(machine::command_line())
        .unwrap_or_else(|error| fatal(format_args!("command line: {error}")));
    let clock = Clock::new();

    let mut disk = Disk::new();
    let buffers = BUFFERS.take();
    let capacity = disk.capacity();
    let head =
        opening::open(&mut disk, &mut buffers.group, capacity).unwrap_or_else(|error| fatal(format_args!("{error}")));
    let Head { n, hash } = head;
    print(format_args!("{n} records, head {}", Hex(&hash)));

    let mut network = Network::new(settings.address);
    let interface = interface(&settings, &mut network, &clock);
    let service = Service::new(buffers, head, capacity, settings.port);
    print(format_args!("listening on {}:{}", settings.address, settings.port));
    run(clock, disk, network, interface, service)
}

fn interface(settings: &Settings, network: &mut Network, clock: &Clock) -> Interface {
    let mut config = Config::new(HardwareAddress::Ethernet(network.mac()));
    config.random_seed = wall_clock_ns();
    let mut interface = Interface::new(config, network, instant(clock.now_ns()));
    interface.update_ip_addrs(|addresses| {
        // There is room for two.
        let _ = addresses.push(IpCidr::new(settings.address.into(), settings.prefix));
    });
    if let Some(gateway) = settings.gateway
        && interface.routes_mut().add_default_ipv4_route(gateway).is_err()
    {
        fatal(format_args!("no room for the route to {gateway}"));
    }
    interface
}

fn run(mut clock: Clock, mut disk: Disk, mut network: Network, mut interface: Interface, mut service: Service) -> ! {
    loop {
        let now_ns = clock.now_ns();
        let now = instant(now_ns);

        network.reclaim();
        interface.poll_maintenance(now);
        while interface.poll_ingress_single(now, &mut network, service.sockets()) != PollIngressSingleResult::None {}
        service.step(&mut disk, now_ns);
        let room_ns = service.make_room(now_ns);
        while interface.poll_egress(now, &mut network, service.sockets()) != PollResult::None {}

        let power_off_ns = match service.power_off(now_ns) {
            Ok(()) => {
                print(format_args!("power off"));
                power_off();
            }
            Err(deadline_ns) => deadline_ns,
        };

        let tcp_ns = interface
            .poll_at(now, service.sockets())
            .map(|at| at.total_micros().max(0) as u64 * 1000);
        // Without a buffer smoltcp's "now" has to wait for the card.
        let tcp_ns = tcp_ns.filter(|at_ns| !network.is_starved() || *at_ns > now_ns);
        let deadline_ns = [tcp_ns, room_ns, power_off_ns].into_iter().flatten().min();

        let doorbells = disk.doorbells() | network.doorbells();
        // All three: each also says which interrupts are wanted.
        let idle = [
            disk.may_sleep(),
            network.may_sleep(),
            deadline_ns.is_none_or(|at_ns| at_ns > now_ns),
        ];
        clock.wait(doorbells, deadline_ns, idle.into_iter().all(|idle| idle));
    }
}

fn instant(now_ns: u64) -> Instant {
    // Rounded up, so that a deadline taken from smoltcp is never still ahead when its alarm goes off.
    Instant::from_micros(now_ns.div_ceil(1000) as i64)
}

struct Hex<'a>(&'a Hash);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
