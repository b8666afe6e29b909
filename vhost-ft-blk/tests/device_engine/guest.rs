//! A guest with its driver, and what it was told.

use ft_vhost::guest_side::dirty::GuestMemoryMmap;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::{
    host::{Host, SECTORS},
    model::Model,
    support::{
        driver::{BlkDriver, BlkRequest, memory},
        frontend::{Session, complete},
    },
};

/// Requests in flight.
const DEPTH: usize = 16;
/// Requests after which the driver's memory of one is used again.
const SLOTS: u64 = 60;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// See the module.
pub(crate) struct Guest {
    _memory: GuestMemoryMmap,
    pub(crate) driver: BlkDriver,
    pub(crate) session: Session,
    pub(crate) model: Model,
    flying: Vec<(u64, BlkRequest)>,
    submitted: u64,
}

impl Guest {
    pub(crate) fn attach(host: &Host) -> Self {
        let memory = memory();
        let driver = BlkDriver::new(&memory, true);
        // Stock VMMs add memory while they run, and libblkio does not go without.
        let more = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        let mut session = Session::negotiate_with(&host.socket(), u64::MAX, 1, more);
        session.share(&memory);
        session.start_queue(0, &driver.ring);
        Self {
            session,
            driver,
            _memory: memory,
            model: Model::default(),
            flying: Vec::new(),
            submitted: 0,
        }
    }

    /// One more request: mostly writes, many of them overlapping, and what else changes a disk.
    pub(crate) fn submit(&mut self, random: &mut ChaCha8Rng) {
        let count = random.random_range(1..=32u64);
        // Some of the disk is hot.
        let span = if random.random_range(0..3) == 0 { 64 } else { SECTORS };
        let first = random.random_range(0..span - count);
        let kind = random.random_range(0..20);
        let request = match kind {
            0 => self.driver.flush(),
            1 | 2 => {
                self.model.change(first, count, true);
                let (kind, flags) = match kind {
                    1 => (DISCARD, 0),
                    _ => (WRITE_ZEROES, random.random_range(0..2)),
                };
                self.driver.extent(kind, first, count as u32, flags)
            }
            _ => {
                let data = self.model.change(first, count, false);
                self.driver.write(first, &data)
            }
        };
        if kind != 0 {
            self.model.flies(request.head);
        }
        self.submitted += 1;
        self.flying.push((self.submitted, request));
    }

    /// A write of one place, by itself.
    pub(crate) fn write(&mut self, first: u64, count: u64) -> BlkRequest {
        let data = self.model.change(first, count, false);
        let request = self.driver.write(first, &data);
        self.model.flies(request.head);
        self.submitted += 1;
        self.flying.push((self.submitted, request));
        self.kick();
        request
    }

    pub(crate) fn kick(&mut self) {
        if self.driver.ring.wants_kick() {
            self.session.kick(0);
        }
    }

    /// Takes what the guest was told so far; gives how much that was.
    pub(crate) fn hear(&mut self) -> u64 {
        let mut heard = 0;
        while let Some((head, _)) = self.driver.ring.take_used() {
            let at = self.flying.iter().position(|(_, request)| request.head == head);
            let (_, request) = self.flying.swap_remove(at.expect("a request is completed once"));
            self.model.told(head, self.driver.status(request));
            heard += 1;
        }
        heard
    }

    fn has_room(&self) -> bool {
        let oldest = self.flying.iter().map(|(number, _)| *number).min();
        self.flying.len() < DEPTH && oldest.is_none_or(|oldest| self.submitted - oldest < SLOTS)
    }

    /// Keeps the queue full until the guest was told of so many requests.
    pub(crate) fn work(&mut self, random: &mut ChaCha8Rng, requests: u64) {
        let mut heard = 0;
        loop {
            while self.has_room() {
                self.submit(random);
            }
            self.kick();
            heard += self.hear();
            if heard >= requests {
                return;
            }
            if !self.has_room() {
                self.session.wait_call(0);
            }
        }
    }

    /// Waits for everything that is in flight.
    pub(crate) fn finish(&mut self) {
        self.kick();
        loop {
            self.hear();
            if self.flying.is_empty() {
                return;
            }
            self.session.wait_call(0);
        }
    }

    /// What the device says the whole disk holds.
    pub(crate) fn read_all(&mut self) -> Vec<u8> {
        const PART: u64 = 64;
        let mut content = Vec::new();
        for part in 0..SECTORS / PART {
            let read = self.driver.read(part * PART, PART as u32 * 512);
            complete(&self.session, &mut self.driver, &[read]);
            assert_eq!(self.driver.status(read), 0);
            content.extend(self.driver.data(read));
        }
        content
    }
}
