//! What the fuzzers run, and `ft-log/tests/fuzz.rs` runs over their corpus: everything that reads what others wrote.
//!
//! ```text
//!  bytes ──► [Script] raw bytes and well-formed frames, mixed ──► codec | journal | peer | client
//! ```
//! A checksum is a wall for a fuzzer: half of the frames are made whole here, so that what is behind the wall is reached too.
//! Nothing may panic, hang, or take memory that the input did not bring.

use std::{
    cell::RefCell,
    fs,
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::PathBuf,
};

use clap::Parser;
use ft_client::{
    journal::{JournalError, JournalLock, JournalReader, SegmentHeader},
    ring::{self, Consumer},
};
use ft_log::{clients, config::Config, local::Local, merge::Merger};
use ft_protocol::{
    Action, DeviceId, Event, Generation, Header, Lsn, Replica, Role, Timing, Verdict,
    entry::Entry,
    frame,
    limits::{FRAME_BYTES_MAX, HEADER_BYTES},
    message::{Hello, Message, Standing, Strength},
    versions::Versions,
};

/// What is run on each input.
pub type Target = fn(&[u8]);

/// Every target, by name.
pub const TARGETS: [(&str, Target); 4] = [
    ("codec", codec),
    ("journal", journal),
    ("peer", peer),
    ("client", client),
];

const VM: &str = "ledger";
const GENERATION: Generation = Generation(1);

/// Reads an input piece by piece; at its end there are zeros and empty pieces.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    fn number(&mut self) -> u64 {
        let bytes = self.take(8);
        bytes
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn take(&mut self, count: usize) -> &'a [u8] {
        let (piece, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        piece
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Appends one piece of a stream of frames: raw bytes, or a frame with a good checksum. `next` is the LSN that fits.
    fn frame(&mut self, next: &mut u64, out: &mut Vec<u8>) {
        let (how, length) = (self.byte(), usize::from(self.byte()));
        if how & 1 == 0 {
            out.extend_from_slice(self.take(length));
            return;
        }
        let lsn = if how & 2 == 0 { *next } else { self.number() };
        let generation = if how & 4 == 0 { GENERATION.0 } else { self.byte().into() };
        let header = Header {
            lsn: Lsn(lsn),
            generation: Generation(generation),
            kind: self.byte(),
            device: DeviceId(if how & 8 == 0 { 0 } else { self.byte() }),
            queue: 0,
        };
        let body = self.take(length);
        let start = out.len();
        out.resize(start + HEADER_BYTES + body.len(), 0);
        frame::write(&mut out[start..], &header, body.len(), |out| out.copy_from_slice(body));
        *next = lsn.wrapping_add(1);
    }
}

/// Frames, entries, messages: what decodes encodes to the same bytes.
pub fn codec(data: &[u8]) {
    one_frame(data);
    let mut script = Script(data);
    let (mut frame, mut next) = (Vec::new(), 1);
    script.frame(&mut next, &mut frame);
    one_frame(&frame);
}

fn one_frame(bytes: &[u8]) {
    let length = frame::peek_length(bytes);
    if let Ok(Some(length)) = length {
        assert!((HEADER_BYTES..=FRAME_BYTES_MAX).contains(&length));
    }
    if let Ok(entry) = Entry::decode(bytes) {
        let mut again = vec![0; entry.body.frame_bytes()];
        assert_eq!(entry.encode(&mut again), bytes.len());
        assert_eq!(again, bytes);
    }
    if let Ok((generation, message)) = Message::decode(bytes) {
        let mut again = Vec::new();
        message.encode(generation, &mut again);
        assert_eq!(Message::decode(&again), Ok((generation, message)));
    }
}

/// A journal of up to three segments, read with everything that can be wrong with it.
pub fn journal(data: &[u8]) {
    thread_local!(static DIRECTORY: PathBuf = scratch());
    DIRECTORY.with(|directory| {
        let mut script = Script(data);
        let segments = script.byte() % 3 + 1;
        let mut next = 1;
        let mut paths = Vec::new();
        for index in 0..segments {
            let header = SegmentHeader {
                vm: VM.into(),
                generation: GENERATION,
                index: index.into(),
                first: Lsn(next),
            };
            let (pieces, damage) = (script.byte() % 16, script.byte());
            let mut bytes = header.encode().to_vec();
            if damage == 1 {
                bytes.truncate(usize::from(script.byte()) % bytes.len());
            }
            if damage == 2 {
                let at = usize::from(script.byte()) % bytes.len();
                bytes[at] ^= script.byte();
            }
            (0..pieces).for_each(|_| script.frame(&mut next, &mut bytes));
            if damage == 3 {
                bytes.resize(bytes.len() + usize::from(script.byte()), 0);
            }
            let path = directory.join(header.file_name());
            fs::write(&path, bytes).expect("a file in the scratch directory");
            paths.push(path);
        }
        read_journal(directory);
        paths.iter().for_each(|path| {
            let _ = fs::remove_file(path);
        });
    });
}

fn scratch() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
    let path = parent.join(format!(
        "ft-fuzz-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    fs::create_dir_all(&path).expect("a scratch directory");
    path
}

fn read_journal(directory: &std::path::Path) {
    let open = || JournalReader::open(directory);
    let Ok(mut reader) = open() else { return };
    let mut last = Lsn::ZERO;
    let mut is_whole = true;
    loop {
        match reader.next_entry() {
            Ok(Some((entry, bytes))) => {
                assert!(entry.lsn > last && entry.generation == GENERATION);
                assert!(!is_whole || entry.lsn == last.next());
                assert_eq!(bytes.len(), entry.body.frame_bytes());
                last = entry.lsn;
            }
            Ok(None) => break,
            Err(error) => {
                is_whole = false;
                assert!(!matches!(error, JournalError::Io { .. }), "{error}");
                if !reader.skip_damage() {
                    break;
                }
            }
        }
    }
    let Some(torn) = reader.torn_tail().filter(|_| is_whole).cloned() else {
        return;
    };
    let lock = JournalLock::of_segment(&torn.path).expect("nobody else writes it");
    torn.cut(&lock).expect("the segment is there");
    let Ok(mut reader) = open() else {
        assert_eq!(last, Lsn::ZERO, "nothing is left");
        return;
    };
    let mut again = Lsn::ZERO;
    while let Some((entry, _)) = reader.next_entry().expect("what was whole stays whole") {
        again = entry.lsn;
    }
    assert_eq!((again, reader.torn_tail()), (last, None));
}

fn config(role: &str) -> Config {
    let words = [
        "ft-log",
        "--vm",
        VM,
        "--socket-path",
        "s",
        "--arbiter",
        "a",
        "--role",
        role,
    ];
    let addresses = ["--listen", "127.0.0.1:1", "--peer", "127.0.0.1:2"];
    Config::try_parse_from(words.into_iter().chain(addresses)).expect("a usual command line")
}

/// Times that a pair can live with.
fn timing_of(choice: u8) -> Timing {
    Timing {
        heartbeat_misses: 2 + u32::from(choice),
        ..config("primary").timing()
    }
}

/// A peer that says whatever it likes whenever it likes: the core refuses, halts, or goes on, and its own assertions hold.
pub fn peer(data: &[u8]) {
    let mut script = Script(data);
    let kind = script.byte();
    let is_primary = kind & 1 == 0;
    // A primary that is alone and takes a new backup, or a host that asks to be one.
    let repairs = kind & 4 != 0;
    thread_local!(static CONFIGS: [Config; 2] = ["backup", "primary"].map(config));
    let mut config = CONFIGS.with(|configs| configs[usize::from(is_primary)].replica(1));
    config.alone = repairs && is_primary;
    config.joins = repairs && !is_primary;
    config.takes_joiners = repairs;
    let mut replica = Replica::new(config, 0);
    let (mut now_ns, mut next, mut actions) = (0, 1, Vec::new());
    let fingerprint = [7; 32];
    let mut step = |replica: &mut Replica, now_ns, event| {
        actions.clear();
        replica.step(now_ns, event, &mut actions);
        assert!(actions.len() < 64, "{actions:?}");
        // What the shell does at once.
        let synced = actions.iter().find_map(|action| match action {
            Action::AppendSynced { instance } => Some(*instance),
            _ => None,
        });
        if let Some(instance) = synced {
            let lsn = replica.last().next();
            replica.step(now_ns, Event::SyncedEntry { lsn, instance }, &mut actions);
            replica.step(now_ns, Event::Appended { through: lsn }, &mut actions);
        }
    };
    step(
        &mut replica,
        now_ns,
        Event::LocalReady {
            fingerprint,
            shape: Some(fingerprint),
        },
    );
    let mut is_up = false;
    while !script.is_empty() {
        match script.byte() % 12 {
            8 => {
                let through = Lsn(script.number() % 1000);
                let full = script.byte() & 1 == 1;
                for event in [
                    Event::Durable { through },
                    Event::Consumed { through },
                    Event::ReplayFull { full },
                    Event::ConfigurationEntry {
                        lsn: through,
                        timing: timing_of(script.byte()),
                    },
                ] {
                    step(&mut replica, now_ns, event);
                }
            }
            0 if is_up => {
                is_up = false;
                step(&mut replica, now_ns, Event::ChannelDown);
            }
            0 => {
                is_up = true;
                step(&mut replica, now_ns, Event::ChannelUp);
            }
            1 => {
                now_ns += script.number() % 1_000_000_000;
                step(&mut replica, now_ns, Event::Tick);
            }
            2 => {
                let verdict = [Verdict::Won, Verdict::Lost, Verdict::Unreachable][usize::from(script.byte() % 3)];
                let generation = Generation(replica.generation().0.saturating_add(1));
                step(&mut replica, now_ns, Event::Arbiter { generation, verdict });
            }
            3 if replica.leads() && matches!(replica.role(), Role::Recording | Role::Live) => {
                let through = Lsn(replica.last().0 + u64::from(script.byte()) + 1);
                step(&mut replica, now_ns, Event::Appended { through });
            }
            10 => {
                let generation = replica.generation();
                for event in [Event::Adopted, Event::Holding { generation }] {
                    step(&mut replica, now_ns, event);
                }
            }
            11 if !replica.leads() => {
                let lsn = Lsn(replica.last().0 + u64::from(script.byte() % 4));
                let instance = replica.instance() + u64::from(script.byte() % 2);
                step(&mut replica, now_ns, Event::SyncedEntry { lsn, instance });
            }
            // The right words at whatever time: a hello that matches, of a generation that may exist or not.
            9 => {
                let generations = [0, 1, 2, u32::MAX - 1, u32::MAX];
                let generation = Generation(generations[usize::from(script.byte()) % generations.len()]);
                let message = Message::Hello(Hello {
                    versions: Versions {
                        oldest: Versions::SPOKEN.oldest + u32::from(script.byte() % 2),
                        newest: Versions::SPOKEN.newest + u32::from(script.byte() % 3),
                    },
                    vm: VM.into(),
                    primary: !is_primary,
                    fingerprint,
                    instance: u64::from(script.byte() % 2) + 2,
                    ack: Strength::Received,
                    last: Lsn((script.byte() % 4).into()),
                    standing: [Standing::Whole, Standing::Nothing, Standing::Part][usize::from(script.byte() % 3)],
                    timing: Some(timing_of(script.byte())),
                });
                step(&mut replica, now_ns, Event::Message { generation, message });
            }
            // Entries of the pair.
            7 if replica.role() == Role::Replaying => {
                let (from, generation) = (replica.last().next(), replica.generation());
                let through = Lsn(from.0 + u64::from(script.byte()));
                step(
                    &mut replica,
                    now_ns,
                    Event::Received {
                        generation,
                        from,
                        through,
                    },
                );
            }
            _ => {
                let mut bytes = Vec::new();
                script.frame(&mut next, &mut bytes);
                if let Ok((generation, message)) = Message::decode(&bytes) {
                    step(&mut replica, now_ns, Event::Message { generation, message });
                }
            }
        }
    }
}

/// A local process with hostile intentions: its join lines and reports, and its ring, counters included.
pub fn client(data: &[u8]) {
    let mut script = Script(data);
    match script.byte() & 1 {
        0 => lines(script),
        _ => ring(script),
    }
}

fn lines(script: Script<'_>) {
    thread_local!(static LOCAL: RefCell<Local> = RefCell::new(local()));
    LOCAL.with_borrow_mut(|local| {
        for line in script.0.split(|byte| *byte == b'\n') {
            if let Ok(seat) = clients::admit(VM, line, local) {
                let mut news = Vec::new();
                clients::report(seat, line, &mut news);
                assert_eq!(news.len(), 1);
            }
        }
        if local.missing().next().is_none() {
            *local = self::local();
        }
    });
}

fn local() -> Local {
    Local::new(&["blk0".into(), "net0".into()]).expect("shared memory")
}

fn ring(mut script: Script<'_>) {
    const WRITTEN: u64 = 64;
    const DATA: u64 = 4096;
    let mut files = Vec::new();
    let mut rings = Vec::new();
    let count = script.byte() % 2 + 1;
    for _ in 0..count {
        let memory = ring::create("ft-fuzz-ring").expect("shared memory");
        let fd: OwnedFd = memory.fd().try_clone_to_owned().expect("a descriptor");
        files.push(fs::File::from(fd));
        rings.push(Consumer::on(memory));
    }
    let mut next = 1;
    for file in &files {
        let (pieces, how) = (script.byte() % 16, script.byte());
        let mut bytes = Vec::new();
        for _ in 0..pieces {
            script.frame(&mut next, &mut bytes);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        let written = if how & 1 == 0 {
            bytes.len() as u64
        } else {
            script.number()
        };
        file.write_all_at(&bytes, DATA).expect("room in the ring");
        file.write_all_at(&written.to_le_bytes(), WRITTEN)
            .expect("room in the ring");
    }
    let mut merger = Merger::new(rings);
    let mut out = Vec::new();
    loop {
        let (start, from) = (out.len(), merger.next());
        match merger.take(GENERATION, false, &mut out) {
            Ok(Some(batch)) => assert!(batch.from == from && batch.through.next() == merger.next()),
            Ok(None) => break,
            Err(violation) => {
                assert!(violation.seat < usize::from(count) && !violation.breach.to_string().is_empty());
                break;
            }
        }
        assert!(out.len() - start < 2 * FRAME_BYTES_MAX);
    }
    let _ = merger.check_gap(0);
    let _ = merger.check_gap(u64::MAX);
}
