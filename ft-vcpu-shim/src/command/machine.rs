//! What `run` and `replay` have in common: the machine before its devices, and its fingerprint.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Args;
use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use sha2::{Digest, Sha256};

use crate::{
    device::{Port, describe},
    error::Error,
    lockstep::{
        execution::{Execution, OnLive},
        position::PositionClock,
        timeline::Timeline,
    },
    machine::{
        boot::Image,
        branches, cpuid,
        memory::Ram,
        vcpu::{Vcpu, guest_cpuid, host_msrs, open_kvm},
        windows,
    },
    platform::{Board, Guest, virtio_mmio::Transport},
};

/// What the guest is.
#[derive(Args, Clone, Debug)]
pub struct MachineArgs {
    /// Guest image: a Linux bzImage or vmlinux, or a freestanding ELF for x86-64.
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM disk of a Linux guest.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Guest command line.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub cmdline: String,
    /// Guest memory in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u32).range(4..=3072))]
    pub ram_mib: u32,
    /// How the log names a place where a guest without a stop of its own was stopped: `deltas`, the vCPU and the pages written, works on every
    /// host; `branches`, the number of branches retired since the last exit, needs performance counters, the same event on both hosts.
    #[arg(long, value_name = "HOW", value_enum, default_value_t)]
    pub positions: Positions,
}

/// How places between stops are named.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Positions {
    /// By state deltas.
    #[default]
    Deltas,
    /// By the host's counter of retired branches. It has not run on hardware yet.
    Branches,
}

/// A machine that is loaded and not yet powered on.
pub struct Loaded {
    kvm: Kvm,
    cpuid: CpuId,
    windows: bool,
    guest: Guest,
    entry: u64,
    clock: Option<Box<dyn PositionClock>>,
    /// Its memory.
    pub ram: Arc<Ram>,
    /// Digest of everything it starts from.
    pub fingerprint: [u8; 32],
}

fn read(path: &Path, what: &str, flag: &str) -> Result<Vec<u8>, Error> {
    std::fs::read(path)
        .map_err(|source| Error::environment(format!("cannot read {what} {}: {source}. Check {flag}", path.display())))
}

impl MachineArgs {
    /// Loads the guest.
    ///
    /// # Errors
    /// No KVM, no memory, or an image that cannot be loaded.
    pub fn load(&self) -> Result<Loaded, Error> {
        self.load_with(Image::open, b"")
    }

    /// Loads the guest as it is, for an execution that cannot be replayed; its fingerprint is that of no recorded machine.
    ///
    /// # Errors
    /// See [`MachineArgs::load`].
    pub fn load_unrecorded(&self) -> Result<Loaded, Error> {
        self.load_with(Image::unmodified, b"unrecorded")
    }

    fn load_with(
        &self,
        open: impl FnOnce(Vec<u8>) -> Result<Image, Error>,
        fingerprinted: &[u8],
    ) -> Result<Loaded, Error> {
        let kvm = open_kvm()?;
        let kernel = read(&self.kernel, "the guest image", "--kernel")?;
        let initrd = self.initrd.as_deref();
        let initrd = initrd.map(|path| read(path, "the initrd", "--initrd")).transpose()?;
        let mut hash = Sha256::new();
        let mut add = |part: &[u8]| {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        };
        add(&kernel);
        add(initrd.as_deref().unwrap_or_default());
        let ram = Arc::new(Ram::new(self.ram_mib)?);
        let image = open(kernel).map_err(|error| Error::environment(format!("{}: {error}", self.kernel.display())))?;
        let entry = image.load(&ram, &self.cmdline, initrd.as_deref())?;
        let cpuid = guest_cpuid(&kvm)?;
        let windows = windows::probe(&kvm)?;
        if let Err(reason) = &windows {
            tracing::info!("interrupt windows are no stop points on this host: {reason}");
        }
        let windows = windows.is_ok();
        for part in [
            self.cmdline.as_bytes(),
            &self.ram_mib.to_le_bytes(),
            &[u8::from(windows)],
            &cpuid::bytes(&cpuid),
        ] {
            add(part);
        }
        for (index, value) in host_msrs(&kvm, &cpuid)? {
            add(&index.to_le_bytes());
            add(&value.to_le_bytes());
        }
        let clock = match self.positions {
            Positions::Deltas => None,
            Positions::Branches => {
                let (event, clock) = branches::clock(&kvm, &cpuid)?.map_err(|reason| {
                    Error::environment(format!("--positions branches: {reason} (--positions deltas)"))
                })?;
                tracing::info!("places between stops are named by {}", event.name);
                add(b"branches");
                add(&event.config.to_le_bytes());
                Some(clock)
            }
        };
        if !fingerprinted.is_empty() {
            add(fingerprinted);
        }
        Ok(Loaded {
            kvm,
            cpuid,
            windows,
            guest: image.guest(),
            entry,
            clock,
            ram,
            fingerprint: hash.finalize().into(),
        })
    }
}

impl Loaded {
    /// Powers the machine on with these devices and this timeline.
    ///
    /// # Errors
    /// What KVM refuses, or a log that belongs to another machine.
    pub fn power_on(
        self,
        ports: Vec<Box<dyn Port>>,
        mut timeline: Box<dyn Timeline>,
        on_live: OnLive,
    ) -> Result<Execution, Error> {
        let descriptions: Vec<_> = ports.iter().map(|port| port.description()).collect();
        let wall_ns = timeline.boot(&self.fingerprint, &describe::encode(&descriptions))?;
        let transport = |device: &&describe::Description| {
            Transport::new(
                device.device_type,
                device.features,
                device.config.clone(),
                device.queues,
            )
        };
        let board = Board::new(self.guest, wall_ns, descriptions.iter().map(transport).collect());
        let vcpu = Vcpu::new(&self.kvm, self.ram, &self.cpuid, self.entry)?;
        if self.clock.is_some() {
            vcpu.listen()?;
        }
        let mut execution = Execution::new(vcpu, self.windows, board, ports, timeline, on_live);
        if let Some(clock) = self.clock {
            execution.set_clock(clock);
        }
        Ok(execution)
    }
}
