//! The Output Rule, judged from outside: no frame before its commit.
//!
//! ```text
//!  what passed the switch, in order            what host B has: its journal, executed again
//!    acknowledged 56                             frame at entry 55
//!    frame ─────────── is that frame ──────────► frame at entry 57   ... and 57 was acknowledged before
//!    acknowledged 60                             frame at entry 61   never seen: committed, and the host died
//! ```
//! Which entry marks which frame nobody is believed: host B's journal is executed again, and says what the guest sends at which entry.

use ft_protocol::Lsn;

use crate::capture::Seen;

/// A frame that the guest of the executed journal sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    /// The entry that marks it.
    pub marker: Lsn,
    /// The frame.
    pub frame: Vec<u8>,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Frames that passed.
    pub frames: usize,
    /// Of these: left before host B had acknowledged their entry.
    pub early: usize,
    /// Of these: host B has no entry for them.
    pub unknown: usize,
    /// The first of each, in words.
    pub examples: Vec<String>,
}

impl Verdict {
    /// What is wrong, in words; nothing if the rule was kept, and there was something to keep it for.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        if self.frames == 0 {
            return vec!["no frame of the guest passed the switch: the capture shows nothing".to_owned()];
        }
        self.examples.clone()
    }
}

/// Holds what passed against what the journal has. The frames that passed are the journal's, from some frame on (a bridge drops what comes
/// before its port forwards), without a gap.
#[must_use]
pub fn judge(seen: &[Seen], sent: &[Sent]) -> Verdict {
    let mut passed: Vec<(&[u8], Lsn)> = Vec::new();
    let mut acknowledged = Lsn::ZERO;
    for one in seen {
        match one {
            Seen::Acknowledged(lsn) => acknowledged = acknowledged.max(*lsn),
            Seen::Frame(frame) => passed.push((frame, acknowledged)),
        }
    }
    let agrees = |from: &usize| {
        passed
            .iter()
            .zip(&sent[*from..])
            .all(|((frame, _), sent)| *frame == sent.frame)
    };
    let from = (0..sent.len()).find(agrees);
    let mut verdict = Verdict {
        frames: passed.len(),
        ..Verdict::default()
    };
    let known = &sent[from.unwrap_or(sent.len())..];
    for (number, (_, acknowledged)) in passed.iter().enumerate() {
        match known.get(number) {
            Some(Sent { marker, .. }) if marker > acknowledged => {
                verdict.early += 1;
                if verdict.early == 1 {
                    verdict.examples.push(format!(
                        "frame {number} is marked by entry {marker}, and left when host B had acknowledged {acknowledged}"
                    ));
                }
            }
            Some(_) => {}
            None => {
                verdict.unknown += 1;
                if verdict.unknown == 1 {
                    verdict
                        .examples
                        .push(format!("frame {number} left, and host B's journal does not send it"));
                }
            }
        }
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(byte: u8) -> Seen {
        Seen::Frame(vec![byte])
    }

    fn acknowledged(lsn: u64) -> Seen {
        Seen::Acknowledged(Lsn(lsn))
    }

    fn journal() -> Vec<Sent> {
        let sent = [(5, 1), (7, 1), (9, 2), (12, 1)];
        sent.map(|(marker, byte)| Sent {
            marker: Lsn(marker),
            frame: vec![byte],
        })
        .into()
    }

    #[test]
    fn what_leaves_after_its_acknowledgement_is_good() {
        let seen = [acknowledged(7), frame(1), frame(1), acknowledged(9), frame(2)];
        let verdict = judge(&seen, &journal());
        assert_eq!((verdict.frames, verdict.problems()), (3, vec![]));
        // The first frame was dropped by a bridge; frames that are alike do not hide it.
        let verdict = judge(&[acknowledged(20), frame(1), frame(2), frame(1)], &journal());
        assert_eq!(verdict.problems(), [""; 0]);
    }

    #[test]
    fn what_leaves_early_is_told() {
        let verdict = judge(
            &[acknowledged(6), frame(1), frame(1), acknowledged(9), frame(2)],
            &journal(),
        );
        assert_eq!((verdict.early, verdict.unknown), (1, 0));
        assert!(verdict.problems()[0].contains("frame 1 is marked by entry 7"));
    }

    #[test]
    fn what_the_journal_does_not_have_is_told() {
        for seen in [
            vec![frame(3)],
            vec![frame(2), frame(2)],
            vec![frame(1), frame(2), frame(1), frame(1)],
        ] {
            let mut all = vec![acknowledged(99)];
            all.extend(seen);
            let verdict = judge(&all, &journal());
            assert!(verdict.unknown > 0, "{all:?}");
            assert!(verdict.problems()[0].contains("does not send it"));
        }
        assert!(judge(&[acknowledged(9)], &journal()).problems()[0].contains("shows nothing"));
    }
}
