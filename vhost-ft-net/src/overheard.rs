//! What a backup's TAP heard while it followed.
//!
//! A backup listens and sends nothing. When the primary is gone, switches flood what clients send to the guest; whatever of it
//! reaches this host would be lost if the TAP were attached only at go-live, and clients would have to send it a second time.

use std::collections::VecDeque;

/// Frames kept, newest first.
const FRAMES_MAX: usize = 64;
/// Older ones are history: their senders have given up or sent them again.
const AGE_NS: u64 = 1_000_000_000;

#[derive(Debug)]
struct Heard {
    frame: Vec<u8>,
    since_ns: u64,
}

/// The last frames.
#[derive(Debug, Default)]
pub struct Overheard {
    frames: VecDeque<Heard>,
}

impl Overheard {
    /// Notes a frame.
    pub fn note(&mut self, frame: &[u8], now_ns: u64) {
        let mut buffer = if self.frames.len() == FRAMES_MAX {
            self.frames.pop_front().map(|heard| heard.frame).unwrap_or_default()
        } else {
            Vec::new()
        };
        buffer.clear();
        buffer.extend_from_slice(frame);
        self.frames.push_back(Heard {
            frame: buffer,
            since_ns: now_ns,
        });
    }

    /// The oldest frame that is not history yet.
    pub fn take(&mut self, now_ns: u64) -> Option<Vec<u8>> {
        while let Some(heard) = self.frames.pop_front() {
            if now_ns.saturating_sub(heard.since_ns) <= AGE_NS {
                return Some(heard.frame);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_frames_come_out_in_order_and_old_ones_not_at_all() {
        let mut overheard = Overheard::default();
        overheard.note(b"history", 0);
        for number in 0..FRAMES_MAX as u8 {
            overheard.note(&[number], AGE_NS);
        }
        overheard.note(b"last", AGE_NS);
        let now = 2 * AGE_NS;
        assert_eq!(overheard.take(now), Some(vec![1]), "the oldest made room");
        for number in 2..FRAMES_MAX as u8 {
            assert_eq!(overheard.take(now), Some(vec![number]));
        }
        assert_eq!(overheard.take(now), Some(b"last".to_vec()));
        assert_eq!(overheard.take(now), None);
        overheard.note(b"old", 0);
        assert_eq!(overheard.take(AGE_NS + 1), None);
    }
}
