//! What an asker writes where it claims a generation, for every kind of arbiter.

use std::io;

use ft_client::{events::wall_ns, handshake::hex};
use ft_protocol::{Generation, Verdict};
use serde_json::{Value, json};

/// Who asks.
#[derive(Clone, Debug)]
pub(super) struct Asker {
    pub(super) vm: String,
    host: String,
    /// Random, so that a claim of this very process is told from one of an earlier process on the same host.
    pub(super) identity: String,
}

impl Asker {
    pub(super) fn new(vm: &str, host: &str) -> io::Result<Self> {
        let mut random = [0; 16];
        io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut random)?;
        Ok(Self {
            vm: vm.into(),
            host: host.into(),
            identity: hex(&random),
        })
    }

    /// The text of a claim.
    pub(super) fn claim(&self, generation: Generation) -> Vec<u8> {
        let text = json!({
            "vm": self.vm,
            "generation": generation.0,
            "host": self.host,
            "wall_ns": wall_ns(),
            "id": self.identity,
        });
        format!("{text}\n").into_bytes()
    }

    /// What the claim that is there means. An answer that got lost on the way is found again by the identity in it.
    pub(super) fn judge(&self, found: &[u8]) -> (Verdict, String) {
        let found: Value = serde_json::from_slice(found).unwrap_or_default();
        match found["id"] == json!(self.identity) {
            true => (Verdict::Won, String::new()),
            false => (Verdict::Lost, format!("claimed by host {}", found["host"])),
        }
    }
}
