use proptest::prelude::*;

use super::*;
use crate::timing::EXAMPLE;

#[test]
fn times_that_no_pair_can_live_with_are_malformed() {
    let timing = Timing {
        heartbeat_misses: 0,
        ..EXAMPLE
    };
    let entry = Entry {
        lsn: Lsn(1),
        generation: Generation(1),
        device: DeviceId(0),
        queue: 0,
        body: Body::Configuration(timing),
    };
    let mut bytes = vec![0; entry.body.frame_bytes()];
    entry.encode(&mut bytes);
    assert!(matches!(Entry::decode(&bytes), Err(FrameError::Body { .. })));
}

fn any_stop() -> impl Strategy<Value = Stop> {
    (any::<u64>(), any::<u32>(), any::<u64>(), any::<u64>(), any::<u64>()).prop_map(
        |(exits, offset, rip, rcx, digest)| Stop {
            position: Position {
                exits,
                offset,
                rip,
                rcx,
            },
            digest,
        },
    )
}

fn check(body: Body<'_>) {
    let entry = Entry {
        lsn: Lsn(42),
        generation: Generation(2),
        device: DeviceId(1),
        queue: 3,
        body,
    };
    let mut bytes = vec![0; body.frame_bytes()];
    assert_eq!(entry.encode(&mut bytes), bytes.len());
    assert_eq!(Entry::decode(&bytes).unwrap(), entry);
    assert_eq!(super::check(&bytes).unwrap().lsn, entry.lsn);
    // A body that is one byte short or long is malformed even with a good checksum.
    let (header, body) = frame::read(&bytes).unwrap();
    let mut long = vec![0; bytes.len() + 1];
    let length = frame::write(&mut long, &header, body.len() + 1, |out| {
        out[..body.len()].copy_from_slice(body)
    });
    let decoded = Entry::decode(&long[..length]);
    let open_ended = matches!(
        entry.body,
        Body::Input { .. } | Body::Boot { .. } | Body::Pages { .. } | Body::State { .. } | Body::Write { .. }
    );
    if !open_ended {
        assert!(matches!(decoded, Err(FrameError::Body { .. })));
        let Some(shorter) = body.len().checked_sub(1) else {
            return;
        };
        let length = frame::write(&mut long, &header, shorter, |out| {
            out.copy_from_slice(&body[..out.len()])
        });
        assert!(matches!(Entry::decode(&long[..length]), Err(FrameError::Body { .. })));
    }
}

proptest! {
    #[test]
    fn what_is_checked_is_what_is_decoded(
        kind in 0u8..=255,
        mut body in proptest::collection::vec(0u8..4, 0..64),
        damage in 0usize..200,
    ) {
        let header = Header { lsn: Lsn(7), generation: Generation(3), kind, device: DeviceId(1), queue: 2 };
        for length in (0..=body.len()).rev() {
            body.truncate(length);
            let mut bytes = vec![0; HEADER_BYTES + length];
            frame::write(&mut bytes, &header, length, |out| out.copy_from_slice(&body));
            if let Some(byte) = bytes.get_mut(damage) {
                *byte ^= 1;
            }
            prop_assert_eq!(super::check(&bytes).map(|header| (header.lsn, header.generation)),
                Entry::decode(&bytes).map(|entry| (entry.lsn, entry.generation)));
        }
    }

    #[test]
    fn every_entry_reads_back(stop in any_stop(), number in any::<u64>(), payload in proptest::collection::vec(any::<u8>(), 0..2000), fingerprint in any::<[u8; 32]>(), flag in any::<bool>()) {
        check(Body::Boot { fingerprint, wall_ns: number, devices: &payload });
        check(Body::Kick(stop));
        check(Body::Sync(stop));
        check(Body::Input { sequence: number, payload: &payload });
        check(Body::Deliver { stop, through: number });
        check(Body::Time { stop, now_ns: number });
        check(Body::Console { stop, bytes: number as u32 });
        check(Body::PowerOff { stop, reset: flag });
        check(Body::Pages { payload: &payload });
        check(Body::State { stop, payload: &payload });
        check(Body::Write { sector: number, payload: &payload });
        check(Body::Zeroes { sector: number, sectors: stop.position.offset, unmap: flag });
        check(Body::Flush);
        check(Body::Synced { instance: number });
        check(Body::Configuration(EXAMPLE));
        check(Body::Compare { sector: number, sectors: stop.position.offset });
        check(Body::Transferred);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Entry::decode(&bytes);
    }

    #[test]
    fn arbitrary_bodies_never_panic(kind in any::<u8>(), body in proptest::collection::vec(any::<u8>(), 0..80)) {
        let header = Header { lsn: Lsn(1), generation: Generation(1), kind, device: DeviceId(0), queue: 0 };
        let mut bytes = vec![0; HEADER_BYTES + body.len()];
        frame::write(&mut bytes, &header, body.len(), |out| out.copy_from_slice(&body));
        let _ = Entry::decode(&bytes);
    }
}
