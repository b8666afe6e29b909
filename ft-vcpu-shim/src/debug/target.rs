//! Which stop of an execution is meant: `--to`, and the debugger's `goto`.

use std::{fmt, str::FromStr};

use ft_protocol::Lsn;

use crate::lockstep::history::StopRecord;

/// A stop, named by position or by log entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The stop at this exit count and offset.
    Stop {
        /// VM exits to userspace since power-on.
        exits: u64,
        /// Progress since that exit.
        offset: u32,
    },
    /// The stop at which this log entry has been applied.
    Entry(Lsn),
}

/// Where an execution is with respect to a [`Target`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// Before it.
    NotYet,
    /// There.
    Here,
    /// Behind it: the execution has no such stop.
    Passed,
}

impl Target {
    /// Whether the stop of `record` is the one meant.
    #[must_use]
    pub fn reached(&self, record: &StopRecord) -> Reached {
        match *self {
            Self::Stop { exits, offset } => match (record.position.exits, record.position.offset).cmp(&(exits, offset))
            {
                std::cmp::Ordering::Less => Reached::NotYet,
                std::cmp::Ordering::Equal => Reached::Here,
                std::cmp::Ordering::Greater => Reached::Passed,
            },
            Self::Entry(lsn) if record.entry < lsn => Reached::NotYet,
            Self::Entry(_) => Reached::Here,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stop { exits, offset: 0 } => write!(f, "exit {exits}"),
            Self::Stop { exits, offset } => write!(f, "exit {exits}+{offset}"),
            Self::Entry(lsn) => write!(f, "entry {lsn}"),
        }
    }
}

impl FromStr for Target {
    type Err = String;

    /// `EXITS`, `EXITS+OFFSET` or `lsn:LSN`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no position: give EXITS, EXITS+OFFSET or lsn:LSN");
        if let Some(lsn) = text.strip_prefix("lsn:") {
            let lsn = lsn.parse().ok().filter(|lsn| *lsn > 0).ok_or_else(wrong)?;
            return Ok(Self::Entry(Lsn(lsn)));
        }
        let (exits, offset) = text.split_once('+').unwrap_or((text, "0"));
        Ok(Self::Stop {
            exits: exits.parse().ok().filter(|exits| *exits > 0).ok_or_else(wrong)?,
            offset: offset.parse().map_err(|_| wrong())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_name_a_stop_reads_back() {
        let stop = |exits, offset| Ok(Target::Stop { exits, offset });
        for (text, target) in [
            ("17", stop(17, 0)),
            ("17+3", stop(17, 3)),
            ("lsn:9", Ok(Target::Entry(Lsn(9)))),
        ] {
            assert_eq!(text.parse(), target, "{text}");
        }
        for text in ["", "0", "lsn:0", "lsn:", "1+", "+1", "x", "-1", "1+x", "lsn:1+1"] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }
}
