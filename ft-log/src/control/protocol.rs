//! What is said on the control socket: one JSON object a line, one answer a request.
//!
//! ```text
//! client ► {"command":"status"}
//! ft-log ◄ {"ok":{...}}   or   {"error":"why not"}
//! ```

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::configure::Change;

/// Longest request, so that a hostile client cannot make ft-log buffer more.
pub const REQUEST_BYTES_MAX: usize = 4096;
/// Most entries of one answer.
pub const ENTRIES_MAX: usize = 1000;

/// What a client wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Role, generation, LSNs, lag, peer, journal, arbiter; of every VM, if there are several and none is named.
    Status {
        /// Which VM; may be left out where there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<String>,
    },
    /// The VMs of this process.
    List {},
    /// Go on with a new journal segment at the next entry.
    Rotate {
        /// Which VM; may be left out where there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<String>,
    },
    /// Change the times of a running pair; answered when the entry that does is in the log.
    Configure {
        /// Which VM; may be left out where there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<String>,
        /// What changes.
        change: Change,
    },
    /// End one VM's side, or without a name the process, as SIGTERM does.
    Stop {
        /// Which VM; may be left out where there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<String>,
    },
    /// The journal's segments on disk.
    Segments {
        /// Which VM; may be left out where there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<String>,
    },
    /// Entries of a segment on disk.
    Entries {
        /// Which VM; may be left out where there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<String>,
        /// Its generation.
        generation: u32,
        /// Its number.
        segment: u32,
        /// First LSN that is wanted.
        #[serde(default)]
        from: u64,
        /// Most entries that are wanted; at most [`ENTRIES_MAX`].
        #[serde(default = "entries_max")]
        limit: usize,
    },
}

fn entries_max() -> usize {
    ENTRIES_MAX
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Done; what was asked for.
    Ok(Value),
    /// Not done, and why.
    Error(String),
}
