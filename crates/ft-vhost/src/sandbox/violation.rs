//! A system call that the filter forbids: one line, then the end.

use nix::{
    libc,
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
};

const SAID: &[u8] = b"vhost-user: the sandbox forbids system call ";
const ADVISED: &[u8] =
    b" (its name: `ausyscall N`). The daemon was taken over, or needs more than it is allowed: report it; \
--sandbox off does without\n";
/// Where the kernel puts the number of the call in a `siginfo_t` of SIGSYS (asm-generic/siginfo.h: three ints, a hole, an address).
const NUMBER_AT: usize = 24;
/// Decimal digits of any `c_int`.
const DIGITS_MAX: usize = 10;

extern "C" fn end(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel hands over a `siginfo_t`, which is longer than that, aligned, and has an int there.
    let number = unsafe { info.byte_add(NUMBER_AT).cast::<libc::c_int>().read() };
    let mut digits = [0; DIGITS_MAX];
    say(SAID);
    say(decimal(number.unsigned_abs(), &mut digits));
    say(ADVISED);
    // SAFETY: abort(3) may be called in a signal handler.
    unsafe { libc::abort() }
}

fn say(bytes: &[u8]) {
    // SAFETY: write(2) may be called in a signal handler, and the bytes are there.
    unsafe { libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len()) };
}

/// The digits of a number; nothing is allocated.
fn decimal(mut number: u32, digits: &mut [u8; DIGITS_MAX]) -> &[u8] {
    let mut first = DIGITS_MAX;
    loop {
        first -= 1;
        digits[first] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &digits[first..];
        }
    }
}

/// Says which call it was, and aborts, when the kernel stops one.
///
/// # Errors
/// As sigaction(2).
pub(super) fn end_clearly() -> nix::Result<()> {
    let action = SigAction::new(SigHandler::SigAction(end), SaFlags::SA_SIGINFO, SigSet::empty());
    // SAFETY: the handler calls only what is allowed in one, and does not return.
    unsafe { sigaction(Signal::SIGSYS, &action) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal() {
        for number in [0, 9, 10, 59, 4_294_967_295] {
            assert_eq!(decimal(number, &mut [0; DIGITS_MAX]), number.to_string().as_bytes());
        }
    }
}
