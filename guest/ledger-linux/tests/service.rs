//! The service on a file and a socket of this machine, spoken to byte by byte.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ledger_core::chain::{Head, Record, SECTOR_BYTES};
use ledger_core::ledger::Buffers;
use ledger_core::limits::SESSIONS_MAX;
use ledger_core::opening::{self, OpenError};
use ledger_linux::disk::Disk;
use ledger_linux::service::Service;

const APPEND: u16 = 1;
const READ: u16 = 2;
const HEAD: u16 = 3;
const POWER_OFF: u16 = 4;

fn request(op: u16, n: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"FTL1".to_vec();
    bytes.extend(op.to_le_bytes());
    bytes.extend(u16::try_from(payload.len()).expect("short").to_le_bytes());
    bytes.extend(n.to_le_bytes());
    bytes.extend(payload);
    bytes
}

/// Status, n, hash, payload.
fn answer(stream: &mut TcpStream) -> (u16, u64, [u8; 32], Vec<u8>) {
    let mut header = [0; 56];
    stream.read_exact(&mut header).expect("an answer");
    assert_eq!(&header[..4], b"FTA1");
    let word = |offset: usize| u16::from_le_bytes([header[offset], header[offset + 1]]);
    let mut payload = vec![0; usize::from(word(6))];
    stream.read_exact(&mut payload).expect("its payload");
    let n = u64::from_le_bytes(header[8..16].try_into().expect("8 bytes"));
    (word(4), n, header[24..56].try_into().expect("32 bytes"), payload)
}

fn ask(stream: &mut TcpStream, op: u16, n: u64, payload: &[u8]) -> (u16, u64, [u8; 32], Vec<u8>) {
    stream.write_all(&request(op, n, payload)).expect("sent");
    answer(stream)
}

fn disk_file(sectors: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().set_len(sectors * SECTOR_BYTES as u64).expect("a size");
    file
}

/// A service on `path`, and a function to connect to it. Its thread ends with the power off.
fn serve(path: &Path, sectors_max: Option<u64>) -> (JoinHandle<()>, impl Fn() -> TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    let mut disk = Disk::open(path, sectors_max).expect("the disk");
    let thread = thread::spawn(move || {
        let mut buffers = Box::new(Buffers::new());
        let capacity = disk.sectors();
        let head = opening::open(&mut disk, &mut buffers.group, capacity).expect("a ledger");
        let mut service = Service::new(listener, disk, &mut buffers, head).expect("a service");
        service.run().expect("it serves");
    });
    (thread, move || TcpStream::connect(address).expect("it listens"))
}

fn power_off(mut stream: TcpStream, service: JoinHandle<()>) {
    assert_eq!(ask(&mut stream, POWER_OFF, 0, b"").0, 0);
    service.join().expect("it ends in an orderly way");
}

#[test]
fn many_in_flight_are_answered_in_order_and_are_there_after_a_new_start() {
    let file = disk_file(400);
    let (service, connect) = serve(file.path(), None);
    let mut stream = connect();
    let payload = |n: u64| vec![u8::try_from(n).expect("below 256"); usize::try_from(n).expect("small")];
    let burst: Vec<u8> = (1..=200).flat_map(|n| request(APPEND, n, &payload(n))).collect();
    let mut writer = stream.try_clone().expect("a second handle");
    let sender = thread::spawn(move || writer.write_all(&burst).expect("sent"));
    let mut head = Head::EMPTY;
    for n in 1..=200 {
        head = head.next(&payload(n));
        assert_eq!(answer(&mut stream), (0, n, head.hash, vec![]));
    }
    sender.join().expect("sent");
    // More reads than there are slots, of two clients, and nothing else that could set the service going again.
    let mut other = connect();
    let burst: Vec<u8> = (1..=200).flat_map(|n| request(READ, n, b"")).collect();
    for client in [&mut stream, &mut other] {
        client.write_all(&burst).expect("sent");
    }
    for client in [&mut stream, &mut other] {
        for n in 1..=200 {
            assert_eq!(answer(client).3, payload(n));
        }
    }
    power_off(stream, service);

    let (service, connect) = serve(file.path(), None);
    let mut stream = connect();
    assert_eq!(ask(&mut stream, HEAD, 0, b""), (0, 200, head.hash, vec![]));
    assert_eq!(ask(&mut stream, APPEND, 7, &payload(7)).0, 0, "a repeat");
    assert_eq!(ask(&mut stream, APPEND, 7, b"other").0, 2, "a conflict");
    assert_eq!(ask(&mut stream, APPEND, 300, b"").0, 1, "a gap");
    power_off(stream, service);
}

#[test]
fn sectors_behind_the_limit_are_left_alone() {
    let file = disk_file(100);
    let (service, connect) = serve(file.path(), Some(3));
    let mut stream = connect();
    assert_eq!(ask(&mut stream, APPEND, 1, b"a").0, 0);
    assert_eq!(ask(&mut stream, APPEND, 2, b"b").0, 0);
    assert_eq!(ask(&mut stream, APPEND, 3, b"c").0, 5, "full");
    power_off(stream, service);
    let bytes = std::fs::read(file.path()).expect("the image");
    let sector =
        |n: usize| -> [u8; SECTOR_BYTES] { bytes[n * SECTOR_BYTES..][..SECTOR_BYTES].try_into().expect("one") };
    assert_eq!(Record::read(&sector(2)).map(|record| record.n), Some(2));
    assert!(bytes[3 * SECTOR_BYTES..].iter().all(|byte| *byte == 0));
}

#[test]
fn nonsense_ends_its_own_connection_only() {
    let file = disk_file(100);
    let (service, connect) = serve(file.path(), None);
    let mut good = connect();
    let mut bad = connect();
    assert_eq!(ask(&mut bad, 9, 0, b"").0, 6);
    assert_eq!(bad.read(&mut [0; 1]).expect("an orderly end"), 0);
    let mut half = connect();
    half.write_all(&request(APPEND, 1, b"abc")[..18]).expect("sent");
    half.shutdown(Shutdown::Write).expect("half closed");
    assert_eq!(half.read(&mut [0; 1]).expect("an orderly end"), 0);
    assert_eq!(ask(&mut good, HEAD, 0, b"").1, 0, "half a request is none");
    power_off(good, service);
}

#[test]
fn a_client_that_reads_nothing_holds_up_nobody_else() {
    let file = disk_file(1000);
    let (service, connect) = serve(file.path(), None);
    let mut good = connect();
    for n in 1..=50 {
        assert_eq!(ask(&mut good, APPEND, n, &[7; 256]).0, 0);
    }
    let mut silent = connect();
    silent.set_nonblocking(true).expect("non-blocking");
    // Until neither the service nor the kernels take any more of it.
    let burst: Vec<u8> = (0..512).flat_map(|n| request(READ, n % 50 + 1, b"")).collect();
    while silent.write(&burst).is_ok() {
        assert_eq!(ask(&mut good, HEAD, 0, b"").1, 50);
    }
    assert_eq!(ask(&mut good, APPEND, 51, b"x").0, 0);
    power_off(good, service);
}

#[test]
fn places_of_clients_that_left_are_taken_again() {
    let file = disk_file(100);
    let (service, connect) = serve(file.path(), None);
    for _ in 0..3 {
        let mut clients: Vec<TcpStream> = (0..SESSIONS_MAX).map(|_| connect()).collect();
        for client in &mut clients {
            assert_eq!(ask(client, HEAD, 0, b"").0, 0);
        }
    }
    power_off(connect(), service);
}

#[test]
fn a_disk_of_something_else_is_not_touched() {
    let file = disk_file(100);
    std::fs::write(file.path(), [1; 4096]).expect("a foreign disk");
    let mut disk = Disk::open(file.path(), None).expect("the disk");
    let opened = opening::open(&mut disk, &mut Buffers::new().group, 8);
    assert_eq!(opened, Err(OpenError::Foreign));
    assert_eq!(std::fs::read(file.path()).expect("the image"), [1; 4096]);
}

#[test]
fn answers_for_which_there_was_no_room_come_when_there_is() {
    let file = disk_file(400);
    let (service, connect) = serve(file.path(), None);
    let mut stream = connect();
    // One that stalls is to fail, not to hang.
    let patience = Some(Duration::from_secs(60));
    stream.set_read_timeout(patience).expect("a timeout");
    assert_eq!(ask(&mut stream, APPEND, 1, &[7; 38]).0, 0);
    // All at once, and then silence: their answers are several times what the service keeps for one client.
    let count = 4000;
    let mut burst = Vec::new();
    for _ in 0..count {
        burst.extend(request(READ, 1, b""));
    }
    let mut writer = stream.try_clone().expect("a second handle");
    let sender = thread::spawn(move || writer.write_all(&burst).expect("sent"));
    for _ in 0..count {
        assert_eq!(answer(&mut stream).3, [7; 38]);
    }
    sender.join().expect("sent");
    power_off(stream, service);
}
