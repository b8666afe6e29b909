//! The region that all processes of a VM on a host share: role, generation, the LSN counter, the commit watermark.
//!
//! ```text
//!    0 u64 magic            8 u64 next LSN (claimed by fetch_add)
//!   64 u64 commit watermark (ft-log)       72 u32 role    76 u32 generation    80 u64 last entry to replay
//!  128 u32 shim's wake word (futex)       132 u32 shim sleeps
//!   88 u32 throttle: thousandths of its time that the vCPU must pause (ft-log)
//!   96 u64 last entry before those of a synchronisation      104 u64 last of them that the new backup has applied (ft-log)
//!  112 u32 number of the synchronisation, 0 = none          116 u32 how often outputs were held anew   120 u32 synchronisations
//!  192 u64 last entry the shim has applied (shim)    200 u64 applied entry that ft-log wants to hear of, 0 = none
//!  256 + 64 * device: u64 LSN at which the device wants its commit event, 0 = none; u32 the last of 116 that it obeys
//! ```
//! `ft-log` alone writes role, generation and watermark.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::atomic::{Ordering, fence},
    time::Duration,
};

use ft_protocol::{
    held::Committed,
    ids::{DeviceId, Generation, Lsn},
    limits::{DEVICES_MAX, THROTTLE_MAX},
    replica::Role,
};

use crate::{futex, shm::SharedMemory};

const MAGIC: u64 = u64::from_le_bytes(*b"FTVM0001");
const NEXT_LSN: usize = 8;
const COMMIT: usize = 64;
const ROLE: usize = 72;
const GENERATION: usize = 76;
const REPLAY_END: usize = 80;
const SHIM_WAKE: usize = 128;
const SHIM_SLEEPS: usize = 132;
const THROTTLE: usize = 88;
const START: usize = 96;
const PEER_APPLIED: usize = 104;
const SYNCHRONISATION: usize = 112;
const HOLDS: usize = 116;
const ATTEMPTS: usize = 120;
const CONSUMED: usize = 192;
const CONSUMED_WANTED: usize = 200;
const COMMIT_WANTED: usize = 256;
const HOLDS_OBEYED: usize = 8;
const BYTES: usize = 4096;

const _: () = assert!(COMMIT_WANTED + 64 * DEVICES_MAX <= BYTES);

const ROLES: [Role; 8] = [
    Role::Pairing,
    Role::Recording,
    Role::Replaying,
    Role::Arbitrating,
    Role::GoingLive,
    Role::Live,
    Role::Halted,
    Role::Off,
];

/// The mapped region.
#[derive(Debug)]
pub struct Region {
    memory: SharedMemory,
}

impl Region {
    /// A new region in [`Role::Pairing`].
    ///
    /// # Errors
    /// As [`SharedMemory::create`].
    pub fn create() -> io::Result<Self> {
        let memory = SharedMemory::create("ft-vm", BYTES)?;
        memory.long(NEXT_LSN).store(1, Ordering::Relaxed);
        memory.long(0).store(MAGIC, Ordering::Release);
        Ok(Self { memory })
    }

    /// Maps the region that `ft-log` handed over.
    ///
    /// # Errors
    /// A descriptor that is not a region of this release.
    pub fn open(fd: OwnedFd) -> io::Result<Self> {
        let memory = SharedMemory::open(fd, BYTES)?;
        if memory.long(0).load(Ordering::Acquire) != MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not the VM region of this release",
            ));
        }
        Ok(Self { memory })
    }

    /// The region's descriptor.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    /// Claims the next LSN. The caller must publish an entry with it at once: whoever merges waits for it.
    #[inline]
    pub fn claim_lsn(&self) -> Lsn {
        Lsn(self.memory.long(NEXT_LSN).fetch_add(1, Ordering::AcqRel))
    }

    /// Starts a new generation's log at `next` (ft-log, while no producer writes).
    pub fn restart_log(&self, next: Lsn) {
        self.memory.long(NEXT_LSN).store(next.0, Ordering::Release);
    }

    /// How far outputs may leave.
    #[must_use]
    pub fn committed(&self) -> Committed {
        Committed::through(Lsn(self.memory.long(COMMIT).load(Ordering::Acquire)))
    }

    /// Raises the commit watermark (ft-log) and gives the devices whose commit event is due.
    pub fn commit(&self, committed: Committed) -> impl Iterator<Item = DeviceId> + '_ {
        self.memory.long(COMMIT).fetch_max(committed.lsn().0, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        (0..DEVICES_MAX).filter_map(move |device| {
            let wanted = self.memory.long(COMMIT_WANTED + 64 * device);
            let lsn = wanted.load(Ordering::Acquire);
            let due = lsn != 0 && lsn <= committed.lsn().0;
            // Whoever swaps a due value to 0 rings; the device may have raised it meanwhile, then it will look again.
            (due && wanted
                .compare_exchange(lsn, 0, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok())
            .then_some(DeviceId(device as u8))
        })
    }

    /// Asks for this device's commit event once `lsn` is committed. Look at [`Region::committed`] again afterwards: the commit
    /// may just have happened.
    pub fn want_commit(&self, device: DeviceId, lsn: Lsn) {
        self.memory
            .long(COMMIT_WANTED + 64 * usize::from(device.0))
            .store(lsn.0, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    // ---- a new backup ------------------------------------------------------------------------------------------------

    /// A synchronisation begins behind entry `start` (ft-log): on a live side devices append what they change from here on; on a new
    /// backup the replay begins there.
    pub fn begin_synchronisation(&self, start: Lsn) {
        self.memory.long(START).store(start.0, Ordering::Release);
        self.memory.long(PEER_APPLIED).store(start.0, Ordering::Release);
        let number = self.attempts().wrapping_add(1).max(1);
        self.memory.word(ATTEMPTS).store(number, Ordering::Relaxed);
        self.memory.word(SYNCHRONISATION).store(number, Ordering::Release);
    }

    fn attempts(&self) -> u32 {
        self.memory.word(ATTEMPTS).load(Ordering::Relaxed)
    }

    /// It is given up (ft-log), or there is no pair any more.
    pub fn end_synchronisation(&self) {
        self.memory.word(SYNCHRONISATION).store(0, Ordering::Release);
    }

    /// The number of the synchronisation that goes on, if one does: another one is another number.
    #[must_use]
    pub fn synchronisation(&self) -> Option<u32> {
        Some(self.memory.word(SYNCHRONISATION).load(Ordering::Acquire)).filter(|number| *number != 0)
    }

    /// New backup: the last entry before those to be replayed. 0 in a pair that began with the VM.
    #[must_use]
    pub fn start(&self) -> Lsn {
        Lsn(self.memory.long(START).load(Ordering::Acquire))
    }

    /// The new backup has applied every entry up to `lsn` (ft-log).
    pub fn set_peer_applied(&self, lsn: Lsn) {
        self.memory.long(PEER_APPLIED).store(lsn.0, Ordering::Release);
    }

    /// Last entry that the new backup is known to have applied.
    #[must_use]
    pub fn peer_applied(&self) -> Lsn {
        Lsn(self.memory.long(PEER_APPLIED).load(Ordering::Acquire))
    }

    /// The watermark falls to `after` (ft-log): what is behind it is held again. A device obeys when it has seen that.
    pub fn hold(&self, after: Lsn) {
        self.memory.long(COMMIT).store(after.0, Ordering::SeqCst);
        self.memory.word(HOLDS).fetch_add(1, Ordering::SeqCst);
    }

    /// How often the watermark fell. A device that reads the watermark after this knows of all of them.
    #[must_use]
    pub fn holds(&self) -> u32 {
        self.memory.word(HOLDS).load(Ordering::SeqCst)
    }

    /// This device lets nothing go by a watermark that it read before the fall with this number; ring ft-log's doorbell.
    pub fn obey(&self, device: DeviceId, holds: u32) {
        self.memory
            .word(COMMIT_WANTED + 64 * usize::from(device.0) + HOLDS_OBEYED)
            .store(holds, Ordering::SeqCst);
    }

    /// Whether the first `devices` devices obey (ft-log).
    #[must_use]
    pub fn is_obeyed(&self, devices: usize) -> bool {
        let obeyed = |device: usize| self.memory.word(COMMIT_WANTED + 64 * device + HOLDS_OBEYED);
        (0..devices).all(|device| obeyed(device).load(Ordering::SeqCst) == self.holds())
    }

    // ---- roles -------------------------------------------------------------------------------------------------------

    /// The replica's role; a code this release does not know counts as halted.
    #[must_use]
    pub fn role(&self) -> Role {
        let code = self.memory.word(ROLE).load(Ordering::Acquire) as usize;
        ROLES.get(code).copied().unwrap_or(Role::Halted)
    }

    /// The current generation.
    #[must_use]
    #[inline]
    pub fn generation(&self) -> Generation {
        Generation(self.memory.word(GENERATION).load(Ordering::Acquire))
    }

    /// Last entry to replay; meaningful in [`Role::GoingLive`].
    #[must_use]
    pub fn replay_end(&self) -> Lsn {
        Lsn(self.memory.long(REPLAY_END).load(Ordering::Acquire))
    }

    /// Publishes a change of role (ft-log) and wakes the shim.
    pub fn publish(&self, role: Role, generation: Generation, replay_end: Lsn) {
        let code = ROLES
            .iter()
            .position(|known| *known == role)
            .expect("every role has a code");
        self.memory.long(REPLAY_END).store(replay_end.0, Ordering::Release);
        self.memory.word(GENERATION).store(generation.0, Ordering::Release);
        self.memory.word(ROLE).store(code as u32, Ordering::Release);
        self.wake_shim();
    }

    /// Tells the shim that there is something for it: an input is ready, an entry arrived, the role changed.
    pub fn wake_shim(&self) {
        self.memory.word(SHIM_WAKE).fetch_add(1, Ordering::SeqCst);
        // Whoever finds it asleep wakes it; the next one need not.
        let sleeps = self.memory.word(SHIM_SLEEPS);
        if sleeps.load(Ordering::SeqCst) != 0 && sleeps.swap(0, Ordering::SeqCst) != 0 {
            futex::wake(self.memory.word(SHIM_WAKE));
        }
    }

    /// The shim's ticket: take it, look for work, then [`Region::sleep_shim`] with it.
    #[must_use]
    pub fn shim_ticket(&self) -> u32 {
        self.memory.word(SHIM_WAKE).load(Ordering::SeqCst)
    }

    /// Sleeps until somebody called [`Region::wake_shim`] after `ticket` was taken, or the time is up.
    pub fn sleep_shim(&self, ticket: u32, timeout: Option<Duration>) {
        self.memory.word(SHIM_SLEEPS).store(1, Ordering::SeqCst);
        futex::wait(self.memory.word(SHIM_WAKE), ticket, timeout);
        self.memory.word(SHIM_SLEEPS).store(0, Ordering::SeqCst);
    }

    /// The shim has applied every entry up to `lsn`. `true`: `ft-log` waits for that, ring its doorbell.
    #[must_use]
    pub fn set_consumed(&self, lsn: Lsn) -> bool {
        self.memory.long(CONSUMED).store(lsn.0, Ordering::Release);
        fence(Ordering::SeqCst);
        let wanted = self.memory.long(CONSUMED_WANTED);
        let due = wanted.load(Ordering::Relaxed);
        due != 0 && due <= lsn.0 && wanted.swap(0, Ordering::AcqRel) != 0
    }

    /// Has the shim ring once it has applied `lsn` (ft-log). Look at [`Region::consumed`] again afterwards: it may just have.
    pub fn want_consumed(&self, lsn: Lsn) {
        self.memory.long(CONSUMED_WANTED).store(lsn.0, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The share of its time, in thousandths, that the vCPU must pause because the backup lags; at most [`THROTTLE_MAX`], which
    /// stops it.
    #[must_use]
    pub fn throttle(&self) -> u32 {
        self.memory.word(THROTTLE).load(Ordering::Relaxed).min(THROTTLE_MAX)
    }

    /// Sets the throttle (ft-log) and wakes the shim, which may be pausing.
    pub fn set_throttle(&self, permille: u32) {
        self.memory.word(THROTTLE).store(permille, Ordering::Relaxed);
        self.wake_shim();
    }

    /// Last entry the shim has applied.
    #[must_use]
    pub fn consumed(&self) -> Lsn {
        Lsn(self.memory.long(CONSUMED).load(Ordering::Acquire))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_rung_once_when_its_wish_is_committed() {
        let region = Region::create().unwrap();
        region.want_commit(DeviceId(1), Lsn(5));
        assert_eq!(region.commit(Committed::through(Lsn(4))).count(), 0);
        assert_eq!(
            region.commit(Committed::through(Lsn(5))).collect::<Vec<_>>(),
            [DeviceId(1)]
        );
        assert_eq!(region.commit(Committed::through(Lsn(6))).count(), 0);
        assert_eq!(region.committed().lsn(), Lsn(6));
    }

    #[test]
    fn the_watermark_never_falls_and_roles_read_back() {
        let region = Region::create().unwrap();
        let _ = region.commit(Committed::through(Lsn(9)));
        let _ = region.commit(Committed::through(Lsn(3)));
        assert_eq!(region.committed().lsn(), Lsn(9));
        for role in ROLES {
            region.publish(role, Generation(2), Lsn(7));
            assert_eq!(
                (region.role(), region.generation(), region.replay_end()),
                (role, Generation(2), Lsn(7))
            );
        }
        assert_eq!((region.claim_lsn(), region.claim_lsn()), (Lsn(1), Lsn(2)));
    }

    #[test]
    fn a_watermark_that_falls_is_obeyed_by_every_device_or_not_at_all() {
        let region = Region::create().unwrap();
        let _ = region.commit(Committed::through(Lsn::MAX));
        assert!(region.is_obeyed(2));
        region.hold(Lsn(7));
        assert_eq!(region.committed().lsn(), Lsn(7));
        region.obey(DeviceId(1), region.holds());
        assert!(!region.is_obeyed(2));
        region.obey(DeviceId(0), region.holds());
        assert!(region.is_obeyed(2));
        region.hold(Lsn(9));
        assert!(!region.is_obeyed(1));
    }

    #[test]
    fn each_synchronisation_has_a_number_of_its_own() {
        let region = Region::create().unwrap();
        assert_eq!(region.synchronisation(), None);
        region.begin_synchronisation(Lsn(5));
        let first = region.synchronisation();
        assert_eq!((region.start(), region.peer_applied()), (Lsn(5), Lsn(5)));
        region.end_synchronisation();
        assert_eq!(region.synchronisation(), None);
        region.begin_synchronisation(Lsn(8));
        assert!(first.is_some() && region.synchronisation().is_some() && region.synchronisation() != first);
    }

    #[test]
    fn the_doorbell_is_rung_once_when_the_wanted_entry_is_applied() {
        let region = Region::create().unwrap();
        assert!(!region.set_consumed(Lsn(1)));
        region.want_consumed(Lsn(3));
        assert!(!region.set_consumed(Lsn(2)));
        assert!(region.set_consumed(Lsn(4)));
        assert!(!region.set_consumed(Lsn(5)));
        assert_eq!(region.consumed(), Lsn(5));
    }

    #[test]
    fn a_throttle_nobody_can_set_stops_the_vcpu_and_no_more() {
        let region = Region::create().unwrap();
        assert_eq!(region.throttle(), 0);
        region.set_throttle(u32::MAX);
        assert_eq!(region.throttle(), THROTTLE_MAX);
    }

    #[test]
    fn a_wake_between_ticket_and_sleep_is_not_lost() {
        let region = Region::create().unwrap();
        let ticket = region.shim_ticket();
        region.wake_shim();
        region.sleep_shim(ticket, None);
        assert_ne!(region.shim_ticket(), ticket);
    }
}
