//! The model of the vCPU shim and the devices: it records or replays the guest, and holds the outputs.

use ft_protocol::{Body, Committed, DeviceId, Event, Held, Lsn, Timing, entry::Entry, limits::THROTTLE_MAX};
use rand::Rng;

use crate::{
    channel::digest,
    crash_points::{Deed, Point},
    guest::{Output, Request},
    host::{Host, HostId},
    mutants::Mutant,
    queue::Task,
    shell::FINGERPRINT,
    world::World,
};

/// The network device of the model.
const NET: DeviceId = DeviceId(0);
/// Frames a network card keeps while nobody reads it.
const NIC_FRAMES_MAX: usize = 8;

/// Whether the vCPU wrote this entry; inputs are the devices'.
fn host_executes(body: &Body<'_>) -> bool {
    !matches!(
        body,
        Body::Input { .. } | Body::Boot { .. } | Body::Synced { .. } | Body::Configuration(_)
    )
}

impl World {
    /// Has the vCPU come to a stop point in `delay_ns`, if it does not sooner.
    pub(crate) fn wake_guest(&mut self, id: HostId, delay_ns: u64) {
        let at_ns = self.now_ns + delay_ns;
        let host = self.host(id);
        if host.stop_at_ns.is_none_or(|planned| at_ns < planned) {
            host.stop_at_ns = Some(at_ns);
            self.later(id, delay_ns, Task::Stop);
        }
    }

    /// The vCPU is at a stop point.
    pub(crate) fn guest_stop(&mut self, id: HostId) {
        let host = self.host(id);
        if host.shim_stalled > 0 || host.guest.is_off() {
            return;
        }
        if host.is_executing() {
            self.record(id);
        } else if host.is_replaying() {
            self.replay(id);
        }
    }

    // ---- recording ---------------------------------------------------------------------------------------------------

    fn record(&mut self, id: HostId) {
        if self.is_log_full(id) {
            // Goes on when the backup has acknowledged some of it.
            return;
        }
        if self.host(id).throttle >= THROTTLE_MAX {
            // Goes on when the backup has caught up a little.
            self.log_frames(id);
            return;
        }
        let choice = self.rng.random_range(0..4);
        self.log_frames(id);
        let (now_ns, idle_ns, stop_ns) = (self.now_ns, self.setting().idle_ns, self.setting().stop_ns);
        let host = self.host(id);
        if !host.is_running() || !host.is_executing() {
            return;
        }
        let stop = host.guest.stop();
        if !host.guest.is_booted() {
            let wall_ns = host.clock.local_ns(now_ns);
            let fingerprint = FINGERPRINT;
            self.submit(
                id,
                DeviceId::SHIM,
                &Body::Boot {
                    fingerprint,
                    wall_ns,
                    devices: b"net0",
                },
            );
        } else if host.guest.has_ready() && choice > 0 {
            self.submit(id, NET, &Body::Kick(stop));
        } else if host.guest.wants_power_off() {
            self.submit(id, DeviceId::SHIM, &Body::PowerOff { stop, reset: false });
        } else if host.guest.has_waiting() && choice > 0 {
            let through = host.guest.inputs();
            self.submit(id, NET, &Body::Deliver { stop, through });
        } else if choice == 1 {
            self.submit(id, DeviceId::SHIM, &Body::Sync(stop));
        } else {
            // The guest's clock goes on from where the log left it, whatever this host's clock shows.
            let now_ns = host.guest.now_ns() + self.rng.random_range(1..1000);
            self.submit(id, DeviceId::SHIM, &Body::Time { stop, now_ns });
        }
        let host = self.host(id);
        if host.is_running() && host.is_executing() {
            let busy = host.guest.has_ready() || host.guest.has_waiting() || host.guest.wants_power_off();
            let run_ns = if busy { stop_ns } else { idle_ns };
            let (paused, runs) = (u64::from(host.throttle), u64::from(THROTTLE_MAX - host.throttle).max(1));
            self.wake_guest(id, run_ns + stop_ns * paused / runs);
        }
    }

    /// A client's frame is at the network card.
    pub(crate) fn request(&mut self, id: HostId, request: &Request) {
        let host = self.host(id);
        if !host.is_running() || !host.is_executing() || !host.guest.is_booted() {
            return;
        }
        if host.nic.len() < NIC_FRAMES_MAX {
            host.nic.push_back(request.encode());
        }
        self.log_frames(id);
        let stop_ns = self.setting().stop_ns;
        self.wake_guest(id, stop_ns);
    }

    /// The operator asks both hosts for other times; the side that executes the VM writes them down.
    pub(crate) fn configure(&mut self, timing: Timing) {
        for id in HostId::BOTH {
            let host = self.host(id);
            if host.is_running() && host.paused == 0 && host.replica.takes_configuration().is_ok() {
                self.submit(id, DeviceId::SHIM, &Body::Configuration(timing));
            }
        }
    }

    /// The network device logs the frames that came in.
    fn log_frames(&mut self, id: HostId) {
        while !self.is_log_full(id)
            && self.host(id).guest.is_booted()
            && let Some(payload) = self.host(id).nic.pop_front()
        {
            let sequence = self.host(id).guest.inputs() + 1;
            let payload = &payload;
            self.submit(id, NET, &Body::Input { sequence, payload });
            if !self.host(id).is_running() {
                return;
            }
        }
    }

    /// Writes an entry, applies it, and has the core order it.
    pub(crate) fn submit(&mut self, id: HostId, device: DeviceId, body: &Body<'_>) {
        let point = |after| Point {
            deed: Deed::Submit,
            after,
        };
        if self.passes(id, point(false)) {
            return;
        }
        let host = self.host(id);
        let lsn = host.next_lsn;
        host.next_lsn = lsn.next();
        let entry = Entry {
            lsn,
            generation: host.replica.generation(),
            device,
            queue: 0,
            body: *body,
        };
        let mut frame = vec![0; body.frame_bytes()];
        entry.encode(&mut frame);
        let outputs = host
            .guest
            .apply(body)
            .expect("a recording guest applies what it writes");
        let is_power_off = matches!(body, Body::PowerOff { .. });
        self.judge.wrote(id, lsn, digest(&frame), is_power_off);
        if host_executes(body) {
            self.judge.executed(id);
        }
        self.note(Some(id), || format!("writes entry {lsn}, {}", body.name()));
        let host = self.host(id);
        if host.replica.keeps_entries() {
            host.backlog.tail().extend_from_slice(&frame);
            host.backlog.seal(lsn);
        }
        self.hold(id, lsn, outputs);
        if let Body::Synced { instance } = *body {
            self.drive(id, Event::SyncedEntry { lsn, instance });
        }
        self.drive(id, Event::Appended { through: lsn });
        if let Body::Configuration(timing) = *body {
            self.drive(id, Event::ConfigurationEntry { lsn, timing });
        }
        if is_power_off && !self.is_mutant(Mutant::HidePowerOff) {
            self.drive(id, Event::PowerOffEntry { lsn });
        }
        if self.host(id).alive {
            self.passes(id, point(true));
        }
    }

    // ---- replaying ---------------------------------------------------------------------------------------------------

    fn replay(&mut self, id: HostId) {
        let host = self.host(id);
        let Some(frame) = host.replay.pop_front() else { return };
        let point = |after| Point {
            deed: Deed::Replay,
            after,
        };
        if self.passes(id, point(false)) {
            return;
        }
        let entry = Entry::decode(&frame).expect("the network does not change bytes");
        let lsn = entry.lsn;
        let skips = self.is_mutant(Mutant::SkipTime) && matches!(entry.body, Body::Time { .. });
        if !skips {
            match self.host(id).guest.apply(&entry.body) {
                Ok(outputs) => self.hold(id, lsn, outputs),
                Err(diverged) => {
                    self.note(Some(id), || format!("diverges at entry {lsn}: {}", diverged.0));
                    self.judge.diverged(id, &diverged.0);
                    let reason = diverged.0;
                    self.drive(id, Event::LocalFailure { reason });
                    return;
                }
            }
        }
        self.judge.replayed(id, lsn);
        self.drive(id, Event::Consumed { through: lsn });
        if !self.host(id).is_running() || self.passes(id, point(true)) {
            return;
        }
        // There is room again.
        self.read_channel(id);
        let replay_ns = self.setting().replay_ns;
        let host = self.host(id);
        if host.is_replaying() && !host.replay.is_empty() {
            self.wake_guest(id, replay_ns);
        }
    }

    // ---- outputs -----------------------------------------------------------------------------------------------------

    fn hold(&mut self, id: HostId, marker: Lsn, outputs: Vec<Output>) {
        if outputs.is_empty() {
            return;
        }
        let held_replayed_max = self.setting().held_replayed_max;
        for output in outputs {
            self.judge.produced(id, &output);
            self.host(id).held.push_back(Held::new(marker, output));
        }
        let host = self.host(id);
        if !host.is_executing() {
            while host.held.len() > held_replayed_max {
                host.held.pop_front();
            }
        }
        self.wake_devices(id);
    }

    /// Has the devices look at the watermark, a little later.
    pub(crate) fn wake_devices(&mut self, id: HostId) {
        let Host {
            held, release_at_ns, ..
        } = self.host(id);
        if held.is_empty() || release_at_ns.is_some() {
            return;
        }
        let delay_ns = self.rng.random_range(0..=self.setting().stop_ns);
        self.host(id).release_at_ns = Some(self.now_ns + delay_ns);
        self.later(id, delay_ns, Task::Release);
    }

    /// The devices let go what is committed.
    pub(crate) fn release(&mut self, id: HostId) {
        let point = |after| Point {
            deed: Deed::Release,
            after,
        };
        while let Some(held) = self.host(id).held.pop_front() {
            let host = self.host(id);
            let mut committed = host.committed;
            if self.is_mutant(Mutant::ReleaseEarly) && self.host(id).is_executing() {
                committed = committed.max(Committed::through(self.host(id).sent));
            }
            let marker = held.marker();
            if held.is_committed(committed) && self.passes(id, point(false)) {
                return;
            }
            match held.release(committed) {
                Ok(output) => self.transmit(id, marker, &output),
                Err(held) => {
                    self.host(id).held.push_front(held);
                    return;
                }
            }
            if self.passes(id, point(true)) {
                return;
            }
        }
    }

    fn transmit(&mut self, id: HostId, marker: Lsn, output: &Output) {
        self.outcome.outputs += 1;
        let me = self.host(id).me;
        self.note(Some(id), || {
            format!("releases output {} (marker {marker})", output.index)
        });
        self.judge.released(me, marker, output);
        self.send_to_client(output.answer);
    }
}
