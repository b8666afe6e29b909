//! The witness against a ledger server that can be told to lie.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ft_harness::judge::{Connection, Verdict, judge};
use ft_harness::ledger::{Answer, DiskImage, DiskRecord, GENESIS, Op, Request, SECTOR, Status, chain, disk_header};
use ft_harness::witness::{Plan, Witness};

/// What a server does wrong, at record [`LIE_AT`].
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lie {
    None,
    /// It acknowledges the record and forgets it, as a backup does to which it was never sent.
    Forgets,
    /// It acknowledges another record's hash.
    Forks,
    /// It closes the connection.
    Closes,
    /// It stops answering.
    Stalls,
    /// It answers with bytes that are no answer.
    Babbles,
    /// Its clock jumps back.
    TurnsBack,
}

const LIE_AT: u64 = 30;
const RECORDS: u64 = 60;

/// A ledger in memory; gives back its disk.
fn serve(mut stream: TcpStream, lie: Lie) -> Vec<u8> {
    let mut records: Vec<DiskRecord> = Vec::new();
    let mut uptime_ns = 1_000_000;
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    let mut forgotten = false;
    'connection: loop {
        let mut answers = Vec::new();
        while let Some((request, size)) = Request::decode(&bytes).expect("the witness speaks the protocol") {
            bytes.drain(..size);
            uptime_ns += 1000;
            let lying = request.op == Op::Append && request.n == LIE_AT;
            match lie {
                Lie::Closes if lying => break 'connection,
                Lie::Stalls if records.len() as u64 + 1 >= LIE_AT => continue,
                Lie::Babbles if lying => answers.extend([0xAA; 64]),
                Lie::TurnsBack if lying => uptime_ns = 5,
                _ => {}
            }
            let mut answer = apply(&mut records, &request, uptime_ns);
            if lying && lie == Lie::Forks {
                answer.hash[7] ^= 0x10;
            }
            if lying && lie == Lie::Forgets && !forgotten {
                records.pop();
                forgotten = true;
            }
            answer.encode(&mut answers);
        }
        stream.write_all(&answers).expect("the witness reads");
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
        }
    }
    let mut disk = disk_header().to_vec();
    for (record, n) in records.iter().zip(1..) {
        disk.extend(record.encode(n));
    }
    disk.resize(SECTOR * 256, 0);
    disk
}

fn apply(records: &mut Vec<DiskRecord>, request: &Request, uptime_ns: u64) -> Answer {
    let last = records.len() as u64;
    let head = records.last().map_or(GENESIS, |record| record.hash);
    let mut answer = Answer {
        status: Status::Ok,
        n: request.n,
        uptime_ns,
        hash: GENESIS,
        payload: vec![],
    };
    match request.op {
        Op::Append if request.n == last + 1 => {
            answer.hash = chain(&head, request.n, &request.payload);
            records.push(DiskRecord {
                hash: answer.hash,
                uptime_ns,
                payload: request.payload.clone(),
            });
        }
        Op::Append => {
            answer.status = Status::Sequence;
            answer.n = last;
        }
        Op::Read => match usize::try_from(request.n - 1).ok().and_then(|index| records.get(index)) {
            Some(record) => {
                answer.hash = record.hash;
                answer.payload = record.payload.clone();
            }
            None => answer.status = Status::NotFound,
        },
        Op::Head => {
            answer.n = last;
            answer.hash = head;
        }
        Op::PowerOff => {}
    }
    answer
}

fn witnessed(lie: Lie) -> (Verdict, Connection) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let stream = TcpStream::connect(listener.local_addr().expect("it is bound")).expect("connected");
    let (server, _) = listener.accept().expect("accepted");
    let server: JoinHandle<Vec<u8>> = thread::spawn(move || serve(server, lie));
    let patience = if lie == Lie::Stalls {
        Duration::from_millis(300)
    } else {
        Duration::from_secs(60)
    };
    let witness = Witness::start(
        stream,
        Plan {
            seed: 3,
            records: RECORDS,
            rate: 2000,
            patience,
        },
    )
    .expect("the witness starts");
    let transcript = witness.finish();
    let disk = DiskImage::read(&server.join().expect("the server ends")).expect("a ledger disk");
    (judge(&transcript, &disk), transcript.connection)
}

#[test]
fn honest_server_is_believed() {
    let (verdict, connection) = witnessed(Lie::None);
    assert_eq!(verdict.problems, Vec::<String>::new());
    assert!(verdict.content());
    assert_eq!((verdict.requests, verdict.replies), (RECORDS, RECORDS));
    assert_eq!(connection, Connection::Intact);
}

#[test]
fn forgotten_record_is_found() {
    let (verdict, _) = witnessed(Lie::Forgets);
    assert!(verdict.lost.contains(&LIE_AT), "{verdict:?}");
    assert!(!verdict.content() && !verdict.chain_ok);
}

#[test]
fn forked_answer_is_found() {
    let (verdict, _) = witnessed(Lie::Forks);
    assert_eq!(verdict.forked.into_iter().collect::<Vec<_>>(), [LIE_AT]);
}

#[test]
fn closed_connection_is_found() {
    let (verdict, connection) = witnessed(Lie::Closes);
    assert!(!verdict.same_connection && !verdict.content());
    assert!(matches!(connection, Connection::Broken { .. }), "{connection:?}");
}

#[test]
fn silence_ends_the_run() {
    let (verdict, connection) = witnessed(Lie::Stalls);
    assert_eq!(connection, Connection::Silent);
    assert!(!verdict.same_connection && !verdict.content());
    assert_eq!(verdict.replies, LIE_AT - 1);
}

#[test]
fn nonsense_is_found() {
    let (verdict, connection) = witnessed(Lie::Babbles);
    assert!(matches!(connection, Connection::Broken { reason, .. } if reason.contains("not an answer")));
    assert!(!verdict.content());
}

#[test]
fn clock_that_jumps_back_is_found() {
    let (verdict, _) = witnessed(Lie::TurnsBack);
    assert!(
        verdict
            .problems
            .iter()
            .any(|problem| problem.contains("uptime went backwards")),
        "{verdict:?}"
    );
}

#[test]
fn progress_is_told_while_it_runs() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let stream = TcpStream::connect(listener.local_addr().expect("it is bound")).expect("connected");
    let (server, _) = listener.accept().expect("accepted");
    let server = thread::spawn(move || serve(server, Lie::None));
    let plan = Plan {
        seed: 1,
        records: 50,
        rate: 1000,
        patience: Duration::from_secs(60),
    };
    let witness = Witness::start(stream, plan).expect("the witness starts");
    assert!(witness.wait_until(|progress| progress.answered >= 20));
    assert!(
        !witness.wait_until(|progress| progress.answered > 50),
        "there are only 50"
    );
    assert!(witness.progress().finished);
    assert_eq!(witness.finish().appends().count(), 50);
    server.join().expect("the server ends");
}
