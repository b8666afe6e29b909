//! What each vhost-user message means.
//!
//! ```text
//!  ring:  NUM, ADDR, BASE, CALL, ENABLE in any order ─► prepared
//!         KICK, while enabled ─► running ─► GET_VRING_BASE, or disabled, or the frontend leaves ─► stopped
//! ```

use std::{
    fs::File,
    io,
    os::fd::{AsFd, FromRawFd, IntoRawFd},
    sync::Arc,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use tracing::{debug, error};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
    message::{
        VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
        VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
        VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
    },
};
use virtio_bindings::{virtio_config::VIRTIO_F_RING_RESET, virtio_ring::VIRTIO_RING_F_EVENT_IDX};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Answer, CommandSender, Description, QueueCommand, SharedCommand,
    memory::{MemoryError, MemoryTable, SLOTS_MAX},
};
use crate::guest_side::{QUEUE_SIZE_MAX, QueueSetup, dirty::LogPages, inflight::InflightRegion};

const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

#[derive(Debug, Default)]
struct Vring {
    setup: QueueSetup,
    /// Its used ring is logged.
    logged: bool,
    kick: Option<EventFd>,
    call: Option<EventFd>,
    error: Option<EventFd>,
    /// A kick message came, with or without a descriptor.
    kicked: bool,
    enabled: bool,
    running: bool,
    /// It ran in this session.
    ran: bool,
}

/// One frontend's session.
#[derive(Debug)]
pub(super) struct Handler {
    description: Description,
    commands: Arc<CommandSender>,
    owned: bool,
    features: u64,
    memory: MemoryTable,
    log_pages: Option<LogPages>,
    vrings: Vec<Vring>,
    /// The device knows what the driver wrote to the configuration space, or that it does not know.
    config_settled: bool,
}

/// The eventfd in a message. Its reads must never block the device thread, whoever else reads it.
fn event(file: File) -> Result<EventFd> {
    let flags = fcntl(file.as_fd(), FcntlArg::F_GETFL).map_err(|_| Error::IncorrectFds)?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(file.as_fd(), FcntlArg::F_SETFL(flags)).map_err(|_| Error::IncorrectFds)?;
    // SAFETY: ownership of the descriptor moves into the EventFd, which only reads and writes 8 bytes.
    Ok(unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}

fn copy(event: Option<&EventFd>) -> Result<Option<EventFd>> {
    event
        .map(EventFd::try_clone)
        .transpose()
        .map_err(Error::ReqHandlerError)
}

fn impossible(reason: String) -> Error {
    error!(reason, "the frontend asks for something impossible");
    Error::InvalidParam
}

fn unsupported<T>() -> Result<T> {
    Err(Error::InvalidOperation("the feature was not offered"))
}

impl Handler {
    pub(super) fn new(description: Description, commands: Arc<CommandSender>) -> Self {
        let vrings = (0..description.queues).map(|_| Vring::default()).collect();
        Self {
            description,
            commands,
            owned: false,
            features: 0,
            memory: MemoryTable::default(),
            log_pages: None,
            vrings,
            config_settled: false,
        }
    }

    fn shared(&self, command: SharedCommand) -> Result<()> {
        self.commands.shared(command).map(drop).map_err(impossible)
    }

    fn queue(&self, index: usize, command: QueueCommand) -> Result<Answer> {
        self.commands.queue(index as u16, command).map_err(impossible)
    }

    /// Virtio features that are offered: the device's, and what the session adds.
    fn offered(&self) -> u64 {
        let session = PROTOCOL_FEATURES | LOG_ALL | 1 << VIRTIO_F_RING_RESET;
        self.description.features
            | match self.description.alone {
                true => session,
                false => PROTOCOL_FEATURES,
            }
    }

    /// The device writes to this memory from here on.
    fn use_memory(&mut self, table: std::result::Result<MemoryTable, MemoryError>) -> Result<()> {
        let refused = |error: &dyn std::fmt::Display| {
            error!(%error, "the frontend's memory is refused");
            Error::InvalidParam
        };
        let table = table.map_err(|error| refused(&error))?;
        let memory = table.memory().map_err(|error| refused(&error))?;
        if let Some(pages) = &self.log_pages {
            pages.covers(&memory).map_err(|error| refused(&error))?;
        }
        self.shared(SharedCommand::Memory(memory))?;
        self.memory = table;
        Ok(())
    }

    /// Logs what the device writes, or no more, as the frontend last said.
    fn update_log(&self) -> Result<()> {
        let wanted = self.features & LOG_ALL != 0 || self.vrings.iter().any(|vring| vring.logged);
        self.memory.log().set(self.log_pages.clone().filter(|_| wanted));
        self.shared(SharedCommand::Barrier)
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    /// Queues and queue size of an in-flight region, within what the device has.
    fn inflight_shape(&self, region: &VhostUserInflight) -> Result<(u16, u16)> {
        let (queues, size) = (region.num_queues, region.queue_size);
        let possible = self.description.tracks_inflight
            && (1..=self.description.queues).contains(&queues)
            && (1..=QUEUE_SIZE_MAX).contains(&size);
        possible.then_some((queues, size)).ok_or(Error::InvalidParam)
    }

    /// The guest ran before this session. Frontends say what a driver writes to the configuration space once, so an earlier daemon
    /// may be the only one that heard it.
    fn resume(&mut self) -> Result<()> {
        if !self.description.alone || std::mem::replace(&mut self.config_settled, true) {
            return Ok(());
        }
        if let Answer::Config(space) = self.commands.shared(SharedCommand::Resume).map_err(impossible)? {
            self.description.config.written(0, &space);
        }
        Ok(())
    }

    fn track(&mut self, file: File, offset: u64, bytes: u64, queues: u16, queue_size: u16) -> Result<()> {
        let region = InflightRegion::map(file, offset, bytes, queues, queue_size).map_err(|error| {
            error!(%error, "the frontend's in-flight region is refused");
            Error::InvalidParam
        })?;
        if region.is_used() && !self.vrings.iter().any(|vring| vring.ran) {
            self.resume()?;
        }
        self.shared(SharedCommand::Inflight(region))
    }

    fn stop(&mut self, index: usize) -> Result<()> {
        if std::mem::take(&mut self.vrings[index].running)
            && let Answer::Index(next) = self.queue(index, QueueCommand::Stop)?
        {
            self.vrings[index].setup.next_available = next;
        }
        Ok(())
    }

    fn start_if_ready(&mut self, index: usize) -> Result<()> {
        let event_idx = self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let vring = &mut self.vrings[index];
        if vring.running || !vring.kicked || !vring.enabled {
            return Ok(());
        }
        vring.setup.event_idx = event_idx;
        if !std::mem::replace(&mut vring.ran, true) && vring.setup.next_available != 0 {
            self.resume()?;
        }
        let vring = &mut self.vrings[index];
        let command = QueueCommand::Start {
            setup: vring.setup,
            kick: copy(vring.kick.as_ref())?,
            call: copy(vring.call.as_ref())?,
            error: copy(vring.error.as_ref())?,
        };
        self.queue(index, command)?;
        debug!(queue = index, "a queue started");
        self.vrings[index].running = true;
        Ok(())
    }

    /// Stops the queue for a change, if it runs, and goes on where it was.
    fn change(&mut self, index: u32, change: impl FnOnce(&mut Vring)) -> Result<()> {
        self.vring(index)?;
        let index = index as usize;
        self.stop(index)?;
        change(&mut self.vrings[index]);
        self.start_if_ready(index)
    }

    fn stop_all(&mut self) -> Result<()> {
        for index in 0..self.vrings.len() {
            self.stop(index)?;
            self.vrings[index] = Vring {
                ran: self.vrings[index].ran,
                ..Vring::default()
            };
        }
        Ok(())
    }
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.owned, true) {
            return Err(Error::InvalidOperation("the device has an owner already"));
        }
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.owned = false;
        self.features = 0;
        self.stop_all()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.offered() != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features;
        self.update_log()?;
        // Without the protocol's own feature there is no ENABLE message.
        if features & PROTOCOL_FEATURES == 0 {
            self.vrings.iter_mut().for_each(|vring| vring.enabled = true);
        }
        self.shared(SharedCommand::Features(features))
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE;
        let alone = VhostUserProtocolFeatures::LOG_SHMFD | VhostUserProtocolFeatures::BACKEND_REQ;
        features.set(alone, self.description.alone);
        let network = VhostUserProtocolFeatures::RARP | VhostUserProtocolFeatures::MTU;
        features.set(network, self.description.network);
        features.set(
            VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
            self.description.adds_memory,
        );
        features.set(
            VhostUserProtocolFeatures::INFLIGHT_SHMFD,
            self.description.tracks_inflight,
        );
        Ok(features)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        self.use_memory(self.memory.with_all(table, files))?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        if !size.is_power_of_two() || size > self.description.queue_size_max {
            error!(
                size,
                max = self.description.queue_size_max,
                "a queue of this size is refused: see --queue-size"
            );
            return Err(Error::InvalidParam);
        }
        self.change(index, |vring| vring.setup.size = size)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let [descriptor_table, used_ring, available_ring] = [descriptor, used, available].map(|address| {
            self.memory.guest_address(address).ok_or_else(|| {
                error!(
                    "ring address {address:#x} is in no region of the memory table. Is guest memory shared (share=on)?"
                );
                Error::InvalidParam
            })
        });
        let (descriptor_table, used_ring, available_ring) = (descriptor_table?, used_ring?, available_ring?);
        let logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        if logged && log != used_ring {
            error!("the used ring at guest address {used_ring:#x} is to be logged as {log:#x}: there is no IOMMU here");
            return Err(Error::InvalidParam);
        }
        let vring = self.vring(index)?;
        vring.logged = logged;
        let setup = QueueSetup {
            descriptor_table,
            used_ring,
            available_ring,
            ..vring.setup
        };
        // A migration that begins says again what it knows, of a queue that runs.
        if setup != vring.setup {
            self.change(index, |vring| vring.setup = setup)?;
        }
        self.update_log()
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.change(index, |vring| vring.setup.next_available = base)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index)?;
        self.stop(index as usize)?;
        let vring = self.vring(index)?;
        // The ring is stopped until a new kick message comes.
        vring.kicked = false;
        vring.kick = None;
        vring.call = None;
        let base = vring.setup.next_available;
        debug!(queue = index, base, "a queue stopped");
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let kick = fd.map(event).transpose()?;
        self.change(index.into(), |vring| {
            vring.kick = kick;
            vring.kicked = true;
        })
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let call = fd.map(event).transpose()?;
        let vring = self.vring(index.into())?;
        let running = vring.running;
        vring.call = copy(call.as_ref())?;
        if running {
            self.queue(index.into(), QueueCommand::Call(call))?;
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(index.into())?.error = fd.map(event).transpose()?;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.description.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let vring = self.vring(index)?;
        vring.enabled = enable;
        if enable {
            self.start_if_ready(index as usize)
        } else {
            self.stop(index as usize)
        }
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        // The library bounds what may be asked for.
        Ok(self.description.config.read(offset, size))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.shared(SharedCommand::Config {
            offset,
            bytes: bytes.to_vec(),
        })?;
        self.description.config.written(offset, bytes);
        self.config_settled = true;
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, queue_size) = self.inflight_shape(asked)?;
        let bytes = InflightRegion::bytes(queues, queue_size) as u64;
        let file = memfd_create("vhost-inflight", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from);
        let file = File::from(file.map_err(Error::ReqHandlerError)?);
        file.set_len(bytes).map_err(Error::ReqHandlerError)?;
        self.track(
            file.try_clone().map_err(Error::ReqHandlerError)?,
            0,
            bytes,
            queues,
            queue_size,
        )?;
        Ok((VhostUserInflight::new(bytes, 0, queues, queue_size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, queue_size) = self.inflight_shape(given)?;
        self.track(file, given.mmap_offset, given.mmap_size, queues, queue_size)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(SLOTS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        // QEMU 7.2 says it once for each pair of a card's queues, and so below.
        if !self.description.network || !self.memory.has(region) {
            self.use_memory(self.memory.with(region, fd))?;
        }
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        if self.description.network && !self.memory.has(region) {
            return Ok(());
        }
        self.use_memory(self.memory.without(region))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let (offset, bytes) = (log.mmap_offset, log.mmap_size);
        let pages = LogPages::map(file, offset, bytes)
            .and_then(|pages| match self.memory.memory() {
                Ok(memory) => pages.covers(&memory).map(|()| pages),
                Err(_) => Ok(pages),
            })
            .map_err(|error| {
                error!(%error, "the frontend's dirty log is refused");
                Error::InvalidParam
            })?;
        self.log_pages = Some(pages);
        self.update_log()
    }
}
