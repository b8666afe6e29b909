//! The host's side: a TAP with an address, a daemon, and the services the guest's job talks to.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::PathBuf,
    process::Command,
    thread,
    time::Duration,
};

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

use crate::{
    support::{
        daemon::{Daemon, text},
        frontend::readable_within,
        stock::{Machine, Qmp, qemu, reconnect},
    },
    wire::{GUEST_MAC, Wire, ip},
};

pub(crate) const TAP: &str = "tap-stock";
/// How long a guest under emulation may take for one thing.
const LONG: Duration = Duration::from_secs(240);
const PIECE: usize = 64 << 10;

/// The longest frames seen on the wire.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Longest {
    pub(crate) sent: usize,
    pub(crate) received: usize,
}

/// One test's host. Its namespace is that of the thread that made it, and of all that this one starts.
pub(crate) struct World {
    directory: TempDir,
    wire: Wire,
    scripts: TcpListener,
    sources: TcpListener,
    sinks: TcpListener,
    pairs: u16,
}

/// Accepts a connection, or fails in time.
fn accept(listener: &TcpListener) -> TcpStream {
    assert!(readable_within(listener, LONG), "the guest does not connect");
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    stream
}

impl World {
    pub(crate) fn new(pairs: u16, options: &[&str]) -> Self {
        let wire = Wire::with_options(TAP, options);
        ip(&["link", "set", "lo", "up"]);
        ip(&["address", "add", "10.77.0.1/24", "dev", TAP]);
        let listen = |port: u16| TcpListener::bind(("10.77.0.1", port)).unwrap();
        Self {
            wire,
            directory: TempDir::new().unwrap(),
            scripts: listen(7000),
            sources: listen(7001),
            sinks: listen(7002),
            pairs,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn daemon(&self, options: &[&str]) -> Daemon {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-ft-net"));
        command
            .args(["--socket-path", text(&self.path("socket")), "--tap", TAP])
            .args(options);
        Daemon::listening(&mut command)
    }

    fn command(&self, kernel: &str, properties: &[&str]) -> Command {
        let mut command = qemu(kernel, "net", "-");
        let chardev = format!("socket,id=net,path={},{}", text(&self.path("socket")), reconnect());
        let netdev = format!("vhost-user,id=net0,chardev=net,queues={}", self.pairs);
        let mut device = format!("virtio-net-pci,netdev=net0,mac={GUEST_MAC}");
        // QEMU 7.2 without KVM falls over MSI-X vectors of a vhost-user card, in vhost_net_start.
        device.push_str(",vectors=0");
        if self.pairs > 1 {
            device.push_str(",mq=on");
        }
        properties
            .iter()
            .for_each(|property| device.push_str(&format!(",{property}")));
        command.args(["-smp", if self.pairs > 1 { "4" } else { "2" }]);
        command.args(["-chardev", &chardev, "-netdev", &netdev, "-device", &device]);
        command
    }

    pub(crate) fn machine(&self, kernel: &str, properties: &[&str]) -> Machine {
        Machine::start(self.command(kernel, properties).arg("-no-reboot"))
    }

    pub(crate) fn machine_with_monitor(&self, kernel: &str) -> (Machine, Qmp) {
        let mut command = self.command(kernel, &[]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", text(&self.path("qmp")))]);
        let machine = Machine::start(&mut command);
        (machine, Qmp::connect(&self.path("qmp")))
    }

    /// Has the guest run a script; waits until that succeeded.
    pub(crate) fn ask(&self, machine: &mut Machine, script: &str) {
        self.begin(script);
        machine.wait_line("ft: did it");
    }

    fn begin(&self, script: &str) {
        let mut stream = accept(&self.scripts);
        writeln!(stream, "{script}\necho 'ft: did it'").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        // Until the guest has it: what follows may break the link.
        let _ = stream.read(&mut [0]);
    }

    pub(crate) fn ends(&self, machine: Machine) {
        self.begin("touch /tmp/last");
        machine.ends_well();
    }

    /// The guest takes so many bytes on each of some connections and sends them back on others; gives the longest frames of it.
    pub(crate) fn exchange(&self, machine: &mut Machine, bytes: usize, streams: usize) -> Longest {
        self.exchange_with(machine, bytes, streams, |_| {})
    }

    /// The same; `meanwhile` is told how many bytes came back on the first connection.
    pub(crate) fn exchange_with(
        &self,
        machine: &mut Machine,
        bytes: usize,
        streams: usize,
        mut meanwhile: impl FnMut(usize),
    ) -> Longest {
        self.wire.drain();
        let one = "nc 10.77.0.1 7001 </dev/null | nc 10.77.0.1 7002";
        self.begin(&format!("for stream in $(seq {streams}); do {one} & done\nwait"));
        let pairs: Vec<_> = (0..streams)
            .map(|_| (accept(&self.sources), accept(&self.sinks)))
            .collect();
        let mut sources: Vec<TcpStream> = Vec::new();
        let mut sinks = Vec::new();
        for (source, sink) in pairs {
            sources.push(source);
            sinks.push(sink);
        }
        let writers: Vec<_> = sources
            .into_iter()
            .map(|source| thread::spawn(move || pour(source, bytes)))
            .collect();
        let mut longest = Longest::default();
        let mut sinks = sinks.into_iter();
        let mut first = sinks.next().unwrap();
        let readers: Vec<_> = sinks
            .map(|mut sink| thread::spawn(move || judge(&mut sink, bytes, |_| {})))
            .collect();
        judge(&mut first, bytes, |passed| {
            meanwhile(passed);
            self.wire.longest(&mut longest.sent, &mut longest.received);
        });
        drop(first);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        machine.wait_line("ft: did it");
        longest
    }

    /// The guest connects so many times, and each time is told a number that it says back.
    pub(crate) fn connections(&self, machine: &mut Machine, count: u32) {
        let one = "nc 10.77.0.1 7001 </dev/null | nc 10.77.0.1 7002";
        self.begin(&format!("for number in $(seq {count}); do {one}; done"));
        for number in 0..count {
            let mut source = accept(&self.sources);
            source.write_all(&number.to_le_bytes()).unwrap();
            drop(source);
            let mut said = Vec::new();
            accept(&self.sinks).read_to_end(&mut said).unwrap();
            assert_eq!(said, number.to_le_bytes());
        }
        machine.wait_line("ft: did it");
    }
}

/// Bytes that nobody could guess, the same each time.
fn random() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(7)
}

fn pour(mut source: TcpStream, bytes: usize) {
    let (mut random, mut piece) = (random(), vec![0; PIECE]);
    for _ in 0..bytes / PIECE {
        random.fill_bytes(&mut piece);
        source.write_all(&piece).unwrap();
    }
    source.shutdown(Shutdown::Write).unwrap();
    let _ = source.read(&mut [0]);
}

/// Reads what was poured, to its end, and nothing else.
fn judge(sink: &mut TcpStream, bytes: usize, mut passed: impl FnMut(usize)) {
    let (mut random, mut piece, mut expected) = (random(), vec![0; PIECE], vec![0; PIECE]);
    for number in 0..bytes / PIECE {
        sink.read_exact(&mut piece).unwrap();
        random.fill_bytes(&mut expected);
        assert!(piece == expected, "piece {number} is not what was sent");
        passed((number + 1) * PIECE);
    }
    assert_eq!(sink.read(&mut piece).unwrap(), 0);
}
