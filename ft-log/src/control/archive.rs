//! Journal segments on disk, for the control socket. Read in pieces, so that memory stays bounded whatever is asked for.

use std::path::Path;

use ft_client::journal::{self, SEGMENT_HEADER_BYTES, SegmentFile, SegmentHeader};
use ft_protocol::{Generation, entry::Entry, frame, limits::FRAME_BYTES_MAX};
use serde_json::{Value, json};
use tokio_uring::fs::File;

use super::protocol::ENTRIES_MAX;
use crate::inspect::describe;

/// Bytes of one read: the largest frame always fits behind what is left of the one before.
const CHUNK_BYTES: usize = FRAME_BYTES_MAX;

/// The segments of `vm` in `directory`.
pub(super) fn segments(directory: &Path, vm: &str) -> Result<Value, String> {
    let found = journal::segments(directory).map_err(|error| error.to_string())?;
    let own = found.into_iter().filter(|file| file.journal.vm == vm);
    let show = |file: SegmentFile| {
        let bytes = std::fs::metadata(&file.path).map(|metadata| metadata.len());
        json!({
            "generation": file.journal.generation.0,
            "segment": file.index,
            "path": file.path.display().to_string(),
            "bytes": bytes.ok(),
        })
    };
    Ok(own.map(show).collect())
}

/// Up to `limit` entries of a segment, from LSN `from` on.
pub(super) async fn entries(
    directory: &Path,
    vm: &str,
    generation: Generation,
    segment: u32,
    from: u64,
    limit: usize,
) -> Result<Value, String> {
    let header = SegmentHeader {
        vm: vm.into(),
        generation,
        index: segment,
        first: ft_protocol::Lsn(1),
    };
    let path = directory.join(header.file_name());
    let place = |reason: &dyn std::fmt::Display| format!("{}: {reason}", path.display());
    let file = File::open(&path).await.map_err(|error| place(&error))?;
    let mut reader = Pieces {
        file,
        position: 0,
        bytes: Vec::new(),
        start: 0,
    };
    let found = reader.entries(vm, from, limit.min(ENTRIES_MAX)).await;
    let _ = reader.file.close().await;
    found.map_err(|reason| place(&reason))
}

struct Pieces {
    file: File,
    /// Where in the file the next read starts.
    position: u64,
    bytes: Vec<u8>,
    start: usize,
}

impl Pieces {
    async fn entries(&mut self, vm: &str, from: u64, limit: usize) -> Result<Value, String> {
        while self.bytes.len() < SEGMENT_HEADER_BYTES {
            if !self.read().await? {
                return Err("it has no header yet".into());
            }
        }
        SegmentHeader::decode(&self.bytes)?;
        self.start = SEGMENT_HEADER_BYTES;
        let mut found = Vec::new();
        let mut is_torn = false;
        while found.len() < limit {
            let rest = &self.bytes[self.start..];
            let length = frame::peek_length(rest).map_err(|error| self.damaged(&error))?;
            let Some(length) = length.filter(|length| *length <= rest.len()) else {
                is_torn = !rest.is_empty();
                match self.read().await? {
                    true => continue,
                    false => break,
                }
            };
            let entry = Entry::decode(&rest[..length]).map_err(|error| self.damaged(&error))?;
            if entry.lsn.0 >= from {
                found.push(describe::json(vm, &entry, length, false));
            }
            self.start += length;
            is_torn = false;
        }
        Ok(json!({ "entries": found, "torn": is_torn }))
    }

    fn damaged(&self, error: &frame::FrameError) -> String {
        let at = self.position - (self.bytes.len() - self.start) as u64;
        format!("the entry at byte {at} is damaged: {error}")
    }

    /// Reads the next piece behind what is left; `false` at the end of the file.
    async fn read(&mut self) -> Result<bool, String> {
        self.bytes.drain(..self.start);
        self.start = 0;
        let (result, piece) = self.file.read_at(Vec::with_capacity(CHUNK_BYTES), self.position).await;
        let count = result.map_err(|error| error.to_string())?;
        self.position += count as u64;
        self.bytes.extend_from_slice(&piece[..count]);
        Ok(count > 0)
    }
}
