//! Ring 3's way to ring 0: `ud2` with a function number, and ring 0's way back with an exception.
//!
//! SYSCALL and `int n` would do too, but #UD is the one every KVM delivers. A call does all that a round of work needs:
//! ring doorbells, set the alarm, sleep, read the clock. From ring 0 a register access is the cheaper one.

use super::console::fatal;
use bitflags::bitflags;
use core::arch::asm;

const CALL_MAGIC: u32 = 0x4C45_4447;
const CALL_WAIT: u64 = 0;
const CALL_CONSOLE: u64 = 1;
const CALL_POWER_OFF: u64 = 2;

bitflags! {
    /// Queues whose device should look at them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Doorbells: u32 {
        /// The disk's only queue.
        const DISK = 1;
        /// Fresh receive buffers.
        const RECEIVE = 2;
        /// Frames to send.
        const TRANSMIT = 4;
    }

    /// Interrupts since the last call.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Pending: u32 {
        /// The alarm went off, and is off now.
        const CLOCK = 1;
        /// The disk finished something.
        const DISK = 2;
        /// The network did.
        const NETWORK = 4;
    }
}

/// What to do with the alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Alarm {
    /// Leave it as it is.
    Keep,
    /// Set it.
    At {
        /// Virtual time.
        deadline_ns: u64,
    },
}

/// Rings the doorbells, sets the alarm, and, if it may, sleeps until an interrupt is pending.
/// Returns the virtual time and the interrupts that came.
pub(crate) fn wait(doorbells: Doorbells, alarm: Alarm, may_sleep: bool) -> (u64, Pending) {
    let deadline = match alarm {
        Alarm::Keep => u64::MAX,
        Alarm::At { deadline_ns } => deadline_ns.min(u64::MAX - 1),
    };
    let now_ns;
    let pending: u64;
    // SAFETY: this is the call contract of boot.S. Devices may write to memory meanwhile, so the compiler may not keep
    // memory in registers: no `nomem`.
    unsafe {
        asm!(
            "ud2",
            in("r10") u64::from(CALL_MAGIC),
            inout("rax") CALL_WAIT => now_ns,
            inout("rdi") u64::from(doorbells.bits()) => _,
            inout("rsi") deadline => _,
            inout("rdx") u64::from(may_sleep) => pending,
            out("rcx") _,
            options(nostack),
        );
    }
    (now_ns, Pending::from_bits_truncate(pending as u32))
}

/// Writes to the console.
pub(crate) fn write_console(bytes: &[u8]) {
    // SAFETY: this is the call contract of boot.S; ring 0 only reads the bytes.
    unsafe {
        asm!(
            "ud2",
            in("r10") u64::from(CALL_MAGIC),
            inout("rax") CALL_CONSOLE => _,
            inout("rdi") bytes.as_ptr() => _,
            inout("rsi") bytes.len() => _,
            out("rdx") _,
            out("rcx") _,
            options(nostack),
        );
    }
}

/// The end.
pub(crate) fn power_off() -> ! {
    // SAFETY: this is the call contract of boot.S; ring 0 does not come back.
    unsafe {
        asm!("ud2", in("r10") u64::from(CALL_MAGIC), in("rax") CALL_POWER_OFF, options(noreturn, nostack));
    }
}

/// Ring 3 faulted; ring 0 came back here on a fresh stack.
#[unsafe(no_mangle)]
extern "C" fn ring3_exception(vector: u64, error: u64, instruction: u64, fault_address: u64) -> ! {
    fatal(format_args!(
        "exception {vector} error {error:#x} at {instruction:#x}, address {fault_address:#x}"
    ));
}
