//! A model of the two images, with the real schedule and the real plan between them: requests, blocks and the log take their steps in any order.

use proptest::prelude::*;

use super::*;
use crate::overlap::{Access, Schedule};

/// Bytes of a sector that matter here: which write was the last.
type Image = Vec<u32>;

const SECTORS: u64 = 3 * BLOCK_SECTORS + 5;

#[derive(Clone, Debug)]
enum Entry {
    Compare(Range<u64>),
    Put(Range<u64>, Vec<u32>),
}

#[derive(Debug)]
enum Job {
    /// A guest's write, logged already if there was somebody to log for.
    Write(Range<u64>, u32),
    /// A block, and what was read of it.
    Block(Option<Vec<u32>>),
}

/// See the module.
struct Model {
    ours: Image,
    theirs: Image,
    log: VecDeque<Entry>,
    applied: u64,
    appended: u64,
    schedule: Schedule,
    /// Jobs that have their turn.
    started: Vec<u64>,
    jobs: HashMap<u64, Job>,
    resync: Resync,
    requests: u64,
    logs: bool,
    /// Off: a block is read without its turn, and logged when it is convenient.
    in_order: bool,
}

fn digest_of(image: &[u32]) -> Digest {
    digest(&image.iter().flat_map(|sector| sector.to_le_bytes()).collect::<Vec<_>>())
}

impl Model {
    fn new(in_order: bool, differs: &[u64]) -> Self {
        let ours = vec![1; SECTORS as usize];
        let mut theirs = ours.clone();
        for sector in differs {
            theirs[*sector as usize] = 2;
        }
        Self {
            ours,
            theirs,
            log: VecDeque::new(),
            applied: 0,
            appended: 0,
            schedule: Schedule::default(),
            started: Vec::new(),
            jobs: HashMap::new(),
            resync: Resync::default(),
            requests: 0,
            logs: false,
            in_order,
        }
    }

    fn append(&mut self, entry: Entry) -> Lsn {
        self.log.push_back(entry);
        self.appended += 1;
        Lsn(self.appended)
    }

    fn start(&mut self, id: u64) {
        if let (Some(Job::Write(range, value)), true) = (self.jobs.get(&id), self.logs) {
            let (range, value) = (range.clone(), *value);
            let content = vec![value; (range.end - range.start) as usize];
            self.append(Entry::Put(range, content));
        }
        self.started.push(id);
    }

    fn guest_writes(&mut self, first: u64, count: u64) {
        let range = first..(first + count).min(SECTORS);
        self.requests += 1;
        let id = self.requests;
        self.jobs.insert(id, Job::Write(range.clone(), 100 + id as u32));
        if self.schedule.arrive(id, Access::Write(range)) {
            self.start(id);
        }
    }

    /// What the daemon does each time round.
    fn pump(&mut self) {
        self.resync.applied(Lsn(self.applied));
        while let Some(range) = self.resync.question() {
            self.append(Entry::Compare(range.clone()));
            self.resync.asked(range);
        }
        while let Some((id, range)) = self.resync.next_turn() {
            self.jobs.insert(id, Job::Block(None));
            if !self.in_order || self.schedule.arrive(id, Access::Write(range)) {
                self.start(id);
            }
        }
    }

    /// One of the jobs that have their turn goes on by one step.
    fn work(&mut self, which: usize) {
        let Some(at) = which.checked_rem(self.started.len()) else {
            return;
        };
        let id = self.started[at];
        match self.jobs.get_mut(&id).unwrap() {
            Job::Write(range, value) => {
                self.ours[range.start as usize..range.end as usize].fill(*value);
            }
            Job::Block(read) => {
                let block = self.resync.block(id).unwrap().clone();
                let range = block.sectors.start as usize..block.sectors.end as usize;
                let Some(content) = read.take() else {
                    *read = Some(self.ours[range].to_vec());
                    return;
                };
                let copied = (digest_of(&content) != block.theirs)
                    .then(|| self.append(Entry::Put(block.sectors.clone(), content)));
                self.resync.finished(id, copied);
            }
        }
        self.started.swap_remove(at);
        self.jobs.remove(&id);
        let mut startable = Vec::new();
        if self.in_order || !is_block(id) {
            self.schedule.finish(id, &mut startable);
        }
        startable.into_iter().for_each(|id| self.start(id));
    }

    /// The new backup applies one entry.
    fn apply(&mut self) {
        match self.log.pop_front() {
            None => return,
            Some(Entry::Put(range, content)) => {
                self.theirs[range.start as usize..range.end as usize].copy_from_slice(&content);
            }
            Some(Entry::Compare(range)) => {
                let blocks: Vec<_> = self.theirs[range.start as usize..range.end as usize]
                    .chunks(BLOCK_SECTORS as usize)
                    .map(digest_of)
                    .collect();
                self.resync.answered(range.start, &blocks);
            }
        }
        self.applied += 1;
    }

    fn step(&mut self, (kind, first, count): (u8, u64, u64)) {
        match kind {
            0 | 1 => self.guest_writes(first, count),
            2..=4 => self.work(first as usize),
            _ => self.apply(),
        }
        self.pump();
    }

    /// Goes on until everything is done; gives whether the images are equal where the backup is told that it has the whole.
    fn ends_equal(mut self, steps: &[(u8, u64, u64)], begins_at: usize) -> bool {
        for (at, step) in steps.iter().enumerate() {
            if at == begins_at {
                self.logs = true;
                self.resync.begin(Some(1), SECTORS);
            }
            self.step(*step);
        }
        if !self.logs {
            self.logs = true;
            self.resync.begin(Some(1), SECTORS);
        }
        for round in 0.. {
            self.pump();
            if self.started.is_empty() && self.log.is_empty() && self.resync.is_complete() {
                break;
            }
            self.work(0);
            self.apply();
            assert!(round < 100_000, "it does not end: {:?}", self.resync);
        }
        assert!(self.jobs.is_empty());
        self.ours == self.theirs
    }
}

fn any_steps() -> impl Strategy<Value = Vec<(u8, u64, u64)>> {
    // Much of it about one block.
    let first = prop_oneof![0..SECTORS, 100..140u64];
    proptest::collection::vec((0..8u8, first, 1..40u64), 0..120)
}

proptest! {
    #[test]
    fn the_images_are_equal_when_the_last_word_is_said(
        steps in any_steps(),
        begins_at in 0..60usize,
        differs in proptest::collection::vec(0..SECTORS, 0..4),
    ) {
        prop_assert!(Model::new(true, &differs).ends_equal(&steps, begins_at));
    }
}

/// The guest writes between the reading of a block and its copy: without turns the copy takes the place of the newer write.
#[test]
fn a_copy_without_its_turn_loses_a_newer_write_and_is_caught() {
    let steps: Vec<_> = [(7, 0, 0), (7, 0, 0), (2, 0, 0), (0, 0, 1)].to_vec();
    assert!(Model::new(true, &[0]).ends_equal(&steps, 0));
    assert!(!Model::new(false, &[0]).ends_equal(&steps, 0));
}

#[test]
fn what_is_copied_and_not_applied_is_bounded_and_only_what_was_asked_is_answered() {
    let sectors = 1000 * BLOCK_SECTORS;
    let mut resync = Resync::default();
    resync.begin(Some(1), sectors);
    let mut lsn = 0;
    let mut copy = |resync: &mut Resync| {
        let mut copied = 0;
        loop {
            while let Some(range) = resync.question() {
                resync.asked(range.clone());
                resync.answered(range.start + 1, &[[0; 16]; DIGESTS_MAX]);
                resync.answered(range.start, &[[0; 16]; 1]);
                assert_eq!(
                    resync.asked.back(),
                    Some(&range),
                    "what nobody asked for was taken for an answer"
                );
                let blocks = (range.end - range.start).div_ceil(BLOCK_SECTORS) as usize;
                resync.answered(range.start, &vec![[0; 16]; blocks]);
            }
            let Some((id, _)) = resync.next_turn() else {
                return copied;
            };
            lsn += 1;
            resync.finished(id, Some(Lsn(lsn)));
            copied += BLOCK_BYTES;
        }
    };
    assert_eq!(copy(&mut resync), AHEAD_BYTES_MAX);
    assert_eq!(copy(&mut resync), 0);
    resync.applied(Lsn(3));
    assert_eq!(copy(&mut resync), 3 * BLOCK_BYTES);
    assert!(resync.due.len() < 2 * DIGESTS_MAX && !resync.is_complete());
}
