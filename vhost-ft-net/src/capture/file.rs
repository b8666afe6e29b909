//! The file of a capture: pcapng, one section, an interface for each kind of event, nanoseconds.
//!
//! It never has more bytes than its limit, and never less than whole blocks: what a full disk took of the last one is cut off.

use std::{
    borrow::Cow,
    fmt,
    fs::File,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use pcap_file::{
    DataLink, PcapError,
    pcapng::{
        PcapNgWriter,
        blocks::{
            enhanced_packet::EnhancedPacketBlock,
            interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption},
        },
    },
};
use thiserror::Error;

use super::Kind;

/// Bytes that are written at once.
const BUFFER_BYTES: usize = 256 << 10;
/// Of a packet's block beside the frame.
const BLOCK_BYTES: usize = 32;
/// Times are powers of ten of a second: nanoseconds.
const RESOLUTION: u8 = 9;
/// What the guest says is not for everybody.
const MODE: u32 = 0o600;

/// Why there is no file.
#[derive(Debug, Error)]
#[error("cannot capture to {path}: {source} (--pcap)")]
pub struct FileError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// Why a capture is over.
#[derive(Debug)]
pub(super) enum Over {
    /// The daemon ends.
    Asked,
    /// It has as many bytes as it may.
    Limit,
    /// The disk is full, say.
    Disk(io::Error),
    /// A bug: what is in a ring is no record.
    Broken,
}

impl fmt::Display for Over {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => f.write_str("the capture ended with the device"),
            Self::Limit => f.write_str("the capture reached its limit (--pcap-limit-mib)"),
            Self::Disk(error) => write!(f, "the capture cannot be written: {error}"),
            Self::Broken => f.write_str("the capture broke: its records cannot be read"),
        }
    }
}

/// See the module.
pub(super) struct CaptureFile {
    file: File,
    blocks: PcapNgWriter<Vec<u8>>,
    /// Where each block in the buffer ends.
    ends: Vec<usize>,
    written: u64,
    bytes_max: u64,
    frames_buffered: u64,
    frames: u64,
}

impl CaptureFile {
    /// A new file. One that is there is kept beside it.
    pub(super) fn create(path: &Path, bytes_max: u64, interface: &str) -> io::Result<Self> {
        let mut old = path.as_os_str().to_owned();
        old.push(".old");
        match std::fs::rename(path, &old) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = File::options().write(true).create_new(true).mode(MODE).open(path)?;
        let mut blocks = PcapNgWriter::new(Vec::with_capacity(BUFFER_BYTES)).map_err(plain)?;
        for (_, kind) in Kind::ALL {
            let mut block = InterfaceDescriptionBlock::new(DataLink::ETHERNET, 0);
            block.options = vec![
                InterfaceDescriptionOption::IfName(Cow::Borrowed(kind)),
                InterfaceDescriptionOption::IfDescription(format!("frames at {interface}: {kind}").into()),
                InterfaceDescriptionOption::IfTsResol(RESOLUTION),
            ];
            blocks.write_pcapng_block(block).map_err(plain)?;
        }
        let mut all = Self {
            ends: vec![blocks.get_ref().len()],
            file,
            blocks,
            written: 0,
            bytes_max,
            frames_buffered: 0,
            frames: 0,
        };
        all.flush()?;
        Ok(all)
    }

    /// Appends a frame.
    pub(super) fn put(&mut self, kind: u8, wall_ns: u64, frame: &[u8]) -> Result<(), Over> {
        let bytes = BLOCK_BYTES + frame.len().next_multiple_of(4);
        let buffered = self.blocks.get_ref().len();
        if self.written + (buffered + bytes) as u64 > self.bytes_max {
            return Err(Over::Limit);
        }
        let block = EnhancedPacketBlock {
            interface_id: kind.into(),
            timestamp: Duration::from_nanos(wall_ns),
            original_len: frame.len() as u32,
            data: Cow::Borrowed(frame),
            options: Vec::new(),
        };
        self.blocks.write_pcapng_block(block).map_err(|_| Over::Broken)?;
        self.ends.push(self.blocks.get_ref().len());
        self.frames_buffered += 1;
        if self.blocks.get_ref().len() >= BUFFER_BYTES {
            self.flush().map_err(Over::Disk)?;
        }
        Ok(())
    }

    /// Writes what is buffered; after an error the file ends with its last whole block.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let buffer = self.blocks.get_ref();
        let result = self.file.write_all(buffer);
        match result {
            Ok(()) => {
                self.written += buffer.len() as u64;
                self.frames += self.frames_buffered;
            }
            Err(_) => self.cut(),
        }
        self.frames_buffered = 0;
        self.ends.clear();
        self.blocks.get_mut().clear();
        result
    }

    fn cut(&mut self) {
        let Ok(length) = self.file.metadata().map(|metadata| metadata.len()) else {
            return;
        };
        let whole = self.ends.iter().take_while(|end| self.written + **end as u64 <= length);
        let count = whole.clone().count();
        self.written += whole.last().map_or(0, |end| *end as u64);
        self.frames += count as u64;
        // A disk that cannot even do that has a torn block at the end of the file.
        let _ = self.file.set_len(self.written);
    }

    /// Writes the rest if it can; gives the frames and bytes that are in the file.
    pub(super) fn close(mut self) -> (u64, u64) {
        let _ = self.flush();
        (self.frames, self.written)
    }
}

fn plain(error: PcapError) -> io::Error {
    match error {
        PcapError::IoError(error) => error,
        other => io::Error::other(other),
    }
}
