//! `ft-log`: orders, journals and replicates the log of a fault-tolerant VM, and decides with its peer who goes live.
//!
//! ```text
//!              unix socket                    shared-memory rings                     TCP
//!  shim, devices ──► [clients] ──► [local]        │                  [channel] ◄──────────► peer
//!                                     └── [merge] ┴─► [daemon] ◄────────┘  │                 ▲
//!                                                      │  ▲ │              └─► [journal_writer]
//!                       ft_protocol::Replica ◄─ events ┘  │ └─► [arbiter]        [heartbeat] ─┘ UDP
//!                                            ── actions ──┘
//! ```
//! Beside the daemon, on files only: [inspect] (dump, verify, stats of a journal). In a thread of its own: [control] (status, orders, metrics).
//!
//! A VM is one thread, one io_uring ([uring]), one loop ([daemon]); a process has one or many of them ([start]). The decisions are
//! `ft_protocol`'s.

pub mod arbiter;
pub mod channel;
pub mod cli;
pub mod clients;
pub mod config;
mod config_file;
pub mod control;
pub mod daemon;
mod earlier_journal;
pub mod exit;
pub mod heartbeat;
pub mod inspect;
pub mod journal_writer;
pub mod local;
pub mod merge;
mod sockaddr;
pub mod start;
pub mod timers;
pub mod tls;
pub mod token;
pub mod uring;
