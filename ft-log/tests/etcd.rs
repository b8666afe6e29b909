//! A real etcd cluster of three members as arbiter. Needs the program `etcd` (package etcd-server); run by scripts/test.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use ft_client::events::monotonic_ns;
use ft_log::{
    arbiter::{Answer, Arbiter, ArbiterAddress},
    token::{Ring, Token},
    uring::Uring,
};
use ft_protocol::{Generation, Verdict};
use tempfile::TempDir;

const VM: &str = "ledger";
const GENERATIONS: u32 = 100;
/// How long a test waits for what must happen: members that start, elect, come back.
const PATIENCE: Duration = Duration::from_secs(60);

/// Ports nobody has: taken, and given back when all are known.
fn free_ports<const N: usize>() -> [u16; N] {
    let listeners: [TcpListener; N] = std::array::from_fn(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

/// Three members; killed when dropped.
struct Cluster {
    directory: TempDir,
    client_ports: [u16; 3],
    peer_ports: [u16; 3],
    members: [Option<Child>; 3],
}

impl Cluster {
    fn start() -> Self {
        let [a, b, c, d, e, f] = free_ports();
        let mut cluster = Self {
            directory: TempDir::new().unwrap(),
            client_ports: [a, b, c],
            peer_ports: [d, e, f],
            members: [None, None, None],
        };
        (0..3).for_each(|member| cluster.run(member));
        cluster
    }

    fn run(&mut self, member: usize) {
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let all: Vec<_> = (0..3).map(|at| format!("m{at}={}", url(self.peer_ports[at]))).collect();
        let (client, peer) = (url(self.client_ports[member]), url(self.peer_ports[member]));
        let mut command = Command::new("etcd");
        command.args(["--name", &format!("m{member}"), "--initial-cluster", &all.join(",")]);
        command
            .arg("--data-dir")
            .arg(self.directory.path().join(format!("m{member}")));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--heartbeat-interval", "50", "--election-timeout", "500"]);
        let log = std::fs::File::create(self.directory.path().join(format!("m{member}.log"))).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        self.members[member] = Some(child.expect("etcd starts: install the package etcd-server"));
    }

    fn kill(&mut self, member: usize) {
        let mut child = self.members[member].take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn asker(&self, host: &str) -> Asker {
        let members: Vec<_> = self
            .client_ports
            .iter()
            .map(|port| format!("127.0.0.1:{port}"))
            .collect();
        let address: ArbiterAddress = format!("etcd://{}/test", members.join(",")).parse().unwrap();
        Asker {
            arbiter: Arbiter::new(&address, VM, host).unwrap(),
            ring: Uring::new().unwrap(),
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.members.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

struct Asker {
    arbiter: Arbiter,
    ring: Ring,
}

impl Asker {
    fn ask(&mut self, generation: u32) -> Answer {
        self.arbiter
            .ask(&mut self.ring, Generation(generation), monotonic_ns())
            .unwrap();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            self.ring.enter(Some(1_000_000_000)).unwrap();
            while let Some(done) = self.ring.next_completion() {
                if done.token == Token::Arbiter
                    && let Some(answer) = self.arbiter.completed(&mut self.ring, done).unwrap()
                {
                    assert_eq!(answer.generation, Generation(generation));
                    assert_eq!(self.arbiter.asked_at_ns(), None);
                    return answer;
                }
            }
        }
        panic!("no answer for generation {generation}");
    }

    /// Asks as the daemon does: again and again, while there is no answer.
    fn ask_until_decided(&mut self, generation: u32) -> Verdict {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.ask(generation) {
                Answer {
                    verdict: Verdict::Unreachable,
                    detail,
                    ..
                } => assert!(Instant::now() < deadline, "still no majority: {detail}"),
                answer => return answer.verdict,
            }
        }
    }
}

#[test]
fn two_sides_race_and_each_generation_has_one_winner() {
    let cluster = Cluster::start();
    let race = |host: &str| -> Vec<bool> {
        let mut asker = cluster.asker(host);
        let won: Vec<_> = (1..=GENERATIONS)
            .map(|generation| asker.ask_until_decided(generation) == Verdict::Won)
            .collect();
        // Asked again, it says so again.
        for generation in [1, GENERATIONS] {
            let again = asker.ask_until_decided(generation) == Verdict::Won;
            assert_eq!(again, won[generation as usize - 1], "generation {generation}");
        }
        won
    };
    let (first, second) = std::thread::scope(|scope| {
        let other = scope.spawn(|| race("b"));
        (race("a"), other.join().unwrap())
    });
    for (generation, (first, second)) in first.iter().zip(&second).enumerate() {
        assert!(first ^ second, "generation {}: {first} and {second}", generation + 1);
    }
    // A process that was started again is another asker.
    assert_eq!(cluster.asker("a").ask_until_decided(1), Verdict::Lost);
}

#[test]
fn a_majority_decides_and_less_is_unreachable() {
    let mut cluster = Cluster::start();
    let (mut a, mut b) = (cluster.asker("a"), cluster.asker("b"));
    assert_eq!(a.ask_until_decided(1), Verdict::Won);
    let lost = b.ask(1);
    assert_eq!(lost.verdict, Verdict::Lost, "{}", lost.detail);
    assert!(lost.detail.contains("claimed by host \"a\""), "{}", lost.detail);

    cluster.kill(0);
    assert_eq!(b.ask_until_decided(2), Verdict::Won);
    assert_eq!(a.ask_until_decided(2), Verdict::Lost);

    cluster.kill(1);
    for _ in 0..2 {
        let answer = a.ask(3);
        assert_eq!(answer.verdict, Verdict::Unreachable, "{}", answer.detail);
        assert!(answer.detail.contains("etcd at "), "{}", answer.detail);
    }
    cluster.run(1);
    // One of the questions without an answer may have been performed: then it was its asker's own claim.
    assert_eq!(a.ask_until_decided(3), Verdict::Won);
    assert_eq!(b.ask_until_decided(3), Verdict::Lost);
}

#[test]
fn a_cluster_that_is_not_there_is_unreachable() {
    let [port] = free_ports();
    let address: ArbiterAddress = format!("etcd://127.0.0.1:{port}").parse().unwrap();
    let mut asker = Asker {
        arbiter: Arbiter::new(&address, VM, "a").unwrap(),
        ring: Uring::new().unwrap(),
    };
    assert_eq!(asker.ask(1).verdict, Verdict::Unreachable);
}
