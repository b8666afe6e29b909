//! Two sessions, joined by hand.

use super::*;

struct Files {
    files: [PathBuf; 2],
}

/// A certificate and its key, as files.
fn identity(directory: &Path, name: &str) -> Files {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let files = ["crt", "key"].map(|kind| directory.join(format!("{name}.{kind}")));
    std::fs::write(&files[0], made.cert.pem()).unwrap();
    std::fs::write(&files[1], made.signing_key.serialize_pem()).unwrap();
    Files { files }
}

impl Files {
    fn facing(&self, peer: &Self) -> Identity {
        Identity::read(&self.files[0], &self.files[1], &peer.files[0]).unwrap()
    }
}

/// Carries bytes to and fro until neither has any; what each side got, or why it gave up.
fn join(a: &mut Session, b: &mut Session) -> [Result<Vec<u8>, String>; 2] {
    let mut got = [Ok(Vec::new()), Ok(Vec::new())];
    loop {
        let mut moved = false;
        for (from, to, at) in [(0, 1, 1), (1, 0, 0)] {
            let sessions = [&mut *a, &mut *b];
            let mut wire = Vec::new();
            let [first, second] = sessions;
            let (from, to) = if (from, to) == (0, 1) {
                (first, second)
            } else {
                (second, first)
            };
            from.output(&mut wire).unwrap();
            moved |= !wire.is_empty();
            let mut plain = vec![0; wire.len() + 32 * 1024];
            match to.read(&wire, &mut plain) {
                Ok(length) => {
                    if let Ok(all) = &mut got[at] {
                        all.extend_from_slice(&plain[..length]);
                    }
                }
                Err(error) => got[at] = Err(error.to_string()),
            }
        }
        if !moved {
            return got;
        }
    }
}

fn sessions(a: &Identity, b: &Identity) -> (Session, Session) {
    (a.session(Side::Primary).unwrap(), b.session(Side::Backup).unwrap())
}

#[test]
fn frames_of_any_size_pass_between_the_two_that_know_each_other() {
    let scratch = tempfile::tempdir().unwrap();
    let (a, b) = (identity(scratch.path(), "a"), identity(scratch.path(), "b"));
    let (mut a, mut b) = sessions(&a.facing(&b), &b.facing(&a));
    assert!(!a.is_open() && a.take_heartbeat_keys().is_none());
    assert_eq!(join(&mut a, &mut b), [Ok(vec![]), Ok(vec![])]);
    assert!(a.is_open() && b.is_open());
    let long: Vec<u8> = (0..600_000u32).map(|number| number as u8).collect();
    a.write(&long).unwrap();
    b.write(b"ack").unwrap();
    let got = join(&mut a, &mut b);
    assert_eq!(got[0].as_deref(), Ok(&b"ack"[..]));
    assert!(got[1].as_ref().unwrap() == &long);
}

#[test]
fn a_stranger_is_refused_with_the_reason_on_both_sides() {
    let scratch = tempfile::tempdir().unwrap();
    let [a, b, stranger] = ["a", "b", "stranger"].map(|name| identity(scratch.path(), name));
    // The backup does not know the primary.
    let (mut primary, mut backup) = sessions(&stranger.facing(&b), &b.facing(&a));
    let [at_primary, at_backup] = join(&mut primary, &mut backup);
    assert!(at_backup.unwrap_err().contains("not the one in --tls-peer"));
    assert!(at_primary.unwrap_err().contains("the peer refused this side"));
    // The primary does not know the backup.
    let (mut primary, mut backup) = sessions(&a.facing(&b), &stranger.facing(&a));
    let [at_primary, at_backup] = join(&mut primary, &mut backup);
    assert!(at_primary.unwrap_err().contains("not the one in --tls-peer"));
    assert!(at_backup.unwrap_err().contains("the peer refused this side"));
    assert!(!primary.is_open() && primary.take_heartbeat_keys().is_none());
}

#[test]
fn who_does_not_speak_tls_is_told_from_who_does() {
    let scratch = tempfile::tempdir().unwrap();
    let (a, b) = (identity(scratch.path(), "a"), identity(scratch.path(), "b"));
    let (mut primary, mut backup) = sessions(&a.facing(&b), &b.facing(&a));
    let mut hello = Vec::new();
    primary.output(&mut hello).unwrap();
    assert!(looks_like_tls(&hello));
    let mut frame = Vec::new();
    ft_protocol::message::Message::Gone { reason: "x".into() }.encode(ft_protocol::Generation(1), &mut frame);
    assert!(!looks_like_tls(&frame));
    let error = backup.read(&frame, &mut [0; 32 * 1024]).unwrap_err().to_string();
    assert!(error.contains("does not speak TLS"), "{error}");
    let mut alert = Vec::new();
    backup.output(&mut alert).unwrap();
    assert!(looks_like_tls(&alert));
}

#[test]
fn heartbeats_are_the_peers_of_this_session_or_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let (a, b) = (identity(scratch.path(), "a"), identity(scratch.path(), "b"));
    let (ours, theirs) = (a.facing(&b), b.facing(&a));
    let keys = || {
        let (mut a, mut b) = sessions(&ours, &theirs);
        assert_eq!(join(&mut a, &mut b), [Ok(vec![]), Ok(vec![])]);
        (a.take_heartbeat_keys().unwrap(), b.take_heartbeat_keys().unwrap())
    };
    let (primary, backup) = keys();
    let mut datagram = b"alive".to_vec();
    primary.seal(&mut datagram);
    assert_eq!(backup.open(&datagram), Some(&b"alive"[..]));
    assert_eq!(primary.open(&datagram), None, "sent back to its sender");
    for bit in 0..datagram.len() * 8 {
        let mut bad = datagram.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(backup.open(&bad), None, "bit {bit}");
    }
    assert_eq!(backup.open(&datagram[..TAG_BYTES - 1]), None);
    assert_eq!(keys().1.open(&datagram), None, "of another session");
}

#[test]
fn identities_that_cannot_be_used_are_named() {
    let scratch = tempfile::tempdir().unwrap();
    let (a, b) = (identity(scratch.path(), "a"), identity(scratch.path(), "b"));
    let read =
        |certificate: &Path, key: &Path, peer: &Path| Identity::read(certificate, key, peer).unwrap_err().to_string();
    let [certificate, key] = &a.files;
    assert!(read(Path::new("/none"), key, &b.files[0]).contains("/none"));
    assert!(read(certificate, certificate, &b.files[0]).contains("--tls-key"));
    assert!(read(certificate, key, key).contains("no certificate in it"));
    assert!(read(certificate, &b.files[1], &b.files[0]).contains("must be the key of --tls-cert"));
}
