//! The host's counter of the conditional branches that a guest has retired, where it has a PMU. One of the homes of `unsafe`.
//!
//! ```text
//!   perf_event_open(exclude_host) ─► counts in guest mode only, kernel and user
//!        overflow ─► PMI ─► VM exit ─► signal, blocked everywhere but in KVM_RUN ─► KVM_RUN returns EINTR
//! ```
//! Which event counts is in [`family`]. What is made of the counts, and when they are not trusted, is in [`crate::lockstep::branches`].
//! Nothing of this has met a PMU yet: the machines it was written on have none, and were refused.

pub mod family;

use std::{
    fs::File,
    io::Read,
    os::fd::{AsRawFd, FromRawFd},
};

use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use nix::sys::signal::Signal;
use perf_event_open_sys::{bindings, perf_event_open};
use vmm_sys_util::ioctl::ioctl_with_ref;

use self::family::Event;
use super::{
    kick,
    vcpu::{Exit, Vcpu},
};
use crate::{
    error::Error,
    lockstep::{
        branches::{self, BranchClock, BranchCounter},
        position::{PositionClock, Until},
    },
};

mod request {
    //! The crate's wrapper takes the period itself, where the kernel wants to be told where it is.
    #![allow(
        missing_docs,
        unreachable_pub,
        reason = "the macro makes a public function without documentation"
    )]
    vmm_sys_util::ioctl_iow_nr!(PERF_EVENT_IOC_PERIOD, b'$' as u32, 4, u64);
}

const SIGNAL: Signal = Signal::SIGUSR2;
/// A period that no guest comes to the end of.
const NEVER: u64 = 1 << 62;

/// The counter of the calling thread, which is the one that runs the vCPU.
#[derive(Debug)]
pub struct PerfCounter {
    file: File,
}

impl PerfCounter {
    /// Opens a counter of `event`. The inner error says why there is none, for an operator.
    ///
    /// # Errors
    /// When the thread's signals cannot be set.
    pub fn open(event: &Event) -> Result<Result<Self, String>, Error> {
        kick::block(SIGNAL)?;
        let mut attributes = bindings::perf_event_attr {
            type_: bindings::PERF_TYPE_RAW,
            size: size_of::<bindings::perf_event_attr>() as u32,
            config: event.config,
            ..Default::default()
        };
        attributes.__bindgen_anon_1.sample_period = NEVER;
        attributes.set_exclude_host(1);
        attributes.set_pinned(1);
        // SAFETY: `attributes` is a whole perf_event_attr of the size it says; it asks for a count of this thread, which is harmless.
        let fd = unsafe {
            perf_event_open(
                &raw mut attributes,
                0,
                -1,
                -1,
                u64::from(bindings::PERF_FLAG_FD_CLOEXEC),
            )
        };
        if fd < 0 {
            return Ok(Err(refusal(&std::io::Error::last_os_error(), event)));
        }
        // SAFETY: the descriptor was just made and is nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        let counter = Self { file };
        Ok(counter.signal_this_thread().map(|()| counter))
    }

    /// Makes an overflow a signal to the calling thread.
    fn signal_this_thread(&self) -> Result<(), String> {
        #[repr(C)]
        struct Owner {
            kind: libc::c_int,
            id: libc::pid_t,
        }
        const F_OWNER_TID: libc::c_int = 0;
        const F_SETOWN_EX: libc::c_int = 15;
        const F_SETSIG: libc::c_int = 10;
        let owner = Owner {
            kind: F_OWNER_TID,
            id: nix::unistd::gettid().as_raw(),
        };
        let fd = self.file.as_raw_fd();
        // SAFETY: the descriptor is open as long as `self`; F_SETOWN_EX reads one f_owner_ex, which `owner` is, during the call.
        let failed = unsafe {
            libc::fcntl(fd, F_SETOWN_EX, &raw const owner) < 0
                || libc::fcntl(fd, F_SETSIG, SIGNAL as libc::c_int) < 0
                || libc::fcntl(fd, libc::F_SETFL, libc::O_ASYNC) < 0
        };
        if failed {
            let error = std::io::Error::last_os_error();
            return Err(format!(
                "the kernel gives no signal when the counter overflows: {error}"
            ));
        }
        Ok(())
    }
}

/// A clock, and the event it counts.
pub type Counted = (Event, Box<dyn PositionClock>);

/// A clock of this host's counter, for the calling thread, that passed its test. The inner error says why there is
/// none, for an operator.
///
/// # Errors
/// When not even the test can be made.
pub fn clock(kvm: &Kvm, cpuid: &CpuId) -> Result<Result<Counted, String>, Error> {
    let event = match family::event_of(cpuid.as_slice()) {
        Ok(event) => event,
        Err(reason) => return Ok(Err(reason)),
    };
    let counter = match PerfCounter::open(&event)? {
        Ok(counter) => counter,
        Err(reason) => return Ok(Err(reason)),
    };
    let mut clock = BranchClock::new(counter, event.margin);
    Ok(match branches::self_test(kvm, &mut clock)? {
        Ok(()) => Ok((event, Box::new(clock))),
        Err(what) => Err(format!(
            "{} does not name places on this host: {what}; use state deltas",
            event.name
        )),
    })
}

/// What the kernel's refusal means to an operator.
fn refusal(error: &std::io::Error, event: &Event) -> String {
    let advice = match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP | libc::ENOSYS) => {
            "this host has no performance counters (a virtual machine without a virtual PMU has none); use state deltas"
        }
        Some(libc::EACCES | libc::EPERM) => {
            "this user may not count what a guest's kernel does: give the program CAP_PERFMON, or set the sysctl kernel.perf_event_paranoid to 1"
        }
        Some(libc::EMFILE | libc::EBUSY | libc::ENOSPC) => {
            "the counters are taken: end what else counts here (perf, the NMI watchdog: sysctl kernel.nmi_watchdog=0)"
        }
        Some(libc::EINVAL) => "this kernel or CPU cannot count a guest alone (exclude_host); use state deltas",
        _ => "use state deltas",
    };
    format!("no performance counter for {}: {error}; {advice}", event.name)
}

impl BranchCounter for PerfCounter {
    fn count(&mut self, _vcpu: &Vcpu) -> Result<u64, Error> {
        let mut count = [0; 8];
        match self.file.read(&mut count) {
            Ok(8) => Ok(u64::from_ne_bytes(count)),
            // A pinned counter that lost its place.
            Ok(_) => Err(Error::environment(
                "the counter of branches was taken away: end what else counts here (perf, the NMI watchdog)",
            )),
            Err(error) => Err(Error::environment(format!(
                "cannot read the counter of branches: {error}"
            ))),
        }
    }

    fn overflow(&mut self, after: Option<u32>) -> Result<(), Error> {
        let period = after.map_or(NEVER, |after| u64::from(after.max(1)));
        // SAFETY: the descriptor is a perf event's and open; the ioctl reads one u64 during the call.
        if unsafe { ioctl_with_ref(&self.file, request::PERF_EVENT_IOC_PERIOD(), &period) } < 0 {
            let error = std::io::Error::last_os_error();
            return Err(Error::environment(format!(
                "cannot set when the counter of branches overflows: {error}"
            )));
        }
        Ok(())
    }

    fn run(&mut self, vcpu: &mut Vcpu, _until: Until) -> Result<Exit, Error> {
        let exit = vcpu.run()?;
        if exit == Exit::Interrupted {
            // One that came while another signal ended the run is not to end the next one.
            while kick::take(SIGNAL) {}
        }
        Ok(exit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: Event = Event {
        name: "an event",
        config: 0x00c4,
        margin: 100,
    };

    /// A real system call. Without a PMU it is refused; with one, nothing is counted as long as no guest runs.
    #[test]
    fn this_host_has_a_counter_or_says_why_not() {
        match PerfCounter::open(&EVENT).unwrap() {
            Err(reason) => assert!(
                reason.starts_with("no performance counter for an event") && reason.contains("; "),
                "{reason}"
            ),
            Ok(mut counter) => {
                counter.overflow(Some(1)).unwrap();
                let mut count = [0; 8];
                assert_eq!(counter.file.read(&mut count).unwrap(), 8);
                assert_eq!(u64::from_ne_bytes(count), 0);
            }
        }
    }

    #[test]
    fn every_refusal_tells_what_to_do() {
        let says = |errno, advice: &str| {
            let text = refusal(&std::io::Error::from_raw_os_error(errno), &EVENT);
            assert!(text.contains(advice), "{text}");
        };
        says(libc::ENOENT, "has no performance counters");
        says(libc::EACCES, "CAP_PERFMON");
        says(libc::EBUSY, "nmi_watchdog");
        says(libc::EINVAL, "exclude_host");
        says(libc::EIO, "use state deltas");
    }
}
