//! The region that all processes of a VM on a host share: role, generation, the LSN counter, the commit watermark.
//!
//! ```text
//!    0 u64 magic            8 u64 next LSN (claimed by fetch_add)
//!   64 u64 commit watermark (ft-log)       72 u32 role    76 u32 generation    80 u64 last entry to replay
//!  128 u32 shim's wake word (futex)       132 u32 shim sleeps
//!   88 u32 throttle: thousandths of its time that the vCPU must pause (ft-log)
//!  192 u64 last entry the shim has applied (shim)    200 u64 applied entry that ft-log wants to hear of, 0 = none
//!  256 + 64 * device: u64 LSN at which the device wants its commit event, 0 = none
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
const CONSUMED: usize = 192;
const CONSUMED_WANTED: usize = 200;
const COMMIT_WANTED: usize = 256;
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
