//! Where the data of a request is while the kernel reads or writes it.
//!
//! ```text
//!  protected:  guest memory ─copy─► bounce buffer ─► image          image ─► bounce buffer ─logged, delivered─► guest memory
//!  alone:      guest memory ──────────────────────► image           image ──────────────────────────────────► guest memory
//!              through an aligned buffer of our own where --direct wants an alignment that the guest's memory has not, or the image is
//!              shared with other readers
//! ```

use ft_vhost::{
    device::{Buffer, GuestBuffer},
    guest_side::{RingError, blk::BlkGuestSide},
};
use nix::{errno::Errno, libc};

/// Data in buffers of our own beyond which requests wait.
pub(crate) const BOUNCE_BYTES_MAX: usize = 32 << 20;
/// Buffers kept for reuse.
const SPARE_BUFFERS: usize = 64;
/// And how large they may be.
const SPARE_BYTES_MAX: usize = 1 << 20;

/// The data of one request.
#[derive(Debug, Default)]
pub(crate) struct Data {
    /// Where it is, between two operations.
    pub(crate) buffer: Buffer,
    /// Where in a buffer of our own it begins.
    pub(crate) from: usize,
    /// Bytes of that, counted against [`BOUNCE_BYTES_MAX`].
    pub(crate) bounced: usize,
}

/// What became of the wish for a buffer.
#[derive(Debug)]
pub(crate) enum Prepared {
    /// Here it is.
    Ready(Data),
    /// Buffers are short: when another request is done.
    Later,
    /// The guest no longer waits for it.
    Forgotten,
    /// It cannot be.
    Failed(Errno),
}

/// Buffers, and what is known of them.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    spare: Vec<Vec<u8>>,
    spare_parts: Vec<Vec<libc::iovec>>,
    /// Data in buffers of our own.
    pub(crate) bounced: usize,
}

impl Buffers {
    /// An empty buffer.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer
    }

    /// Takes a buffer back.
    pub(crate) fn recycle(&mut self, buffer: Vec<u8>) {
        if (1..=SPARE_BYTES_MAX).contains(&buffer.capacity()) && self.spare.len() < SPARE_BUFFERS {
            self.spare.push(buffer);
        }
    }

    /// The data of a request is no longer needed.
    pub(crate) fn release(&mut self, data: Data) {
        self.bounced -= data.bounced;
        match data.buffer {
            Buffer::None => {}
            Buffer::Bytes(bytes) => self.recycle(bytes),
            Buffer::Guest(buffer) => self.spare_parts.push(buffer.into_parts()),
        }
    }

    /// A buffer with room for `length` bytes that begin at a multiple of `alignment`, and where they do.
    pub(crate) fn aligned(&mut self, length: usize, alignment: usize) -> (Vec<u8>, usize) {
        let mut buffer = self.take();
        buffer.reserve(length + alignment);
        let from = buffer.as_ptr().align_offset(alignment);
        buffer.resize(from, 0);
        (buffer, from)
    }

    /// Guest memory for request `id` of a guest that nobody protects, or an aligned buffer: always that, if it `bounces`.
    pub(crate) fn direct(
        &mut self,
        guest: &BlkGuestSide,
        id: u64,
        length: usize,
        writes: bool,
        alignment: usize,
        bounces: bool,
    ) -> Result<Prepared, RingError> {
        let Some((memory, segments)) = guest.data(id) else {
            return Ok(Prepared::Forgotten);
        };
        let parts = self.spare_parts.pop().unwrap_or_default();
        let Some(buffer) = GuestBuffer::new(memory, segments, parts) else {
            return Ok(Prepared::Failed(Errno::EFAULT));
        };
        if !bounces && (alignment == 1 || buffer.is_aligned(alignment)) {
            return Ok(Prepared::Ready(Data {
                buffer: Buffer::Guest(buffer),
                ..Data::default()
            }));
        }
        self.spare_parts.push(buffer.into_parts());
        if self.bounced != 0 && self.bounced + length > BOUNCE_BYTES_MAX {
            return Ok(Prepared::Later);
        }
        let (mut bytes, from) = self.aligned(length, alignment);
        if writes {
            // Within what was reserved: it stays where it is.
            guest.read_out(id, &mut bytes)?;
        } else {
            bytes.resize(from + length, 0);
        }
        self.bounced += length;
        Ok(Prepared::Ready(Data {
            buffer: Buffer::Bytes(bytes),
            from,
            bounced: length,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_buffers_are_aligned_whatever_is_reused() {
        let mut buffers = Buffers::default();
        for (length, alignment) in [(512, 512), (4096, 4096), (65536, 512), (100, 4096), (1 << 20, 4096)] {
            let (mut buffer, from) = buffers.aligned(length, alignment);
            let start = buffer.as_ptr();
            buffer.resize(from + length, 7);
            assert_eq!(buffer.as_ptr(), start, "it must not move");
            assert!((start.addr() + from).is_multiple_of(alignment));
            buffers.recycle(buffer);
        }
    }
}
