//! Rolling digests of an execution: what a replay must reproduce at every stop.

use kvm_bindings::kvm_regs;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Three chains, so that a divergence says what kind it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digests {
    /// Kind, address and data of every exit, and the vector of every interrupt.
    pub exits: u64,
    /// General registers at every exit.
    pub registers: u64,
    /// Everything the guest asked of devices and wrote to its console.
    pub outputs: u64,
}

/// Stands where an exit has its kind; those are numbered from 1 on.
const NAMED: u8 = 0xfe;

fn chain(digest: &mut u64, bytes: &[u8]) {
    *digest = xxh3_64_with_seed(bytes, *digest);
}

impl Digests {
    /// One exit: `kind` and `address` tell what it was, `data` what the guest wrote.
    pub fn exit(&mut self, kind: u8, address: u64, data: &[u8]) {
        let mut head = [0; 9];
        head[0] = kind;
        head[1..].copy_from_slice(&address.to_le_bytes());
        chain(&mut self.exits, &head);
        if !data.is_empty() {
            chain(&mut self.exits, data);
        }
    }

    /// An interrupt entered the guest.
    pub fn interrupt(&mut self, vector: u8) {
        chain(&mut self.exits, &[0xff, vector]);
    }

    /// The registers at an exit.
    pub fn registers(&mut self, regs: &kvm_regs) {
        let words = [
            regs.rax,
            regs.rbx,
            regs.rcx,
            regs.rdx,
            regs.rsi,
            regs.rdi,
            regs.rsp,
            regs.rbp,
            regs.r8,
            regs.r9,
            regs.r10,
            regs.r11,
            regs.r12,
            regs.r13,
            regs.r14,
            regs.r15,
            regs.rip,
            regs.rflags,
        ];
        let mut bytes = [0; 18 * 8];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        chain(&mut self.registers, &bytes);
    }

    /// A place between exits, `offset` after the last one, and the registers there.
    pub fn named(&mut self, offset: u32, regs: &kvm_regs) {
        self.exit(NAMED, u64::from(offset), &[]);
        self.registers(regs);
    }

    /// An output with this digest left the guest.
    pub fn output(&mut self, digest: u64) {
        chain(&mut self.outputs, &digest.to_le_bytes());
    }

    /// All three in one, as log entries carry it.
    #[must_use]
    pub fn combined(&self) -> u64 {
        self.exits ^ self.registers.rotate_left(21) ^ self.outputs.rotate_left(42)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_content_matter() {
        let mut one = Digests::default();
        one.exit(1, 0x3f8, b"a");
        one.exit(1, 0x3f8, b"b");
        let mut other = Digests::default();
        other.exit(1, 0x3f8, b"b");
        other.exit(1, 0x3f8, b"a");
        assert_ne!(one.combined(), other.combined());
        let mut registers = one;
        registers.registers(&kvm_regs {
            r15: 1,
            ..Default::default()
        });
        assert_ne!(one.combined(), registers.combined());
    }
}
