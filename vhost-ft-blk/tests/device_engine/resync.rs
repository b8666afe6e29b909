//! A host that comes back with its outdated image is brought up under the running guest, and is a backup again.

use nix::sys::signal::Signal;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

use super::{
    guest::Guest,
    host::{Host, Pair, SUSPICIOUS},
    standing::is_refused,
};

/// The pair after its primary was killed under load: the survivor serves a guest again, which knows what the first one was told.
struct Survivor {
    host: Host,
    guest: Guest,
    /// The disks of the host that died.
    old: TempDir,
    addresses: [std::net::SocketAddr; 2],
    arbiter: TempDir,
}

fn fail_over(random: &mut ChaCha8Rng, more: &[&str]) -> Survivor {
    let Pair {
        primary,
        mut backup,
        addresses,
        arbiter,
    } = Pair::start(&[&SUSPICIOUS[..], more].concat());
    let mut guest = Guest::attach(&primary);
    let told = random.random_range(50..300);
    guest.work(random, told);
    let old = primary.kill(random.random());
    guest.hear();
    backup.blk.wait_line("listening");
    let mut again = Guest::attach(&backup);
    again.model = guest.model.of_the_next_guest();
    Survivor {
        host: backup,
        guest: again,
        old,
        addresses,
        arbiter,
    }
}

impl Survivor {
    /// The host that died comes back as the new backup.
    fn join(&self, old: TempDir, more: &[&str]) -> Host {
        let [primary, backup] = self.addresses;
        let more = [&["--resync"], &SUSPICIOUS[..], more].concat();
        Host::spawn(old, [backup, primary], false, self.arbiter.path(), &more, None)
    }
}

#[test]
fn an_outdated_image_is_brought_up_under_load_and_its_host_takes_over_again() {
    let first = std::env::var("FT_SEED").map_or(20, |seed| seed.parse().unwrap());
    for (seed, ack) in (first..).zip(["received", "durable"]) {
        println!("FT_SEED={seed}");
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut survivor = fail_over(&mut random, &["--ack", ack]);
        survivor.guest.work(&mut random, 300);
        let old = std::mem::replace(&mut survivor.old, TempDir::new().unwrap());
        let mut back = survivor.join(old, &["--ack", ack]);
        let Survivor {
            mut host, mut guest, ..
        } = survivor;
        guest.work(&mut random, 200);
        back.log.wait_line("this side is being synchronised");
        guest.work(&mut random, 300);
        host.blk.wait_line("the new backup's image is brought up");
        back.log.wait_line("the state is here");
        host.log.wait_line("the new backup may take over");
        guest.work(&mut random, 300);
        assert!(!back.socket().exists(), "nobody may start the VM there yet");
        // Its image may be the outdated one from here on.
        is_refused(&host.kill(random.random()));
        guest.hear();
        back.blk.wait_line("listening");
        assert_eq!(guest.model.violations(&back.content()), [""; 0], "seed {seed}");
        let content = back.content();
        let model = guest.model.of_the_next_guest();
        let mut third = Guest::attach(&back);
        third.model = model;
        assert!(third.read_all() == content);
        third.work(&mut random, 50);
        third.finish();
        assert_eq!(third.model.violations(&back.content()), [""; 0], "seed {seed}");
    }
}

#[test]
fn a_host_that_was_not_brought_up_to_the_end_takes_over_nothing() {
    let mut random = ChaCha8Rng::seed_from_u64(31);
    let mut survivor = fail_over(&mut random, &[]);
    survivor.guest.work(&mut random, 100);
    let old = std::mem::replace(&mut survivor.old, TempDir::new().unwrap());
    // The survivor answers only when the new backup's daemon stands still: it applies nothing of what is sent to it.
    survivor.host.log.stop();
    let mut back = survivor.join(old, &[]);
    back.blk.wait_line("joined");
    back.blk.stop();
    survivor.host.log.signal(Signal::SIGCONT);
    back.log.wait_line("this side is being synchronised");
    // Nobody waits for it.
    survivor.guest.work(&mut random, 200);
    let Survivor { host, .. } = survivor;
    host.kill(false);
    back.log.wait_line("not synchronised to the end");
    back.blk.signal(Signal::SIGCONT);
    assert!(!back.socket().exists());
    let Host { directory, log, blk } = back;
    let (code, said) = blk.wait();
    assert!(!said.contains("listening"), "{said}");
    assert_eq!(code, Some(4), "{said}");
    assert_eq!(log.wait().0, Some(3));
    is_refused(&directory);
}

#[test]
fn a_survivor_goes_on_without_a_new_backup_that_dies_and_takes_the_next_one() {
    let mut random = ChaCha8Rng::seed_from_u64(32);
    let mut survivor = fail_over(&mut random, &[]);
    let old = std::mem::replace(&mut survivor.old, TempDir::new().unwrap());
    survivor.host.log.stop();
    let mut back = survivor.join(old, &[]);
    back.blk.wait_line("joined");
    back.blk.stop();
    survivor.host.log.signal(Signal::SIGCONT);
    back.log.wait_line("this side is being synchronised");
    survivor.guest.work(&mut random, 50);
    let old = back.kill(true);
    survivor.host.log.wait_line("the new backup is given up");
    survivor.guest.work(&mut random, 50);
    let mut back = survivor.join(old, &[]);
    survivor.host.log.wait_line("the new backup may take over");
    survivor.guest.work(&mut random, 100);
    let Survivor { host, mut guest, .. } = survivor;
    host.kill(true);
    guest.hear();
    back.blk.wait_line("listening");
    assert_eq!(guest.model.violations(&back.content()), [""; 0]);
}
