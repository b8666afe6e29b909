//! A host that has nothing asks to be the backup: a live side takes it, if the state of its VM can be transferred.

use std::{io::Write, net::TcpStream, process::Command, sync::Arc};

use ft_client::{
    handshake::{EngineSession, hex, join_engine},
    log::Urgency,
};
use ft_protocol::{
    Body, DeviceId, Generation, Lsn,
    entry::Entry,
    message::{Hello, Message, Standing, Watermarks},
};

use crate::{
    hostile::{connect_as_a, entry, hello, receive, receive_frame, send, wait_closed},
    world::{DEADLINE, Daemon, FINGERPRINT, HostId, VM, World},
};

#[test]
fn a_host_that_asks_to_be_synchronised_is_refused_and_the_pair_is_made_all_the_same() {
    let world = World::new();
    let mut b = world.host_with(HostId::B, &[]);
    for primary in [false, true] {
        let mut stream = connect_as_a(&world);
        let asks = Hello {
            primary,
            instance: 9,
            standing: Standing::Nothing,
            ..hello()
        };
        send(&mut stream, &Message::Hello(asks));
        let Message::Refuse { reason } = receive(&mut stream) else {
            panic!("not refused");
        };
        assert!(reason.contains("takes no new backup"), "{reason}");
        wait_closed(&mut stream);
    }
    b.daemon.wait_log("takes no new backup");
    let mut a = world.host_with(HostId::A, &[]);
    a.daemon.wait_event("paired");
    b.daemon.wait_event("paired");
}

const SHAPE: [u8; 32] = [8; 32];
/// What `ft_client::handshake::join_engine` takes the shim's seat with.
const NO_SHIM: &[u8; 32] = b"device engine: no shim, version1";

/// What a host with one disk computes: for a pair that begins with the VM, and for a new backup.
fn fingerprints() -> [[u8; 32]; 2] {
    let mut local = ft_log::local::Local::new(&["blk0".into()]).unwrap();
    assert!(local.occupy(0, hex(&FINGERPRINT), Some(hex(&SHAPE))));
    assert!(local.occupy(1, hex(NO_SHIM), Some(hex(NO_SHIM))));
    [local.fingerprint(), local.shape().unwrap()]
}

fn say(stream: &mut TcpStream, generation: u32, message: &Message) {
    let mut bytes = Vec::new();
    message.encode(Generation(generation), &mut bytes);
    stream.write_all(&bytes).unwrap();
}

/// A survivor of generation 2 with one entry that it replayed, and the local processes of its disk.
fn survivor(world: &World) -> (Daemon, EngineSession) {
    let mut b = world.start_disk(HostId::B);
    let mut session = join_engine(&world.socket(HostId::B), VM, "blk0", &FINGERPRINT, Some(SHAPE)).unwrap();
    let mut primary = connect_as_a(world);
    let own = Hello {
        fingerprint: fingerprints()[0],
        ..hello()
    };
    say(&mut primary, 1, &Message::Hello(own));
    b.wait_event("paired");
    primary.write_all(&entry(1, 1)).unwrap();
    let reason = "for the test".into();
    say(&mut primary, 1, &Message::Gone { reason });
    b.wait_event("suspect");
    session.shim.replay.pop(&mut Vec::new()).unwrap().unwrap();
    let _ = session.shim.region.set_consumed(Lsn(1));
    session.shim.log.ring_doorbell();
    b.wait_event("go_live");
    (b, session)
}

fn joiner(standing: Standing, last: Lsn) -> Message {
    Message::Hello(Hello {
        primary: false,
        fingerprint: fingerprints()[1],
        instance: 77,
        standing,
        last,
        ..hello()
    })
}

fn hello_of(stream: &mut TcpStream) -> Hello {
    let (generation, message) = Message::decode(&receive_frame(stream)).unwrap();
    let Message::Hello(hello) = message else {
        panic!("{message:?} came before the hello");
    };
    assert_eq!((generation, hello.standing), (Generation(2), Standing::Whole));
    hello
}

/// Waits for the next entry, whose place is known.
fn next_entry(stream: &mut TcpStream, lsn: u64) -> Vec<u8> {
    let frame = receive_frame(stream);
    let entry = Entry::decode(&frame).unwrap();
    assert_eq!((entry.lsn, entry.generation), (Lsn(lsn), Generation(2)));
    frame
}

fn append(session: &mut EngineSession, lsn: u64) {
    let appended = session.device.log.append(DeviceId(0), 0, &Body::Flush, Urgency::Now);
    assert_eq!(appended, Ok(Lsn(lsn)));
}

#[test]
fn a_live_side_synchronises_a_new_backup_and_holds_before_it_may_take_over() {
    let world = World::new();
    let (mut b, mut session) = survivor(&world);
    let region = Arc::clone(&session.shim.region);
    assert_eq!(region.synchronisation(), None);
    // Its log goes on behind what it replayed; nobody has what it appends while it is alone.
    append(&mut session, 2);
    let mut stream = connect_as_a(&world);
    say(&mut stream, 0, &joiner(Standing::Nothing, Lsn::ZERO));
    assert_eq!(hello_of(&mut stream).last, Lsn(2));
    assert_eq!(b.wait_event("synchronising")["start"], 2);
    let number = region.synchronisation();
    assert!(number.is_some() && region.start() == Lsn(2));
    append(&mut session, 3);
    next_entry(&mut stream, 3);
    // What comes back is said again on the next channel, behind the hello and nothing else.
    drop(stream);
    let mut stream = connect_as_a(&world);
    say(&mut stream, 2, &joiner(Standing::Part, Lsn(2)));
    hello_of(&mut stream);
    next_entry(&mut stream, 3);
    assert_eq!(region.synchronisation(), number, "it is the same synchronisation");
    // Its word about its disk reaches the device.
    let digests = Message::Digests {
        sector: 8,
        digests: vec![[5; 16]; 3],
    };
    say(&mut stream, 2, &digests);
    let mut frame = Vec::new();
    while session.shim.replay.pop(&mut frame).unwrap().is_none() {
        session.device.sleep_commit(DEADLINE).unwrap();
    }
    assert_eq!(Message::decode(&frame).unwrap().1, digests);
    // It has the state, and all entries: outputs are held, and the device has to say so.
    let ack = |lsn| {
        Message::Ack(Watermarks {
            received: Lsn(lsn),
            durable: Lsn(2),
            replayed: Lsn(lsn),
        })
    };
    assert_eq!((region.holds(), region.committed().lsn()), (0, Lsn::MAX));
    say(&mut stream, 2, &ack(3));
    say(&mut stream, 2, &Message::Adopted);
    b.wait_log("Recording, generation 2");
    assert_eq!((region.holds(), region.committed().lsn()), (1, Lsn(3)));
    assert_eq!(region.peer_applied(), Lsn(3));
    append(&mut session, 4);
    next_entry(&mut stream, 4);
    say(&mut stream, 2, &ack(4));
    region.obey(DeviceId(0), 1);
    session.shim.log.ring_doorbell();
    let synced = next_entry(&mut stream, 5);
    assert_eq!(Entry::decode(&synced).unwrap().body, Body::Synced { instance: 77 });
    assert_eq!(
        region.committed().lsn(),
        Lsn(3),
        "what it had before counts for nothing"
    );
    region.want_commit(DeviceId(0), Lsn(5));
    say(&mut stream, 2, &ack(5));
    while !region.committed().covers(Lsn(5)) {
        session.device.sleep_commit(DEADLINE).unwrap();
    }
    assert_eq!(region.committed().lsn(), Lsn(5));
    // Whoever says now that it has nothing is not the one that may take over.
    let mut other = connect_as_a(&world);
    say(&mut other, 0, &joiner(Standing::Nothing, Lsn::ZERO));
    assert!(matches!(receive(&mut other), Message::Refuse { .. }));
    // The journal begins where outputs were held.
    drop((stream, other, session));
    assert_eq!(b.wait_code(), 6);
    let mut verify = Command::new(env!("CARGO_BIN_EXE_ft-log"));
    verify
        .arg("verify")
        .arg(world.journal(HostId::B))
        .args(["--generation", "2"]);
    let output = verify.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("begins at entry 4"), "{said}");
}

#[test]
fn entries_that_a_device_may_not_write_end_no_synchronisation_but_the_replica() {
    let world = World::new();
    let (mut b, mut session) = survivor(&world);
    let mut stream = connect_as_a(&world);
    say(&mut stream, 0, &joiner(Standing::Nothing, Lsn::ZERO));
    hello_of(&mut stream);
    let forged = Body::Synced { instance: 77 };
    session
        .device
        .log
        .append(DeviceId(0), 0, &forged, Urgency::Now)
        .unwrap();
    drop(stream);
    assert_eq!(b.wait_code(), 6, "{}", b.logged);
    assert!(b.logged.contains("blk0 broke the rules of the log"), "{}", b.logged);
}
