//! What the driver did, and whether an image can be what is left of it.
//!
//! Every sector that is written names the write and itself. An image is right if no sector is older than the last write that the guest was told of,
//! if no write is there in part, and if nothing is there that nobody wrote.

use std::collections::HashMap;

use super::host::SECTORS;

const SECTOR: usize = 512;

#[derive(Clone, Copy, Debug)]
struct Change {
    first: u64,
    count: u64,
    zeroes: bool,
    told: bool,
}

/// The history of a disk.
#[derive(Debug, Default)]
pub(crate) struct Model {
    changes: Vec<Change>,
    /// Requests in flight: head of the chain to the change.
    flying: HashMap<u16, usize>,
}

impl Model {
    /// A change that is about to be asked for; gives the content of a write.
    pub(crate) fn change(&mut self, first: u64, count: u64, zeroes: bool) -> Vec<u8> {
        self.changes.push(Change {
            first,
            count,
            zeroes,
            told: false,
        });
        let version = self.changes.len() as u64;
        (first..first + count)
            .flat_map(|sector| content(version, sector))
            .collect()
    }

    /// The chain of the last change.
    pub(crate) fn flies(&mut self, head: u16) {
        let before = self.flying.insert(head, self.changes.len() - 1);
        assert_eq!(before, None);
    }

    /// The guest was told that a chain is done.
    pub(crate) fn told(&mut self, head: u16, status: u8) {
        assert_eq!(status, 0);
        if let Some(change) = self.flying.remove(&head) {
            self.changes[change].told = true;
        }
    }

    /// The same for another guest on the same disk: what was in flight is told to nobody.
    pub(crate) fn of_the_next_guest(mut self) -> Self {
        self.flying.clear();
        self
    }

    /// What is wrong with an image.
    pub(crate) fn violations(&self, image: &[u8]) -> Vec<String> {
        let mut wrong = Vec::new();
        let versions: Vec<u64> = (0..SECTORS)
            .map(|sector| {
                let bytes = &image[sector as usize * SECTOR..][..SECTOR];
                self.version(sector, bytes).unwrap_or_else(|| {
                    wrong.push(format!("sector {sector} has what nobody wrote"));
                    0
                })
            })
            .collect();
        for (index, change) in self.changes.iter().enumerate() {
            let version = index as u64 + 1;
            let range = change.first as usize..(change.first + change.count) as usize;
            let is_there = change.told || !change.zeroes && versions[range.clone()].contains(&version);
            for sector in range.filter(|sector| is_there && versions[*sector] < version) {
                let why = if change.told {
                    "the guest was told"
                } else {
                    "it is there in part"
                };
                wrong.push(format!(
                    "sector {sector} has change {} and not {version}: {why}",
                    versions[sector]
                ));
            }
        }
        wrong
    }

    /// The latest change that left these bytes there; 0 is what was there before all.
    fn version(&self, sector: u64, bytes: &[u8]) -> Option<u64> {
        let touches = |change: &Change| (change.first..change.first + change.count).contains(&sector);
        if bytes.iter().all(|byte| *byte == 0) {
            let last = self.changes.iter().rposition(|change| change.zeroes && touches(change));
            return Some(last.map_or(0, |index| index as u64 + 1));
        }
        let version = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let change = self.changes.get(usize::try_from(version).ok()?.checked_sub(1)?)?;
        (touches(change) && !change.zeroes && bytes == content(version, sector)).then_some(version)
    }
}

fn content(version: u64, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for pair in bytes.chunks_exact_mut(16) {
        pair[..8].copy_from_slice(&version.to_le_bytes());
        pair[8..].copy_from_slice(&sector.to_le_bytes());
    }
    bytes
}

#[test]
fn the_judge_sees_what_is_lost_torn_or_foreign() {
    let mut model = Model::default();
    let first = model.change(4, 2, false);
    model.flies(1);
    let second = model.change(5, 3, false);
    model.flies(2);
    let mut image = vec![0; SECTORS as usize * SECTOR];
    assert!(model.violations(&image).is_empty());
    model.told(1, 0);
    assert_eq!(model.violations(&image).len(), 2, "lost");
    image[4 * SECTOR..6 * SECTOR].copy_from_slice(&first);
    assert!(model.violations(&image).is_empty());
    image[5 * SECTOR..7 * SECTOR].copy_from_slice(&second[..2 * SECTOR]);
    assert_eq!(model.violations(&image).len(), 1, "torn");
    image[7 * SECTOR..8 * SECTOR].copy_from_slice(&second[2 * SECTOR..]);
    assert!(model.violations(&image).is_empty());
    image[9 * SECTOR] = 1;
    assert_eq!(model.violations(&image).len(), 1, "foreign");
}
