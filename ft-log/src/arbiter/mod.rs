//! Arbiters: who may go live.
//!
//! An arbiter gives each generation of a VM to at most one asker, for ever, and says so again when the same asker asks again.
//! It is asked step by step over the ring, so that one that does not answer stops nobody.

mod address;
mod claim;
mod directory;
mod etcd;

use std::io;

use ft_protocol::{Generation, Verdict};

pub use self::address::{AddressError, ArbiterAddress};
use self::claim::Asker;
use crate::token::{Done, Ring};

/// The arbiter of this daemon. One more kind is one more variant.
#[derive(Debug)]
pub enum Arbiter {
    /// A directory on storage that both hosts share.
    Directory(directory::Directory),
    /// An etcd cluster.
    Etcd(etcd::Etcd),
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The generation that was asked for.
    pub generation: Generation,
    /// The verdict.
    pub verdict: Verdict,
    /// Who has the generation, or why there is no answer.
    pub detail: String,
}

impl Arbiter {
    /// The arbiter at `address`, asked for `vm` in the name of `host`.
    ///
    /// # Errors
    /// When the kernel has no random bytes for this asker's identity, or no thread for it.
    pub fn new(address: &ArbiterAddress, vm: &str, host: &str) -> io::Result<Self> {
        let asker = Asker::new(vm, host)?;
        Ok(match address {
            ArbiterAddress::Directory(path) => Self::Directory(directory::Directory::new(path.clone(), asker)),
            ArbiterAddress::Etcd { endpoints, prefix } => Self::Etcd(etcd::Etcd::new(endpoints, prefix, asker)?),
        })
    }

    /// Asks for a generation; while an earlier question has no answer, nothing new is asked.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn ask(&mut self, ring: &mut Ring, generation: Generation, now_ns: u64) -> io::Result<()> {
        match self {
            Self::Directory(directory) => directory.ask(ring, generation, now_ns),
            Self::Etcd(etcd) => etcd.ask(ring, generation, now_ns),
        }
    }

    /// Takes a completion of [`Token::Arbiter`](crate::token::Token::Arbiter).
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn completed(&mut self, ring: &mut Ring, done: Done) -> io::Result<Option<Answer>> {
        match self {
            Self::Directory(directory) => directory.completed(ring, done),
            Self::Etcd(etcd) => etcd.completed(ring, done),
        }
    }

    /// Since when a question has no answer.
    #[must_use]
    pub fn asked_at_ns(&self) -> Option<u64> {
        match self {
            Self::Directory(directory) => directory.asked_at_ns(),
            Self::Etcd(etcd) => etcd.asked_at_ns(),
        }
    }
}
