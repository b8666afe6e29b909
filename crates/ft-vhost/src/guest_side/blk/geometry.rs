//! What a disk tells its driver: feature bits and configuration space (VIRTIO 1.2 §5.2.3, §5.2.4).

use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    },
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use super::SECTOR_BYTES;

/// Segments of one request of a protected disk: its data travels in one log entry.
pub(super) const SEGMENTS_MAX: u32 = 64;
/// Bytes of one of those.
pub(super) const SEGMENT_BYTES_MAX: u32 = 4096;
/// Segments of one request otherwise. With header and status they fill the rings of most drivers; an indirect table has room for more.
const ALONE_SEGMENTS_MAX: u32 = 254;
/// Bytes of one of those.
const ALONE_SEGMENT_BYTES_MAX: u32 = 64 << 10;
/// What is best read and written at once, or in multiples.
const BEST_BYTES: u32 = 4096;
/// Sectors of one discard or write-zeroes: 1 GiB, whose bytes fit 32 bits.
pub(super) const EXTENT_SECTORS_MAX: u32 = 1 << 21;
/// Queues a disk may have.
pub const QUEUES_MAX: u16 = 16;
/// `VIRTIO_BLK_F_FLUSH`: without it the driver takes every write to be durable.
pub const FEATURE_FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
/// `VIRTIO_BLK_F_CONFIG_WCE`: the driver may switch between write-back and write-through.
pub const FEATURE_CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
/// Where in the configuration space the byte `writeback` is.
pub const CONFIG_WRITEBACK_OFFSET: u32 = 32;

const CONFIG_BYTES: usize = 60;

/// The properties of a disk that its driver can see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Queues, at most [`QUEUES_MAX`].
    pub queues: u16,
    /// Bytes of a logical block: 512 or 4096.
    pub block_bytes: u32,
    /// The guest is to have an equal: its requests fit a log entry, and the driver may not choose the cache mode, since the
    /// configuration space takes no part in the replay.
    pub protected: bool,
}

impl Geometry {
    /// A plain disk of `capacity_sectors` sectors of 512 bytes, with one queue.
    #[must_use]
    pub fn plain(capacity_sectors: u64, read_only: bool) -> Self {
        Self {
            capacity_sectors,
            read_only,
            queues: 1,
            block_bytes: SECTOR_BYTES as u32,
            protected: true,
        }
    }

    /// The disk that offered these features and had this configuration space; `None` for those that no disk of ours has.
    #[must_use]
    pub fn described(features: u64, config: &[u8]) -> Option<Self> {
        let has = |bit: u32| features & 1 << bit != 0;
        let field = |at: usize, bytes: usize| config.get(at..at + bytes);
        let queues = match has(VIRTIO_BLK_F_MQ) {
            true => u16::from_le_bytes(field(34, 2)?.try_into().ok()?),
            false => 1,
        };
        let geometry = Self {
            capacity_sectors: u64::from_le_bytes(field(0, 8)?.try_into().ok()?),
            read_only: has(VIRTIO_BLK_F_RO),
            queues,
            block_bytes: u32::from_le_bytes(field(20, 4)?.try_into().ok()?),
            protected: !has(VIRTIO_BLK_F_CONFIG_WCE),
        };
        (1..=QUEUES_MAX).contains(&queues).then_some(geometry)
    }

    /// Segments of one request, and bytes of each.
    fn segments(&self) -> (u32, u32) {
        match self.protected {
            true => (SEGMENTS_MAX, SEGMENT_BYTES_MAX),
            false => (ALONE_SEGMENTS_MAX, ALONE_SEGMENT_BYTES_MAX),
        }
    }

    /// Most data of one request.
    #[must_use]
    pub fn request_bytes_max(&self) -> u64 {
        let (count, bytes) = self.segments();
        u64::from(count) * u64::from(bytes)
    }

    /// Whether discard and write-zeroes are offered.
    #[must_use]
    pub fn discards(&self) -> bool {
        !self.read_only
    }

    /// Feature bits.
    #[must_use]
    pub fn features(&self) -> u64 {
        let always = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_SIZE_MAX,
        ];
        let sometimes = [
            (self.read_only, VIRTIO_BLK_F_RO),
            (self.discards(), VIRTIO_BLK_F_DISCARD),
            (self.discards(), VIRTIO_BLK_F_WRITE_ZEROES),
            (self.queues > 1, VIRTIO_BLK_F_MQ),
            (!self.protected, VIRTIO_BLK_F_CONFIG_WCE),
        ];
        let chosen = sometimes.into_iter().filter_map(|(has, bit)| has.then_some(bit));
        always.into_iter().chain(chosen).fold(0, |bits, bit| bits | 1 << bit)
    }

    /// The configuration space. Its cache mode is write-back.
    #[must_use]
    pub fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.capacity_sectors.to_le_bytes());
        let (segments, segment_bytes) = self.segments();
        put(8, &segment_bytes.to_le_bytes());
        put(12, &segments.to_le_bytes());
        put(20, &self.block_bytes.to_le_bytes());
        // Topology: physical block = logical block, aligned at 0; best I/O in pages.
        let page_blocks = (BEST_BYTES / self.block_bytes) as u16;
        put(26, &page_blocks.to_le_bytes());
        put(28, &u32::from(page_blocks).to_le_bytes());
        put(CONFIG_WRITEBACK_OFFSET as usize, &[1]);
        put(34, &self.queues.to_le_bytes());
        if self.discards() {
            let alignment_sectors = self.block_bytes / SECTOR_BYTES as u32;
            // One extent a request: its order among overlapping ones is that of the request.
            put(36, &EXTENT_SECTORS_MAX.to_le_bytes());
            put(40, &1u32.to_le_bytes());
            put(44, &alignment_sectors.to_le_bytes());
            put(48, &EXTENT_SECTORS_MAX.to_le_bytes());
            put(52, &1u32.to_le_bytes());
            put(56, &[1]);
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_described_is_read_back() {
        for read_only in [false, true] {
            for (queues, block_bytes) in [(1, 512), (4, 4096), (QUEUES_MAX, 512)] {
                let geometry = Geometry {
                    capacity_sectors: 0x1234_5678,
                    read_only,
                    queues,
                    block_bytes,
                    protected: queues == 4,
                };
                let described = Geometry::described(geometry.features(), &geometry.config());
                assert_eq!(described, Some(geometry));
            }
        }
    }

    #[test]
    fn nonsense_is_no_disk() {
        let geometry = Geometry::plain(8, false);
        assert_eq!(Geometry::described(geometry.features(), &[]), None);
        let mut config = geometry.config();
        config[34..36].copy_from_slice(&(QUEUES_MAX + 1).to_le_bytes());
        assert_eq!(
            Geometry::described(geometry.features() | 1 << VIRTIO_BLK_F_MQ, &config),
            None
        );
    }
}
