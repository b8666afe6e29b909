//! Getting a vCPU that does not exit out of KVM_RUN after a while.
//!
//! ```text
//!   arm ──► timer ──► signal, blocked everywhere but in KVM_RUN ──► KVM_RUN returns EINTR ──► take
//! ```
//! Blocked, so that no other system call of the thread is interrupted; pending, so that a signal between arming and KVM_RUN is
//! not lost. One of the homes of `unsafe`.

use std::time::Duration;

use kvm_bindings::{KVMIO, kvm_signal_mask};
use kvm_ioctls::VcpuFd;
use nix::{
    sys::{
        signal::{SigEvent, SigSet, SigevNotify, Signal},
        timer::{Expiration, Timer, TimerSetTimeFlags},
    },
    time::ClockId,
    unistd::gettid,
};
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::error::Error;

mod request {
    //! The ioctl that kvm-ioctls does not wrap.
    #![allow(
        missing_docs,
        unreachable_pub,
        reason = "the macro makes a public function without documentation"
    )]
    use super::{KVMIO, kvm_signal_mask};
    vmm_sys_util::ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kvm_signal_mask);
}

const SIGNAL: Signal = Signal::SIGUSR1;
/// Bytes of the kernel's signal set on x86-64.
const SIGNAL_SET_BYTES: u32 = 8;

/// `kvm_signal_mask` with its set.
#[repr(C)]
struct SignalMask {
    bytes: u32,
    set: [u8; SIGNAL_SET_BYTES as usize],
}

/// The timer of one vCPU thread.
#[derive(Debug)]
pub struct Kick {
    timer: Timer,
    armed: bool,
}

impl Kick {
    /// A timer for the calling thread, which is the one that runs `vcpu` from now on.
    ///
    /// # Errors
    /// When the kernel has no timer, or KVM refuses the signal mask.
    pub(super) fn new(vcpu: &VcpuFd) -> Result<Self, Error> {
        block(SIGNAL)?;
        unblock_in_run(vcpu)?;
        let notify = SigEvent::new(SigevNotify::SigevThreadId {
            signal: SIGNAL,
            thread_id: gettid().as_raw(),
            si_value: 0,
        });
        let timer =
            Timer::new(ClockId::CLOCK_MONOTONIC, notify).map_err(|errno| failed("make a timer", &errno.into()))?;
        Ok(Self { timer, armed: false })
    }

    /// Whether the timer runs.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.armed
    }

    /// Makes KVM_RUN return after `after`, once.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn arm(&mut self, after: Duration) -> Result<(), Error> {
        self.timer
            .set(Expiration::OneShot(after.into()), TimerSetTimeFlags::empty())
            .map_err(|errno| Error::environment(format!("cannot set the timer of the vCPU: {errno}")))?;
        self.armed = true;
        Ok(())
    }

    /// Whether the timer fired; then it does not run any more.
    pub fn take(&mut self) -> bool {
        let fired = take(SIGNAL);
        if fired {
            self.armed = false;
        }
        fired
    }
}

fn failed(what: &str, source: &std::io::Error) -> Error {
    Error::environment(format!(
        "cannot {what}, by which a guest that does not exit is stopped: {source}"
    ))
}

/// From now on `signal` waits in this thread until it is taken, or until KVM_RUN.
pub(super) fn block(signal: Signal) -> Result<(), Error> {
    let blocked = SigSet::from(signal).thread_block();
    blocked.map_err(|errno| failed("block a signal", &errno.into()))
}

/// Lets every signal of the calling thread end KVM_RUN of `vcpu`.
pub(super) fn unblock_in_run(vcpu: &VcpuFd) -> Result<(), Error> {
    let mask = SignalMask {
        bytes: SIGNAL_SET_BYTES,
        set: [0; SIGNAL_SET_BYTES as usize],
    };
    // SAFETY: KVM reads the head and as many bytes of the set as the head says; `mask` has both and outlives the call.
    let result = unsafe { ioctl_with_ref(vcpu, request::KVM_SET_SIGNAL_MASK(), &mask) };
    if result != 0 {
        return Err(failed("set KVM's signal mask", &std::io::Error::last_os_error()));
    }
    Ok(())
}

/// Takes `signal` if it waits.
pub(super) fn take(signal: Signal) -> bool {
    let set = SigSet::from(signal);
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both pointers are valid for the call; no information about the signal is asked for.
    unsafe { libc::sigtimedwait(set.as_ref(), std::ptr::null_mut(), &raw const none) == signal as i32 }
}
