//! The KVM wrapper: one VM, one vCPU, exits as plain values. One of the homes of `unsafe`.

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_fpu,
    kvm_guest_debug, kvm_interrupt, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, SyncReg, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{
    boot, cpuid,
    kick::{self, Kick},
    memory::Ram,
    msr,
    state::{self, VcpuState},
};
use crate::error::Error;

mod request {
    //! The one ioctl that kvm-ioctls does not wrap.
    #![allow(
        missing_docs,
        unreachable_pub,
        reason = "the macro makes a public function without documentation"
    )]
    use kvm_bindings::{KVMIO, kvm_interrupt};
    vmm_sys_util::ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
}

/// Most bytes that one exit carries here: larger string I/O is split by KVM.
pub const EXIT_BYTES_MAX: usize = 4096;

/// A VM exit to userspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// `out`; the bytes are in [`Vcpu::data`], `size` a unit.
    PortWrite {
        /// Port.
        port: u16,
        /// Bytes of one unit.
        size: usize,
    },
    /// `in`; fill the answer with [`Vcpu::answer`].
    PortRead {
        /// Port.
        port: u16,
        /// Bytes of one unit.
        size: usize,
    },
    /// A store to an unbacked address.
    MmioWrite {
        /// Guest-physical address.
        address: u64,
    },
    /// A load from one; fill the answer with [`Vcpu::answer`].
    MmioRead {
        /// Guest-physical address.
        address: u64,
    },
    /// RDMSR of one of [`super::msr`]'s; answer with [`Vcpu::answer_msr`].
    MsrRead {
        /// Which one.
        index: u32,
    },
    /// WRMSR of one, the value in [`Vcpu::data`]; answer with [`Vcpu::answer_msr`].
    MsrWrite {
        /// Which one.
        index: u32,
    },
    /// HLT.
    Halt,
    /// The window that was asked for is open (see [`Vcpu::want_window`]): the guest could take an interrupt here.
    Window,
    /// A signal came; nothing happened in the guest.
    Interrupted,
    /// The guest is where a debugger wanted it to stand still (see [`Vcpu::debug`]).
    Trap,
    /// Triple fault.
    Shutdown,
    /// Anything else: a guest or KVM that this machine cannot go on with.
    Unexpected(String),
}

/// One vCPU and its VM.
#[derive(Debug)]
pub struct Vcpu {
    vcpu: VcpuFd,
    data: Vec<u8>,
    /// Where the answer to a read exit goes in the run area, and how long it is.
    pending: Option<*mut [u8]>,
    /// KVM has to finish the access of the last exit.
    unfinished: bool,
    /// The exit that finishing an access led to.
    ahead: Option<Exit>,
    msrs: Vec<kvm_msr_entry>,
    vm: VmFd,
    /// Mapped by KVM, so it must outlive the VM.
    ram: Arc<Ram>,
}

/// Execution breakpoints that the CPU's debug registers hold.
pub const BREAKPOINTS_MAX: usize = 4;

/// The registers of a vCPU that stands still.
#[derive(Clone, Debug)]
pub struct CpuState {
    /// General.
    pub regs: kvm_regs,
    /// System.
    pub sregs: kvm_sregs,
    /// Floating point and vector, as FXSAVE has them.
    pub fpu: kvm_fpu,
}

pub(super) fn kvm_failed(what: &str) -> impl Fn(kvm_ioctls::Error) -> Error + '_ {
    move |source| Error::environment(format!("KVM refused to {what}: {source}"))
}

/// The only memory slot.
const SLOT: u32 = 0;

/// Maps `ram` as the VM's memory, or maps it again with other flags.
fn map(vm: &VmFd, ram: &Ram, flags: u32) -> Result<(), Error> {
    let slot = kvm_userspace_memory_region {
        slot: SLOT,
        flags,
        guest_phys_addr: 0,
        memory_size: ram.bytes(),
        userspace_addr: ram.host_address(),
    };
    // SAFETY: the range is the whole mapping of `ram`, which the `Vcpu` of this VM keeps for longer than the VM.
    unsafe { vm.set_user_memory_region(slot) }.map_err(kvm_failed("map guest memory"))
}

/// Opens /dev/kvm.
///
/// # Errors
/// With what to do about it.
pub fn open_kvm() -> Result<Kvm, Error> {
    Kvm::new().map_err(|source| {
        Error::environment(format!(
            "cannot open /dev/kvm: {source}. Load the kvm_intel or kvm_amd module, or give this user access (group kvm)"
        ))
    })
}

impl Vcpu {
    /// A VM over `ram` with one vCPU at `entry`, seeing `cpuid`.
    ///
    /// # Errors
    /// Whatever KVM refuses.
    pub fn new(kvm: &Kvm, ram: Arc<Ram>, cpuid: &CpuId, entry: u64) -> Result<Self, Error> {
        let vm = kvm.create_vm().map_err(kvm_failed("create a VM"))?;
        map(&vm, &ram, 0)?;
        msr::filter(&vm)?;
        let mut vcpu = vm.create_vcpu(0).map_err(kvm_failed("create a vCPU"))?;
        vcpu.set_cpuid2(cpuid).map_err(kvm_failed("set CPUID"))?;
        let sregs = vcpu.get_sregs().map_err(kvm_failed("read registers"))?;
        vcpu.set_sregs(&boot::entry_sregs(sregs))
            .map_err(kvm_failed("set system registers"))?;
        vcpu.set_regs(&boot::entry_regs(entry))
            .map_err(kvm_failed("set registers"))?;
        vcpu.set_sync_valid_reg(SyncReg::Register);
        Ok(Self {
            msrs: state::supported_msrs(&vcpu)?,
            vcpu,
            data: Vec::with_capacity(EXIT_BYTES_MAX),
            pending: None,
            unfinished: false,
            ahead: None,
            vm,
            ram,
        })
    }

    /// A timer that gets this vCPU out of [`Vcpu::run`]; for the thread that calls.
    ///
    /// # Errors
    /// See [`Kick::new`].
    pub fn kick(&self) -> Result<Kick, Error> {
        Kick::new(&self.vcpu)
    }

    /// Lets signals that wait for this thread end [`Vcpu::run`].
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn listen(&self) -> Result<(), Error> {
        kick::unblock_in_run(&self.vcpu)
    }

    /// From now on KVM notes which pages the guest writes.
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn track_writes(&mut self) -> Result<(), Error> {
        map(&self.vm, &self.ram, KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// The pages written since [`Vcpu::track_writes`] or the last call: one bit a page, from guest address 0.
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn take_written(&mut self) -> Result<Vec<u64>, Error> {
        self.vm
            .get_dirty_log(SLOT, self.ram.bytes() as usize)
            .map_err(kvm_failed("tell which pages were written"))
    }

    /// Everything the vCPU consists of, after [`Exit::Interrupted`].
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn capture(&mut self) -> Result<VcpuState, Error> {
        let can_interrupt = self.can_interrupt();
        VcpuState::capture(&self.vcpu, &self.msrs, can_interrupt)
    }

    /// Runs to the next exit that is not a signal's.
    ///
    /// # Errors
    /// See [`Vcpu::run`].
    pub fn run_uninterrupted(&mut self) -> Result<Exit, Error> {
        loop {
            match self.run()? {
                Exit::Interrupted => {}
                exit => return Ok(exit),
            }
        }
    }

    /// Finishes the access of the last exit, as the guest would when it runs on, without running it. That may write guest memory.
    ///
    /// # Errors
    /// A KVM that runs the guest all the same.
    pub fn finish_access(&mut self) -> Result<(), Error> {
        self.vcpu.set_kvm_immediate_exit(1);
        let finished = self.run();
        self.vcpu.set_kvm_immediate_exit(0);
        match finished? {
            Exit::Interrupted => Ok(()),
            exit => Err(Error::environment(format!(
                "KVM ran the guest instead of finishing its access: {exit:?}"
            ))),
        }
    }

    /// Becomes the vCPU that `state` was taken of. No access may be unfinished ([`Vcpu::finish_access`]).
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn adopt(&mut self, state: &VcpuState) -> Result<(), Error> {
        state.put(&self.vcpu)?;
        self.vcpu.sync_regs_mut().regs = state.regs;
        let run = self.vcpu.get_kvm_run();
        run.ready_for_interrupt_injection = u8::from(state.can_interrupt);
        run.if_flag = u8::from(state.can_interrupt);
        Ok(())
    }

    /// Whether the guest shall stop as soon as an interrupt can enter ([`Exit::Window`]).
    pub fn want_window(&mut self, wanted: bool) {
        self.vcpu.get_kvm_run().request_interrupt_window = u8::from(wanted);
    }

    /// Runs the guest to its next exit. The answer to the previous read exit must be given by then.
    ///
    /// # Errors
    /// When KVM cannot run the guest.
    pub fn run(&mut self) -> Result<Exit, Error> {
        if let Some(exit) = self.ahead.take() {
            return Ok(exit);
        }
        self.pending = None;
        self.unfinished = false;
        self.data.clear();
        let exit = match self.vcpu.run() {
            Ok(exit) => exit,
            Err(errno) if errno.errno() == libc::EINTR || errno.errno() == libc::EAGAIN => {
                return Ok(Exit::Interrupted);
            }
            Err(errno) => return Err(Error::environment(format!("KVM cannot run the guest: {errno}"))),
        };
        let exit = match exit {
            VcpuExit::IoOut(port, data) => {
                self.data.extend_from_slice(data);
                let size = self.port_size();
                Exit::PortWrite { port, size }
            }
            VcpuExit::IoIn(port, data) => {
                self.pending = Some(std::ptr::from_mut(data));
                let size = self.port_size();
                Exit::PortRead { port, size }
            }
            VcpuExit::MmioWrite(address, data) => {
                self.data.extend_from_slice(data);
                Exit::MmioWrite { address }
            }
            VcpuExit::MmioRead(address, data) => {
                self.pending = Some(std::ptr::from_mut(data));
                Exit::MmioRead { address }
            }
            VcpuExit::X86Rdmsr(msr) => Exit::MsrRead { index: msr.index },
            VcpuExit::X86Wrmsr(msr) => {
                self.data.extend_from_slice(&msr.data.to_le_bytes());
                Exit::MsrWrite { index: msr.index }
            }
            VcpuExit::Hlt => Exit::Halt,
            VcpuExit::IrqWindowOpen => Exit::Window,
            VcpuExit::Intr => Exit::Interrupted,
            VcpuExit::Debug(_) => Exit::Trap,
            VcpuExit::Shutdown => Exit::Shutdown,
            other => Exit::Unexpected(format!("{other:?}")),
        };
        self.unfinished = matches!(
            exit,
            Exit::PortWrite { .. }
                | Exit::PortRead { .. }
                | Exit::MmioWrite { .. }
                | Exit::MmioRead { .. }
                | Exit::MsrRead { .. }
                | Exit::MsrWrite { .. }
        );
        Ok(exit)
    }

    fn port_size(&mut self) -> usize {
        // SAFETY: the last exit was KVM_EXIT_IO, so `io` is the union's valid member.
        usize::from(unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.io.size }).max(1)
    }

    /// Bytes the guest wrote in the last exit.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The bytes to fill for the last read exit; empty after any other.
    pub fn answer(&mut self) -> &mut [u8] {
        match self.pending {
            // SAFETY: the slice lies in the mapped run area of this vCPU, which lives as long as `self`; it stays valid until
            // the next `run`, which clears `pending`; `&mut self` makes the access exclusive.
            Some(slice) => unsafe { &mut *slice },
            None => &mut [],
        }
    }

    /// Answers the last MSR exit: with a value, or with a general protection fault. At a fault no interrupt can enter: KVM would take both,
    /// let the fault enter, and forget the interrupt.
    pub fn answer_msr(&mut self, value: Option<u64>) {
        let run = self.vcpu.get_kvm_run();
        if value.is_none() {
            run.ready_for_interrupt_injection = 0;
        }
        // SAFETY: the last exit was KVM_EXIT_X86_RDMSR or WRMSR, so `msr` is the union's valid member.
        let msr = unsafe { &mut run.__bindgen_anon_1.msr };
        msr.error = u8::from(value.is_none());
        msr.data = value.unwrap_or(msr.data);
    }

    /// General registers as of the last exit.
    #[must_use]
    pub fn registers(&self) -> kvm_regs {
        self.vcpu.sync_regs().regs
    }

    /// Puts `registers` into the guest before it continues. At a read exit RAX still becomes [`Vcpu::answer`].
    pub fn set_registers(&mut self, registers: kvm_regs) {
        self.vcpu.sync_regs_mut().regs = registers;
        self.vcpu.set_sync_dirty_reg(SyncReg::Register);
    }

    /// Guest memory.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// All registers, before or after any exit.
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn state(&self) -> Result<CpuState, Error> {
        let failed = kvm_failed("read registers");
        Ok(CpuState {
            regs: self.vcpu.get_regs().map_err(&failed)?,
            sregs: self.vcpu.get_sregs().map_err(&failed)?,
            fpu: self.vcpu.get_fpu().map_err(&failed)?,
        })
    }

    /// Where SYSCALL leads.
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn system_call_entry(&self) -> Result<Option<u64>, Error> {
        state::system_call_entry(&self.vcpu)
    }

    /// Puts the vCPU elsewhere: these registers, before it runs.
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn enter(&mut self, regs: &kvm_regs, sregs: &kvm_sregs) -> Result<(), Error> {
        self.vcpu.set_sregs(sregs).map_err(kvm_failed("set system registers"))?;
        self.vcpu.set_regs(regs).map_err(kvm_failed("set registers"))
    }

    /// Makes the guest stand still, with [`Exit::Trap`], before the instructions at `breakpoints`, the first [`BREAKPOINTS_MAX`]. That
    /// does not change what the guest computes, where the KVM implements it: see [`crate::debug::support`].
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn debug(&mut self, breakpoints: &[u64]) -> Result<(), Error> {
        const DR7_RESERVED: u64 = 1 << 10;
        let mut debug = kvm_guest_debug::default();
        debug.arch.debugreg[7] = DR7_RESERVED;
        for (index, address) in breakpoints.iter().take(BREAKPOINTS_MAX).enumerate() {
            debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
            debug.arch.debugreg[index] = *address;
            // Global enable; condition and length 0 mean execution.
            debug.arch.debugreg[7] |= 2 << (2 * index);
        }
        self.vcpu.set_guest_debug(&debug).map_err(kvm_failed("set breakpoints"))
    }

    /// Whether an interrupt can enter the guest here (IF=1, no shadow, none pending).
    #[must_use]
    pub fn can_interrupt(&mut self) -> bool {
        let run = self.vcpu.get_kvm_run();
        run.ready_for_interrupt_injection != 0 && run.if_flag != 0
    }

    /// The vector of an interrupt that was let in and has not entered yet: a signal can come before it does, as well as behind it.
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn to_enter(&self) -> Result<Option<u8>, Error> {
        let events = self.vcpu.get_vcpu_events().map_err(kvm_failed("tell of interrupts"))?;
        Ok((events.interrupt.injected != 0).then_some(events.interrupt.nr))
    }

    /// Whether an interrupt can enter the guest behind the access of the last exit, which is finished for that: it may fault then (string input
    /// into unmapped memory, a load from a device that is pushed onto an unmapped stack, a trap flag), and KVM forgets an interrupt that is to
    /// enter beside a fault. It may also have a second part, an exit of its own, and no interrupt enters between the two.
    ///
    /// # Errors
    /// See [`Vcpu::run`].
    pub fn can_interrupt_behind_access(&mut self) -> Result<bool, Error> {
        if !self.can_interrupt() || !self.unfinished {
            return Ok(self.can_interrupt());
        }
        self.vcpu.set_kvm_immediate_exit(1);
        let finished = self.run();
        self.vcpu.set_kvm_immediate_exit(0);
        match finished? {
            Exit::Interrupted => {}
            exit => {
                self.ahead = Some(exit);
                return Ok(false);
            }
        }
        let events = self.vcpu.get_vcpu_events().map_err(kvm_failed("tell of exceptions"))?;
        let faults = events.exception.injected != 0 || events.exception.pending != 0;
        Ok(self.can_interrupt() && !faults)
    }

    /// Makes `vector` enter the guest when it continues.
    ///
    /// # Errors
    /// When KVM has one pending already: the caller's bug.
    pub fn interrupt(&mut self, vector: u8) -> Result<(), Error> {
        let interrupt = kvm_interrupt { irq: u32::from(vector) };
        // SAFETY: the ioctl reads one kvm_interrupt, which outlives the call.
        let result = unsafe { ioctl_with_ref(&self.vcpu, request::KVM_INTERRUPT(), &interrupt) };
        if result != 0 {
            return Err(Error::environment(format!(
                "KVM refused interrupt {vector}: {}",
                std::io::Error::last_os_error()
            )));
        }
        // The flag is refreshed only by the next exit; until then nothing more may be injected.
        self.vcpu.get_kvm_run().ready_for_interrupt_injection = 0;
        Ok(())
    }
}

/// The MSRs that a guest with this CPUID reads and only the host sets, with their values.
///
/// # Errors
/// Whatever KVM refuses.
pub fn host_msrs(kvm: &Kvm, cpuid: &CpuId) -> Result<Vec<(u32, u64)>, Error> {
    let vcpu = Vcpu::new(kvm, Arc::new(Ram::new(4)?), cpuid, 0)?;
    state::host_msrs(&vcpu.vcpu)
}

/// The CPUID table for the guest on this host.
///
/// # Errors
/// When KVM does not say what it supports.
pub fn guest_cpuid(kvm: &Kvm) -> Result<CpuId, Error> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm_failed("list CPUID"))?;
    Ok(cpuid::deterministic(supported))
}
