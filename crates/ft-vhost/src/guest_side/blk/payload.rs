//! What a delivery brings: completions, one after the other.

use super::super::RingError;

/// Bytes of a completion before its data.
pub const COMPLETION_HEADER_BYTES: usize = 16;

/// One completion of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion<'a> {
    /// Request.
    pub id: u64,
    /// Status byte for the guest.
    pub status: u8,
    /// Data for the guest.
    pub data: &'a [u8],
}

/// The header of a completion with `length` bytes of data behind it.
#[must_use]
pub fn completion_header(id: u64, status: u8, length: u32) -> [u8; COMPLETION_HEADER_BYTES] {
    let mut header = [0; COMPLETION_HEADER_BYTES];
    header[..8].copy_from_slice(&id.to_le_bytes());
    header[8] = status;
    header[12..].copy_from_slice(&length.to_le_bytes());
    header
}

/// Reads the completions of a payload.
///
/// # Errors
/// In the place of the first completion that is malformed.
pub fn completions(payload: &[u8]) -> impl Iterator<Item = Result<Completion<'_>, RingError>> {
    let mut rest = payload;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let at = payload.len() - rest.len();
        let Some((completion, behind)) = split_completion(rest) else {
            rest = &[];
            return Some(Err(RingError::Payload(at)));
        };
        rest = behind;
        Some(Ok(completion))
    })
}

fn split_completion(bytes: &[u8]) -> Option<(Completion<'_>, &[u8])> {
    let (header, rest) = bytes.split_first_chunk::<COMPLETION_HEADER_BYTES>()?;
    let id = u64::from_le_bytes(*header.first_chunk()?);
    let length = u32::from_le_bytes(*header.last_chunk()?) as usize;
    let (status, padding) = (header[8], &header[9..12]);
    let (data, rest) = rest.split_at_checked(length)?;
    (padding == [0; 3]).then_some((Completion { id, status, data }, rest))
}
