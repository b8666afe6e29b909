//! Two hosts, a client and a witness, all on one machine.
//!
//! ```text
//!   client ────────┐ LAN 10.77.0.0/24
//!  (witness)   ┌───┴────┐              a namespace each: client, switch, host A, host B
//!              │ switch │              [netns], [topology]
//!              └─┬────┬─┘
//!       host A ──┘    └── host B       the four real daemons each: [pair], [process]
//!       TAP, VM  ═wire═   TAP, VM      what they say: [events]
//! ```
//!
//! [`scenario`] boots the pair with a [`guest`], lets [`witness`] drive the guest's ledger from outside (and [`download`] fetch a file
//! from a Linux guest), injects a [`faults::Fault`], and
//! hands what was seen to the judges: [`judge`] (what clients were told against what is stored), [`roles`] (who ended
//! as what) and, with a [`capture`] at the switch, [`output_rule`] (what left against what was committed). [`report`] and [`picture`] tell a person; [`bench`] measures. The judges are pure: no socket, no clock, no process.

pub mod bench;
pub mod capture;
pub mod clock;
pub mod download;
pub mod error;
pub mod events;
pub mod faults;
pub mod guest;
pub mod judge;
pub mod ledger;
pub mod netns;
pub mod offline;
pub mod output_rule;
pub mod pair;
pub mod picture;
pub mod process;
pub mod report;
pub mod roles;
pub mod scenario;
pub mod signals;
pub mod topology;
pub mod witness;
