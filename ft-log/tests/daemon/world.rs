//! Two hosts on the loopback interface. Everything that waits, waits for an event, with one generous deadline.

use std::{
    io::{BufRead, BufReader, Read},
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    time::{Duration, Instant},
};

use ft_client::{
    handshake::{DeviceSession, ShimSession, join_device, join_shim},
    log::{Ended, Urgency},
    region::Region,
};
use ft_protocol::{
    DeviceId, Lsn, Role,
    entry::{Body, Entry, Stop},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

/// For a pair of which one side is to notice that the other one is silent: after two seconds.
pub(crate) const SUSPICIOUS: &[&str] = &["--heartbeat-misses", "100"];
/// Nothing here takes longer on any machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
pub(crate) const VM: &str = "ledger";
pub(crate) const FINGERPRINT: [u8; 32] = [7; 32];

static WORLDS: AtomicU32 = AtomicU32::new(1);

/// A directory and two addresses that no other test has.
pub(crate) struct World {
    pub(crate) directory: tempfile::TempDir,
    addresses: [String; 2],
    /// What A takes for B, and B for A.
    peers: [String; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostId {
    A,
    B,
}

impl World {
    pub(crate) fn new() -> Self {
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        let address = |host| {
            format!(
                "127.{}.{}.{}:{}",
                1 + process % 250,
                number % 250,
                host,
                20_000 + process % 10_000
            )
        };
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("arbiter")).unwrap();
        Self {
            directory,
            addresses: [address(1), address(2)],
            peers: [address(2), address(1)],
        }
    }

    /// A world with a relay between the hosts ([`crate::proxy`]).
    pub(crate) fn proxied_world() -> Self {
        let world = Self::new();
        let other = |address: &str, host| address.replace(".1:", host).replace(".2:", host);
        let peers = [
            other(world.address(HostId::B), ".4:"),
            other(world.address(HostId::A), ".3:"),
        ];
        Self { peers, ..world }
    }

    /// The addresses of A and B, and those that stand for them at the other host.
    pub(crate) fn proxied(&self) -> [&str; 4] {
        [&self.addresses[0], &self.addresses[1], &self.peers[1], &self.peers[0]]
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn address(&self, host: HostId) -> &str {
        &self.addresses[host as usize]
    }

    pub(crate) fn socket(&self, host: HostId) -> PathBuf {
        self.path(&format!("{host:?}.sock"))
    }

    pub(crate) fn journal(&self, host: HostId) -> PathBuf {
        self.path(&format!("{host:?}.journal"))
    }

    /// The command line of a host's daemon but for `--vm`, with the usual devices.
    pub(crate) fn command(&self, host: HostId) -> Command {
        self.command_with(host, "blk0,net0")
    }

    /// A daemon whose devices are numbered in another order.
    pub(crate) fn start_devices(&self, host: HostId, devices: &str) -> Daemon {
        Self::listening(self.command_with(host, devices).args(["--vm", VM]))
    }

    fn command_with(&self, host: HostId, devices: &str) -> Command {
        let role = match host {
            HostId::A => "primary",
            HostId::B => "backup",
        };
        let mut command = Command::new(env!("CARGO_BIN_EXE_ft-log"));
        command
            .args(["--role", role, "--devices", devices, "--events", "/dev/stdout"])
            .args(["--host-name", &format!("{host:?}")])
            .args(["--listen", self.address(host), "--peer", &self.peers[host as usize]])
            .arg("--socket-path")
            .arg(self.socket(host))
            .arg("--arbiter")
            .arg(self.path("arbiter"))
            .arg("--journal")
            .arg(self.journal(host));
        command
    }

    pub(crate) fn start(&self, host: HostId) -> Daemon {
        self.start_with(host, &["--vm", VM])
    }

    /// Starts a daemon that gets as far as listening.
    pub(crate) fn start_with(&self, host: HostId, more: &[&str]) -> Daemon {
        Self::listening(&mut Self::patient(self.command(host), more))
    }

    /// The same for a VM with one disk and no shim.
    pub(crate) fn start_disk(&self, host: HostId) -> Daemon {
        Self::listening(&mut Self::patient(self.command_with(host, "blk0"), &["--vm", VM]))
    }

    /// The same with a file size limit, which stands for the full disk: large enough for the shared memory, too small for the journal.
    pub(crate) fn start_limited(&self, host: HostId, more: &[&str]) -> Daemon {
        let command = Self::patient(self.command(host), more);
        let mut shell = Command::new("bash");
        shell.args(["-c", "trap '' XFSZ; ulimit -f 10240; exec \"$0\" \"$@\""]);
        Self::listening(shell.arg(command.get_program()).args(command.get_args()))
    }

    fn listening(command: &mut Command) -> Daemon {
        let mut daemon = Daemon::spawn(command);
        daemon.wait_log("waiting for");
        daemon
    }

    /// The command line of a daemon that suspects nobody for silence, unless it is told to.
    fn patient(mut command: Command, more: &[&str]) -> Command {
        command.args(more);
        if !more.contains(&"--heartbeat-misses") {
            // A busy machine is not a dead host.
            command.args(["--heartbeat-misses", "10000"]);
        }
        if !more.contains(&"--channel-timeout-ms") {
            command.args(["--channel-timeout-ms", "200000"]);
        }
        // Whatever ends a side, its peer hears of it.
        command.args(["--leave-timeout-ms", "60000"]);
        if !more.contains(&"--replay-timeout-ms") {
            // The replay is the test's own, and it may take its time.
            command.args(["--replay-timeout-ms", "3600000"]);
        }
        command
    }

    /// A daemon and its local processes, all joined.
    pub(crate) fn host_with(&self, host: HostId, more: &[&str]) -> Host {
        let arguments: Vec<&str> = ["--vm", VM].iter().chain(more).copied().collect();
        let daemon = self.start_with(host, &arguments);
        Host::join(daemon, &self.socket(host), &FINGERPRINT)
    }

    pub(crate) fn pair(&self) -> (Host, Host) {
        self.pair_with(&[])
    }

    pub(crate) fn pair_with(&self, more: &[&str]) -> (Host, Host) {
        let (mut a, mut b) = (self.host_with(HostId::A, more), self.host_with(HostId::B, more));
        a.daemon.wait_event("paired");
        b.daemon.wait_event("paired");
        a.wait_role(Role::Recording);
        b.wait_role(Role::Replaying);
        (a, b)
    }
}

/// A running ft-log.
pub(crate) struct Daemon {
    child: Child,
    events: Receiver<String>,
    log: Receiver<String>,
    /// Everything it logged so far.
    pub(crate) logged: String,
}

fn lines(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines() {
            let Ok(line) = line else { break };
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

impl Daemon {
    pub(crate) fn spawn(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            events: lines(child.stdout.take().unwrap()),
            log: lines(child.stderr.take().unwrap()),
            child,
            logged: String::new(),
        }
    }

    /// The next event of this name.
    pub(crate) fn wait_event(&mut self, name: &str) -> Value {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let line = self
                .events
                .recv_timeout(deadline - Instant::now())
                .unwrap_or_else(|error| {
                    self.read_log();
                    panic!(
                        "event '{name}' did not come ({error}); the daemon said:\n{}",
                        self.logged
                    )
                });
            let event: Value = serde_json::from_str(&line).unwrap();
            if event["event"] == name {
                return event;
            }
        }
    }

    /// Waits for a line of its log that contains `text`.
    pub(crate) fn wait_log(&mut self, text: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let line = self
                .log
                .recv_timeout(deadline - Instant::now())
                .unwrap_or_else(|error| panic!("'{text}' did not come ({error}) in:\n{}", self.logged));
            self.logged += &line;
            self.logged.push('\n');
            if line.contains(text) {
                return line;
            }
        }
    }

    fn read_log(&mut self) {
        while let Ok(line) = self.log.try_recv() {
            self.logged += &line;
            self.logged.push('\n');
        }
    }

    /// Waits for its end; afterwards `logged` is complete.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.log.recv_timeout(deadline - Instant::now()) {
                Ok(line) => {
                    self.logged += &line;
                    self.logged.push('\n');
                }
                Err(RecvTimeoutError::Disconnected) => return self.child.wait().unwrap(),
                Err(RecvTimeoutError::Timeout) => panic!("the daemon did not end; it said:\n{}", self.logged),
            }
        }
    }

    pub(crate) fn wait_code(&mut self) -> i32 {
        let status = self.wait();
        status
            .code()
            .unwrap_or_else(|| panic!("ended by a signal ({status}); it said:\n{}", self.logged))
    }

    /// Names of all further events until its end.
    pub(crate) fn rest_of_events(&mut self) -> Vec<String> {
        let name = |line: String| {
            serde_json::from_str::<Value>(&line).unwrap()["event"]
                .as_str()
                .map(String::from)
        };
        self.events.iter().filter_map(name).collect()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A daemon with the local processes of its one VM.
pub(crate) struct Host {
    pub(crate) daemon: Daemon,
    pub(crate) locals: Locals,
}

impl Host {
    pub(crate) fn join(daemon: Daemon, socket: &Path, fingerprint: &[u8; 32]) -> Self {
        let locals = Locals::join(socket, VM, fingerprint);
        Self { daemon, locals }
    }
}

impl Deref for Host {
    type Target = Locals;

    fn deref(&self) -> &Locals {
        &self.locals
    }
}

impl DerefMut for Host {
    fn deref_mut(&mut self) -> &mut Locals {
        &mut self.locals
    }
}

/// The local processes of a VM.
pub(crate) struct Locals {
    pub(crate) shim: ShimSession,
    pub(crate) devices: Vec<DeviceSession>,
}

impl Locals {
    /// The shim and one device join before the other device: the order is free.
    pub(crate) fn join(socket: &Path, vm: &str, fingerprint: &[u8; 32]) -> Self {
        let device = |name| join_device(socket, vm, name, fingerprint).unwrap();
        let blk = device("blk0");
        let (path, name, digest) = (socket.to_owned(), vm.to_owned(), *fingerprint);
        let shim = std::thread::spawn(move || join_shim(&path, &name, &digest).unwrap());
        let net = device("net0");
        Self {
            shim: shim.join().unwrap(),
            devices: vec![blk, net],
        }
    }

    pub(crate) fn region(&self) -> &Region {
        &self.shim.region
    }

    pub(crate) fn wait_role(&self, role: Role) {
        self.wait_role_in(&[role]);
    }

    /// Waits until its role is one of these.
    pub(crate) fn wait_role_in(&self, roles: &[Role]) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let ticket = self.region().shim_ticket();
            let now = self.region().role();
            if roles.contains(&now) {
                return;
            }
            assert!(Instant::now() < deadline, "role is {now:?}, not one of {roles:?}");
            self.region().sleep_shim(ticket, Some(DEADLINE));
        }
    }

    /// Appends `count` entries to a replica that may end meanwhile, see [`append`].
    pub(crate) fn try_append(&mut self, count: u64) -> Result<Lsn, Ended> {
        try_append(&mut self.shim, &mut self.devices, count)
    }

    /// Appends `count` entries, see [`append`].
    pub(crate) fn append(&mut self, count: u64) -> Lsn {
        append(&mut self.shim, &mut self.devices, count)
    }

    /// Waits, as a device does, until an entry is committed.
    pub(crate) fn wait_committed(&self, lsn: Lsn) {
        let device = self.devices.last().unwrap();
        device.region.want_commit(device.device, lsn);
        let deadline = Instant::now() + DEADLINE;
        while !device.region.committed().covers(lsn) {
            assert!(Instant::now() < deadline, "entry {lsn} is not committed");
            let mut polled = [PollFd::new(device.commit_event.as_fd_compat(), PollFlags::POLLIN)];
            poll(&mut polled, PollTimeout::from(10_000u16)).unwrap();
            let _ = device.commit_event.read();
        }
    }

    /// Takes the next entry to replay, as the shim does, and gives its frame.
    pub(crate) fn replay(&mut self) -> Vec<u8> {
        let deadline = Instant::now() + DEADLINE;
        let mut bytes = Vec::new();
        loop {
            let ticket = self.region().shim_ticket();
            if self.shim.replay.pop(&mut bytes).unwrap().is_some() {
                return bytes;
            }
            assert!(Instant::now() < deadline, "no entry to replay");
            self.region().sleep_shim(ticket, Some(DEADLINE));
        }
    }

    /// Takes the next entry to replay, if there is one.
    pub(crate) fn try_replay(&mut self) -> Option<Lsn> {
        let mut bytes = Vec::new();
        self.shim.replay.pop(&mut bytes).unwrap()?;
        Some(Entry::decode(&bytes).unwrap().lsn)
    }

    /// Replays everything through `last`, checks the order, and says so to the daemon.
    pub(crate) fn replay_through(&mut self, from: Lsn, last: Lsn) -> Vec<u8> {
        let mut all = Vec::new();
        for lsn in from.0..=last.0 {
            let bytes = self.replay();
            assert_eq!(Entry::decode(&bytes).unwrap().lsn, Lsn(lsn));
            all.extend(bytes);
        }
        self.consumed(last);
        all
    }

    pub(crate) fn consumed(&self, lsn: Lsn) {
        let _ = self.region().set_consumed(lsn);
        self.shim.log.ring_doorbell();
    }

    pub(crate) fn power_off(&mut self) -> Lsn {
        let body = Body::PowerOff {
            stop: Stop::default(),
            reset: false,
        };
        self.shim.log.append(DeviceId::SHIM, 0, &body, Urgency::Now).unwrap()
    }
}

/// Appends `count` entries, by turns from the shim and the devices, and gives the last LSN.
pub(crate) fn append(shim: &mut ShimSession, devices: &mut [DeviceSession], count: u64) -> Lsn {
    try_append(shim, devices, count).unwrap()
}

/// The same with a replica that may end meanwhile.
fn try_append(shim: &mut ShimSession, devices: &mut [DeviceSession], count: u64) -> Result<Lsn, Ended> {
    let mut last = Lsn::ZERO;
    for index in 0..count {
        let payload = vec![index as u8; (index as usize * 37) % 3000];
        let input = Body::Input {
            sequence: index,
            payload: &payload,
        };
        last = match index % 3 {
            0 => shim
                .log
                .append(DeviceId::SHIM, 0, &Body::Sync(Stop::default()), Urgency::Now),
            1 => devices[0].log.append(DeviceId(0), 0, &input, Urgency::Now),
            _ => devices[1].log.append(DeviceId(1), 0, &input, Urgency::Now),
        }?;
    }
    Ok(last)
}

/// vmm-sys-util's EventFd lends only a raw descriptor.
trait AsFdCompat {
    fn as_fd_compat(&self) -> std::os::fd::BorrowedFd<'_>;
}

impl AsFdCompat for vmm_sys_util::eventfd::EventFd {
    fn as_fd_compat(&self) -> std::os::fd::BorrowedFd<'_> {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor is open as long as `self` is borrowed.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}
