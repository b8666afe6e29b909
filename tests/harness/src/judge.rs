//! The witness's judgement: what clients were told against what is stored. Pure.
//!
//! The witness is the only client, so it knows what every hash must be. It judges three sources that must agree: the
//! answers as they came, what the survivor answers when asked again for every acknowledged record, and the survivor's disk.

use std::collections::{BTreeMap, BTreeSet};

use crate::ledger::{Answer, DiskImage, GENESIS, Hash, Op, Request, Status, chain};

/// One request and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// What was asked.
    pub request: Request,
    /// When it was due to be asked (open loop: latency counts from here).
    pub due_ns: u64,
    /// When its last byte was handed to the kernel, if it was.
    pub sent_ns: Option<u64>,
    /// What came back, and when.
    pub answer: Option<(Answer, u64)>,
}

/// How the one connection fared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connection {
    /// It is the same from the first request to the last answer.
    Intact,
    /// It ended early: reset, closed, or filled with nonsense.
    Broken {
        /// When.
        t_ns: u64,
        /// How.
        reason: String,
    },
    /// It went silent: not everything was answered before the deadline.
    Silent,
}

/// Everything the witness saw, in the order of its requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transcript {
    /// Requests in the order they were sent, which is the order they must be answered in.
    pub exchanges: Vec<Exchange>,
    /// How the connection fared.
    pub connection: Connection,
}

impl Transcript {
    /// The exchanges that appended a record.
    pub fn appends(&self) -> impl Iterator<Item = &Exchange> {
        self.exchanges
            .iter()
            .filter(|exchange| exchange.request.op == Op::Append)
    }
}

/// What the witness has to say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verdict {
    /// Appends sent.
    pub requests: u64,
    /// Appends acknowledged.
    pub replies: u64,
    /// Acknowledged records that are no longer there.
    pub lost: BTreeSet<u64>,
    /// Records of which the machine told, or stores, two stories.
    pub forked: BTreeSet<u64>,
    /// The connection from before the fault carried everything.
    pub same_connection: bool,
    /// The survivor's disk holds the chain, whole, and its answers agree with it.
    pub chain_ok: bool,
    /// Everything found, in words; empty when content.
    pub problems: Vec<String>,
}

impl Verdict {
    /// Whether nothing at all was found.
    #[must_use]
    pub fn content(&self) -> bool {
        self.problems.is_empty()
            && self.lost.is_empty()
            && self.forked.is_empty()
            && self.same_connection
            && self.chain_ok
    }
}

/// Judges a run from what the witness saw and from the survivor's disk.
#[must_use]
pub fn judge(transcript: &Transcript, disk: &DiskImage) -> Verdict {
    let mut judgement = Judgement::new(transcript);
    judgement.connection(transcript);
    judgement.uptimes(transcript);
    let mut audited = BTreeSet::new();
    for exchange in &transcript.exchanges {
        match (&exchange.request.op, &exchange.answer) {
            (_, None) => judgement.problem(format!("{} was never answered", describe(&exchange.request))),
            (Op::Append, Some((answer, _))) => judgement.append(&exchange.request, answer),
            (Op::Read, Some((answer, _))) => {
                audited.insert(exchange.request.n);
                judgement.read(&exchange.request, answer);
            }
            (Op::Head, Some((answer, _))) => judgement.head(answer),
            (Op::PowerOff, Some((answer, _))) => {
                if answer.status != Status::Ok {
                    judgement.problem(format!("power off was answered {:?}", answer.status));
                }
            }
        }
    }
    if let Some(n) = judgement.acknowledged.iter().find(|n| !audited.contains(n)) {
        judgement.problem(format!("acknowledged record {n} was not read again"));
    }
    judgement.disk(disk);
    judgement.finish()
}

struct Judgement {
    /// Hash and payload of every record sent.
    expected: BTreeMap<u64, (Hash, Vec<u8>)>,
    acknowledged: BTreeSet<u64>,
    verdict: Verdict,
}

impl Judgement {
    fn new(transcript: &Transcript) -> Self {
        let mut expected = BTreeMap::new();
        let mut hash = GENESIS;
        for Exchange { request, .. } in transcript.appends() {
            hash = chain(&hash, request.n, &request.payload);
            expected.insert(request.n, (hash, request.payload.clone()));
        }
        let verdict = Verdict {
            requests: expected.len() as u64,
            same_connection: transcript.connection == Connection::Intact,
            chain_ok: true,
            ..Verdict::default()
        };
        Self {
            expected,
            acknowledged: BTreeSet::new(),
            verdict,
        }
    }

    /// Notes something that speaks against the chain; a connection that broke alone does not.
    fn problem(&mut self, text: String) {
        self.verdict.chain_ok = false;
        self.verdict.problems.push(text);
    }

    fn lost(&mut self, n: u64, where_: &str) {
        if self.verdict.lost.insert(n) {
            self.problem(format!("record {n} was acknowledged and is lost: {where_}"));
        }
    }

    fn forked(&mut self, n: u64, where_: &str) {
        if self.verdict.forked.insert(n) {
            self.problem(format!("record {n} has two histories: {where_}"));
        }
    }

    fn connection(&mut self, transcript: &Transcript) {
        match &transcript.connection {
            Connection::Intact => {}
            Connection::Broken { reason, .. } => self.verdict.problems.push(format!("the connection broke: {reason}")),
            Connection::Silent => {
                self.verdict
                    .problems
                    .push("the connection went silent until the deadline".to_owned());
            }
        }
    }

    fn uptimes(&mut self, transcript: &Transcript) {
        let mut last = 0;
        for exchange in &transcript.exchanges {
            let Some((answer, _)) = &exchange.answer else { continue };
            if answer.uptime_ns < last {
                self.problem(format!(
                    "uptime went backwards, from {last} to {} ns, in the answer to {}",
                    answer.uptime_ns,
                    describe(&exchange.request)
                ));
            }
            last = answer.uptime_ns;
        }
    }

    fn append(&mut self, request: &Request, answer: &Answer) {
        let n = request.n;
        match answer.status {
            Status::Ok => {
                self.acknowledged.insert(n);
                if answer.n != n {
                    self.problem(format!("append of record {n} was answered for record {}", answer.n));
                }
                if answer.hash != self.expected[&n].0 {
                    self.forked(n, "the hash in its acknowledgement is not that of the records sent");
                }
            }
            Status::Sequence => {
                self.problem(format!(
                    "append of record {n} was refused: the machine's last record is {}",
                    answer.n
                ));
                let rolled_back: Vec<u64> = self.acknowledged.range(answer.n + 1..).copied().collect();
                for lost in rolled_back {
                    self.lost(lost, "the machine has gone back behind it");
                }
            }
            Status::Conflict => self.forked(n, "another payload is stored under its number"),
            status => self.problem(format!("append of record {n} was refused: {status:?}")),
        }
    }

    fn read(&mut self, request: &Request, answer: &Answer) {
        let n = request.n;
        match (answer.status, self.expected.get(&n)) {
            (Status::Ok, Some((hash, payload))) => {
                if answer.n != n || answer.hash != *hash || answer.payload != *payload {
                    self.forked(n, "reading it again gives another record");
                }
            }
            (Status::NotFound, _) if self.acknowledged.contains(&n) => self.lost(n, "reading it again finds nothing"),
            (status, _) => self.problem(format!("read of record {n} was answered {status:?}")),
        }
    }

    fn head(&mut self, answer: &Answer) {
        if answer.status != Status::Ok {
            self.problem(format!("head was answered {:?}", answer.status));
            return;
        }
        let expected = if answer.n == 0 {
            Some(GENESIS)
        } else {
            self.expected.get(&answer.n).map(|(hash, _)| *hash)
        };
        match expected {
            None => self.forked(answer.n, "it is the head, and nobody sent it"),
            Some(hash) if hash != answer.hash => {
                self.forked(answer.n, "the head's hash is not that of the records sent")
            }
            Some(_) => {}
        }
        let beyond: Vec<u64> = self.acknowledged.range(answer.n + 1..).copied().collect();
        for lost in beyond {
            self.lost(lost, "the head is before it");
        }
    }

    fn disk(&mut self, disk: &DiskImage) {
        if let Some(broken) = &disk.broken {
            self.problem(format!("the survivor's disk is broken at {broken}"));
        }
        for n in self.acknowledged.clone() {
            if disk.record(n).is_none() {
                self.lost(n, "it is not on the survivor's disk");
            }
        }
        for (record, n) in disk.records.iter().zip(1..) {
            match self.expected.get(&n) {
                Some((hash, payload)) if record.hash == *hash && record.payload == *payload => {}
                Some(_) => self.forked(n, "the survivor's disk holds another record"),
                None => self.forked(n, "the survivor's disk holds it, and nobody sent it"),
            }
        }
    }

    fn finish(mut self) -> Verdict {
        self.verdict.replies = self.acknowledged.len() as u64;
        self.verdict
    }
}

fn describe(request: &Request) -> String {
    match request.op {
        Op::Append => format!("append of record {}", request.n),
        Op::Read => format!("read of record {}", request.n),
        Op::Head => "head".to_owned(),
        Op::PowerOff => "power off".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::DiskRecord;

    const RECORDS: u64 = 6;

    fn payload(n: u64) -> Vec<u8> {
        format!("record {n}").into_bytes()
    }

    /// A run in which everything went well, and its disk.
    fn good() -> (Transcript, DiskImage) {
        let mut exchanges = Vec::new();
        let mut disk = DiskImage::default();
        let mut hash = GENESIS;
        let mut t = 0;
        let mut exchange = |op, n, sent: Vec<u8>, hash, payload| {
            t += 1000;
            exchanges.push(Exchange {
                request: Request { op, n, payload: sent },
                due_ns: t,
                sent_ns: Some(t),
                answer: Some((
                    Answer {
                        status: Status::Ok,
                        n,
                        uptime_ns: t,
                        hash,
                        payload,
                    },
                    t + 500,
                )),
            });
        };
        for n in 1..=RECORDS {
            hash = chain(&hash, n, &payload(n));
            disk.records.push(DiskRecord {
                hash,
                uptime_ns: n,
                payload: payload(n),
            });
            exchange(Op::Append, n, payload(n), hash, vec![]);
        }
        exchange(Op::Head, RECORDS, vec![], hash, vec![]);
        for (record, n) in disk.records.iter().zip(1..) {
            exchange(Op::Read, n, vec![], record.hash, record.payload.clone());
        }
        exchange(Op::PowerOff, 0, vec![], GENESIS, vec![]);
        (
            Transcript {
                exchanges,
                connection: Connection::Intact,
            },
            disk,
        )
    }

    fn answer(transcript: &mut Transcript, op: Op, n: u64) -> &mut Answer {
        let exchange = transcript
            .exchanges
            .iter_mut()
            .find(|exchange| exchange.request.op == op && (exchange.request.n == n || op == Op::Head))
            .expect("there is such an exchange");
        &mut exchange.answer.as_mut().expect("it is answered").0
    }

    fn set(numbers: &[u64]) -> BTreeSet<u64> {
        numbers.iter().copied().collect()
    }

    #[test]
    fn good_run_is_content() {
        let (transcript, disk) = good();
        let verdict = judge(&transcript, &disk);
        assert_eq!(verdict.problems, Vec::<String>::new());
        assert!(verdict.content());
        assert_eq!((verdict.requests, verdict.replies), (RECORDS, RECORDS));
    }

    #[test]
    fn acknowledgement_with_another_hash_is_a_fork() {
        let (mut transcript, disk) = good();
        answer(&mut transcript, Op::Append, 3).hash[0] ^= 1;
        let verdict = judge(&transcript, &disk);
        assert_eq!(verdict.forked, set(&[3]));
        assert!(!verdict.content() && !verdict.chain_ok);
    }

    #[test]
    fn conflict_is_a_fork() {
        let (mut transcript, disk) = good();
        answer(&mut transcript, Op::Append, 4).status = Status::Conflict;
        assert_eq!(judge(&transcript, &disk).forked, set(&[4]));
    }

    #[test]
    fn refused_sequence_shows_what_was_rolled_back() {
        let (mut transcript, disk) = good();
        let refused = answer(&mut transcript, Op::Append, 6);
        refused.status = Status::Sequence;
        refused.n = 3;
        let verdict = judge(&transcript, &disk);
        assert_eq!(verdict.lost, set(&[4, 5]));
        assert!(!verdict.content());
    }

    #[test]
    fn head_before_an_acknowledged_record_is_a_loss() {
        let (mut transcript, disk) = good();
        let head = answer(&mut transcript, Op::Head, 0);
        head.n = RECORDS - 1;
        head.hash = disk.records[4].hash;
        assert_eq!(judge(&transcript, &disk).lost, set(&[RECORDS]));
    }

    #[test]
    fn head_nobody_sent_is_a_fork() {
        let (mut transcript, disk) = good();
        answer(&mut transcript, Op::Head, 0).n = RECORDS + 3;
        assert_eq!(judge(&transcript, &disk).forked, set(&[RECORDS + 3]));
    }

    #[test]
    fn record_not_found_again_is_a_loss() {
        let (mut transcript, disk) = good();
        answer(&mut transcript, Op::Read, 2).status = Status::NotFound;
        assert_eq!(judge(&transcript, &disk).lost, set(&[2]));
    }

    #[test]
    fn record_read_back_differently_is_a_fork() {
        let (mut transcript, disk) = good();
        answer(&mut transcript, Op::Read, 2).payload = b"another".to_vec();
        assert_eq!(judge(&transcript, &disk).forked, set(&[2]));
    }

    #[test]
    fn acknowledged_record_must_be_read_again() {
        let (mut transcript, disk) = good();
        transcript
            .exchanges
            .retain(|exchange| !(exchange.request.op == Op::Read && exchange.request.n == 5));
        let verdict = judge(&transcript, &disk);
        assert_eq!(verdict.problems, vec!["acknowledged record 5 was not read again"]);
        assert!(!verdict.content());
    }

    #[test]
    fn record_missing_on_disk_is_a_loss() {
        let (transcript, mut disk) = good();
        disk.records.pop();
        let verdict = judge(&transcript, &disk);
        assert_eq!(verdict.lost, set(&[RECORDS]));
        assert!(!verdict.chain_ok);
    }

    #[test]
    fn other_record_on_disk_is_a_fork() {
        let (transcript, mut disk) = good();
        disk.records[1].payload = b"another".to_vec();
        assert_eq!(judge(&transcript, &disk).forked, set(&[2]));
    }

    #[test]
    fn record_on_disk_nobody_sent_is_a_fork() {
        let (transcript, mut disk) = good();
        disk.records.push(disk.records[0].clone());
        assert_eq!(judge(&transcript, &disk).forked, set(&[RECORDS + 1]));
    }

    #[test]
    fn broken_disk_chain_is_no_chain() {
        let (transcript, mut disk) = good();
        disk.broken = Some("sector 9: bad magic".to_owned());
        let verdict = judge(&transcript, &disk);
        assert!(!verdict.chain_ok && !verdict.content());
    }

    #[test]
    fn uptime_never_goes_backwards() {
        let (mut transcript, disk) = good();
        answer(&mut transcript, Op::Append, 4).uptime_ns = 1;
        let verdict = judge(&transcript, &disk);
        assert!(
            verdict
                .problems
                .iter()
                .any(|problem| problem.contains("uptime went backwards")),
            "{verdict:?}"
        );
        assert!(!verdict.content());
    }

    #[test]
    fn unanswered_request_is_not_content_and_no_loss() {
        let (mut transcript, disk) = good();
        transcript
            .exchanges
            .iter_mut()
            .find(|exchange| exchange.request.n == 6)
            .expect("record 6")
            .answer = None;
        let verdict = judge(&transcript, &disk);
        assert!(verdict.lost.is_empty());
        assert_eq!(verdict.replies, RECORDS - 1);
        assert!(!verdict.content());
    }

    #[test]
    fn broken_connection_is_not_content_though_the_chain_is_whole() {
        let (mut transcript, disk) = good();
        transcript.connection = Connection::Broken {
            t_ns: 1,
            reason: "reset".to_owned(),
        };
        let verdict = judge(&transcript, &disk);
        assert!(verdict.chain_ok && !verdict.same_connection && !verdict.content());
    }

    #[test]
    fn unacknowledged_record_may_be_on_disk_or_not() {
        let (mut transcript, mut disk) = good();
        // The last append was refused for want of space; the record may nevertheless have reached the disk.
        transcript
            .exchanges
            .retain(|exchange| !(exchange.request.op == Op::Read && exchange.request.n == RECORDS));
        answer(&mut transcript, Op::Append, RECORDS).status = Status::Io;
        let with = judge(&transcript, &disk);
        assert!(with.lost.is_empty() && with.forked.is_empty());
        disk.records.pop();
        let head = answer(&mut transcript, Op::Head, 0);
        head.n = RECORDS - 1;
        head.hash = disk.records.last().expect("five records").hash;
        let without = judge(&transcript, &disk);
        assert!(without.lost.is_empty() && without.forked.is_empty());
    }
}
