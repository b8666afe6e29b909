//! When a write is done: with its data in the host's cache, or on the disk.

use ft_vhost::guest_side::blk::{CONFIG_WRITEBACK_OFFSET, FEATURE_CONFIG_WCE, FEATURE_FLUSH};

/// The cache mode, and who chose it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheMode {
    /// The operator's choice.
    usual: bool,
    write_through: bool,
    /// The driver may have chosen write-through, and nobody here knows.
    unknown: bool,
    /// The driver can choose.
    chooses: bool,
}

impl CacheMode {
    pub(crate) fn new(write_through: bool) -> Self {
        Self {
            usual: write_through,
            write_through,
            unknown: false,
            chooses: false,
        }
    }

    /// Whether every write is durable before the guest is told that it is done.
    pub(crate) fn is_write_through(self) -> bool {
        self.write_through
    }

    /// The driver took these features.
    pub(crate) fn set_features(&mut self, features: u64) {
        // A driver that can choose the mode finds the one that was chosen last; one that can neither choose nor flush relies on us.
        if features & FEATURE_CONFIG_WCE == 0 {
            self.write_through = self.usual || features & FEATURE_FLUSH == 0;
        } else if self.unknown {
            self.write_through = true;
        }
        self.chooses = features & FEATURE_CONFIG_WCE != 0;
    }

    /// The driver ran before, and what it chose is not known.
    pub(crate) fn resume(&mut self) {
        // A driver that chose write-through flushes nothing; one that did not loses time and no data.
        self.unknown = true;
        self.write_through |= self.chooses;
    }

    /// The driver writes to the configuration space.
    pub(crate) fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), String> {
        match (offset, bytes) {
            (CONFIG_WRITEBACK_OFFSET, [writeback]) if *writeback <= 1 => {
                self.write_through = *writeback == 0;
                self.unknown = false;
                Ok(())
            }
            _ => Err(format!(
                "only the cache mode can be set, not {} bytes at {offset} of the configuration space",
                bytes.len()
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_cannot_flush_is_written_through() {
        let mut mode = CacheMode::new(false);
        mode.set_features(0);
        assert!(mode.is_write_through());
        mode.set_features(FEATURE_FLUSH);
        assert!(!mode.is_write_through());
        let mut mode = CacheMode::new(true);
        mode.set_features(FEATURE_FLUSH);
        assert!(mode.is_write_through());
    }

    #[test]
    fn what_an_earlier_driver_chose_is_taken_for_write_through_until_it_chooses() {
        let mut mode = CacheMode::new(false);
        mode.set_features(FEATURE_FLUSH | FEATURE_CONFIG_WCE);
        assert!(!mode.is_write_through());
        mode.resume();
        assert!(mode.is_write_through());
        assert!(mode.set_config(CONFIG_WRITEBACK_OFFSET, &[2]).is_err());
        mode.set_config(CONFIG_WRITEBACK_OFFSET, &[1]).unwrap();
        assert!(!mode.is_write_through());
    }
}
