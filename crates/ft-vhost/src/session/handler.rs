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
        VHOST_USER_CONFIG_OFFSET, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
        VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
        VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags,
        VhostUserVringState,
    },
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use super::{
    Command, CommandSender, Description,
    memory::{self, Translation},
};
use crate::guest_side::{QUEUE_SIZE_MAX, QueueSetup, inflight::InflightRegion};

const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// Where some frontends (Cloud Hypervisor) take the configuration space to begin; others (QEMU) count from 0.
const CONFIG_OFFSET: u32 = VHOST_USER_CONFIG_OFFSET;

#[derive(Debug, Default)]
struct Vring {
    setup: QueueSetup,
    kick: Option<EventFd>,
    call: Option<EventFd>,
    error: Option<EventFd>,
    /// A kick message came, with or without a descriptor.
    kicked: bool,
    enabled: bool,
    running: bool,
}

/// One frontend's session.
#[derive(Debug)]
pub(super) struct Handler {
    description: Description,
    commands: Arc<CommandSender>,
    owned: bool,
    features: u64,
    translation: Translation,
    vrings: Vec<Vring>,
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
            translation: Translation::default(),
            vrings,
        }
    }

    fn call(&self, command: Command) -> Result<u16> {
        self.commands.call(command).map_err(|reason| {
            error!(reason, "the frontend asks for something impossible");
            Error::InvalidParam
        })
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

    fn track(&mut self, file: File, offset: u64, bytes: u64, queues: u16, queue_size: u16) -> Result<()> {
        let region = InflightRegion::map(file, offset, bytes, queues, queue_size).map_err(|error| {
            error!(%error, "the frontend's in-flight region is refused");
            Error::InvalidParam
        })?;
        self.call(Command::Inflight(region)).map(drop)
    }

    fn stop(&mut self, index: usize) -> Result<()> {
        if std::mem::take(&mut self.vrings[index].running) {
            let queue = index as u16;
            self.vrings[index].setup.next_available = self.call(Command::Stop { queue })?;
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
        let command = Command::Start {
            queue: index as u16,
            setup: vring.setup,
            kick: copy(vring.kick.as_ref())?,
            call: copy(vring.call.as_ref())?,
            error: copy(vring.error.as_ref())?,
        };
        self.call(command)?;
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
            self.vrings[index] = Vring::default();
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
        Ok(self.description.features | PROTOCOL_FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !(self.description.features | PROTOCOL_FEATURES) != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features;
        // Without the protocol's own feature there is no ENABLE message.
        if features & PROTOCOL_FEATURES == 0 {
            self.vrings.iter_mut().for_each(|vring| vring.enabled = true);
        }
        self.call(Command::Features(features)).map(drop)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE;
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
        let (memory, translation) = memory::map(table, files).map_err(|error| {
            error!(%error, "the frontend's memory table is refused");
            Error::InvalidParam
        })?;
        self.call(Command::Memory(memory))?;
        self.translation = translation;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        if !size.is_power_of_two() || size > QUEUE_SIZE_MAX {
            return Err(Error::InvalidParam);
        }
        self.change(index, |vring| vring.setup.size = size)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let [descriptor_table, used_ring, available_ring] = [descriptor, used, available].map(|address| {
            self.translation.guest_address(address).ok_or_else(|| {
                error!(
                    "ring address {address:#x} is in no region of the memory table. Is guest memory shared (share=on)?"
                );
                Error::InvalidParam
            })
        });
        let (descriptor_table, used_ring, available_ring) = (descriptor_table?, used_ring?, available_ring?);
        self.change(index, |vring| {
            vring.setup.descriptor_table = descriptor_table;
            vring.setup.used_ring = used_ring;
            vring.setup.available_ring = available_ring;
        })
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
            let queue = index.into();
            self.call(Command::Call { queue, call })?;
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
        // Beyond the device's own space there are zeros; the library bounds what may be asked for.
        let offset = offset.checked_sub(CONFIG_OFFSET).unwrap_or(offset) as usize;
        let mut config = self.description.config.get(offset..).unwrap_or_default().to_vec();
        config.resize(size as usize, 0);
        Ok(config)
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.call(Command::Config {
            offset,
            bytes: bytes.to_vec(),
        })?;
        // The device took it, so it is within its space.
        self.description.config[offset as usize..][..bytes.len()].copy_from_slice(bytes);
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
        unsupported()
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        unsupported()
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        unsupported()
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

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported()
    }
}
