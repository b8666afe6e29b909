//! What the processes say, as it happens.
//!
//! Every daemon appends JSON lines to its `--events` file and the guest's console is a file of text lines; both lie in one
//! directory that [`Events`] watches (inotify). Exits of processes and the appearance of their sockets come in too. Whoever
//! waits, waits for an event in this one list, with a deadline that says what was awaited.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::{Map, Value};

use crate::clock::now_ns;
use crate::error::{HarnessError, IoContext};
use crate::topology::HostId;

/// One thing that happened on one host.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// When, on CLOCK_MONOTONIC.
    pub t_ns: u64,
    /// Where.
    pub host: HostId,
    /// Which process said it: `ft-log`, `ft-vcpu-shim`, ..., or `console` for the guest.
    pub source: String,
    /// What: the daemon's word for it; `line` for a console line, `exited` for the end of a process.
    pub name: String,
    /// The event's other fields.
    pub fields: Map<String, Value>,
}

impl Event {
    /// Whether this is event `name` of `source` on `host`.
    #[must_use]
    pub fn is(&self, host: HostId, source: &str, name: &str) -> bool {
        self.host == host && self.source == source && self.name == name
    }

    /// A field that is a whole number.
    #[must_use]
    pub fn number(&self, field: &str) -> Option<u64> {
        self.fields.get(field)?.as_u64()
    }

    /// A field that is text.
    #[must_use]
    pub fn text(&self, field: &str) -> Option<&str> {
        self.fields.get(field)?.as_str()
    }

    /// Reads one line of a daemon's event file.
    #[must_use]
    pub fn parse(host: HostId, source: &str, line: &str) -> Option<Self> {
        let mut fields: Map<String, Value> = serde_json::from_str(line).ok()?;
        let t_ns = fields.remove("t_ns")?.as_u64()?;
        let name = fields.remove("event")?.as_str()?.to_owned();
        fields.remove("source");
        Some(Self {
            t_ns,
            host,
            source: source.to_owned(),
            name,
            fields,
        })
    }
}

/// The source name of the guest's console.
pub const CONSOLE: &str = "console";

/// The event that reports that a process' socket appeared.
pub const SOCKET: &str = "socket";

const SOCKET_SUFFIX: &str = ".sock";

#[derive(Debug, Default)]
struct Shared {
    events: Mutex<Vec<Event>>,
    news: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().expect("no holder of this lock panics")
    }

    fn push(&self, event: Event) {
        self.lock().push(event);
        self.news.notify_all();
    }

    fn wait<T>(
        &self,
        deadline: Instant,
        mut pick: impl FnMut(&[Event]) -> Option<T>,
        mut abort: impl FnMut(&[Event]) -> Option<String>,
    ) -> Result<T, WaitError> {
        let mut events = self.lock();
        loop {
            if let Some(found) = pick(&events) {
                return Ok(found);
            }
            if let Some(reason) = abort(&events) {
                return Err(WaitError::Aborted(reason));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(WaitError::Deadline);
            }
            events = self
                .news
                .wait_timeout(events, left)
                .expect("no holder of this lock panics")
                .0;
        }
    }
}

/// Hands events in from elsewhere: process exits, and the witness' progress in tests.
#[derive(Debug, Clone)]
pub struct EventSink(Arc<Shared>);

impl EventSink {
    /// Adds one event.
    pub fn push(&self, event: Event) {
        self.0.push(event);
    }
}

/// Why a wait ended without its event.
#[derive(Debug)]
pub enum WaitError {
    /// The deadline passed.
    Deadline,
    /// `abort` found a reason why the event will not come.
    Aborted(String),
}

/// The event list of a run, kept up to date by a thread.
#[derive(Debug)]
pub struct Events {
    shared: Arc<Shared>,
    directory: PathBuf,
    stop: Arc<EventFd>,
    watcher: Option<JoinHandle<()>>,
}

impl Events {
    /// Watches `directory`, which must exist.
    ///
    /// # Errors
    /// When inotify refuses.
    pub fn watch(directory: &Path) -> Result<Self, HarnessError> {
        let inotify =
            Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context(|| "start inotify".to_owned())?;
        inotify
            .add_watch(directory, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MODIFY)
            .context(|| format!("watch {}", directory.display()))?;
        let stop = Arc::new(EventFd::new().context(|| "create an eventfd".to_owned())?);
        let shared = Arc::new(Shared::default());
        let mut reader = Reader {
            shared: shared.clone(),
            directory: directory.to_owned(),
            inotify,
            files: HashMap::new(),
        };
        let stopped = stop.clone();
        let watcher = thread::Builder::new()
            .name("events".to_owned())
            .spawn(move || reader.run(&stopped))
            .context(|| "start the event thread".to_owned())?;
        Ok(Self {
            shared,
            directory: directory.to_owned(),
            stop,
            watcher: Some(watcher),
        })
    }

    /// A handle through which others add events.
    #[must_use]
    pub fn sink(&self) -> EventSink {
        EventSink(self.shared.clone())
    }

    /// Where a source's event file (or the console) belongs.
    #[must_use]
    pub fn file(&self, host: HostId, source: &str) -> PathBuf {
        self.directory.join(format!("{host}.{source}"))
    }

    /// Where a source's socket belongs; its appearance is the event `socket`.
    #[must_use]
    pub fn socket(&self, host: HostId, source: &str) -> PathBuf {
        self.directory.join(format!("{host}.{source}{SOCKET_SUFFIX}"))
    }

    /// All events so far, in the order of their arrival.
    #[must_use]
    pub fn all(&self) -> Vec<Event> {
        self.shared.lock().clone()
    }

    /// Waits until `pick` finds what it looks for.
    ///
    /// # Errors
    /// When the deadline passes, or `abort` finds that waiting is pointless.
    pub fn wait<T>(
        &self,
        deadline: Instant,
        pick: impl FnMut(&[Event]) -> Option<T>,
        abort: impl FnMut(&[Event]) -> Option<String>,
    ) -> Result<T, WaitError> {
        self.shared.wait(deadline, pick, abort)
    }

    /// A function that waits, for another thread: until an event `is_it`, but no longer than `patience` from its call on.
    pub fn until(&self, patience: Duration, is_it: fn(&Event) -> bool) -> impl FnOnce() + Send + use<> {
        let shared = self.shared.clone();
        move || {
            let seen = |events: &[Event]| events.iter().any(is_it).then_some(());
            // Whether it came is judged by who looks at the events in the end.
            let _ = shared.wait(Instant::now() + patience, seen, |_| None);
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let told = self.stop.write(1);
        if let (Ok(_), Some(watcher)) = (told, self.watcher.take()) {
            // A panic of the watcher was printed where it happened.
            let _ = watcher.join();
        }
    }
}

/// A file being followed: where we are in it, and the start of a line whose end is not there yet.
struct Followed {
    host: HostId,
    source: String,
    file: File,
    offset: u64,
    partial: Vec<u8>,
}

struct Reader {
    shared: Arc<Shared>,
    directory: PathBuf,
    inotify: Inotify,
    files: HashMap<String, Followed>,
}

impl Reader {
    fn run(&mut self, stop: &EventFd) {
        loop {
            let mut fds = [
                PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
                PollFd::new(stop.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => panic!(
                    "poll on inotify fd {} failed: {error}",
                    self.inotify.as_fd().as_raw_fd()
                ),
            }
            let stopped = fds[1].any().unwrap_or(false);
            while let Ok(changes) = self.inotify.read_events() {
                for name in changes.into_iter().filter_map(|change| change.name) {
                    if let Some(name) = name.to_str() {
                        self.follow(name);
                    }
                }
            }
            if stopped {
                return;
            }
        }
    }

    /// Reads what is new in the file, which may have just appeared.
    fn follow(&mut self, name: &str) {
        if !self.files.contains_key(name) {
            let Some((host, source)) = parse_name(name) else { return };
            if let Some(source) = source.strip_suffix(SOCKET_SUFFIX) {
                self.shared.push(Event {
                    t_ns: now_ns(),
                    host,
                    source: source.to_owned(),
                    name: SOCKET.to_owned(),
                    fields: Map::new(),
                });
                return;
            }
            let Ok(file) = File::open(self.directory.join(name)) else {
                return;
            };
            let followed = Followed {
                host,
                source: source.to_owned(),
                file,
                offset: 0,
                partial: Vec::new(),
            };
            self.files.insert(name.to_owned(), followed);
        }
        let followed = self.files.get_mut(name).expect("it was just added");
        let mut bytes = Vec::new();
        let read = followed
            .file
            .seek(SeekFrom::Start(followed.offset))
            .and_then(|_| followed.file.read_to_end(&mut bytes))
            .unwrap_or(0);
        followed.offset += read as u64;
        followed.partial.extend_from_slice(&bytes);
        while let Some(end) = followed.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = followed.partial.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            self.shared.push(line_event(followed.host, &followed.source, line));
        }
    }
}

fn line_event(host: HostId, source: &str, line: &str) -> Event {
    let parsed = if source == CONSOLE {
        None
    } else {
        Event::parse(host, source, line)
    };
    parsed.unwrap_or_else(|| {
        let fields = Map::from_iter([("text".to_owned(), Value::from(line))]);
        Event {
            t_ns: now_ns(),
            host,
            source: source.to_owned(),
            name: "line".to_owned(),
            fields,
        }
    })
}

fn parse_name(name: &str) -> Option<(HostId, &str)> {
    let (host, source) = name.split_once('.')?;
    let host = HostId::BOTH.into_iter().find(|id| id.name() == host)?;
    Some((host, source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn lines_become_events_also_when_they_arrive_in_pieces() {
        let directory = tempfile::tempdir().expect("a directory");
        let events = Events::watch(directory.path()).expect("inotify");
        let mut file = File::create(events.file(HostId::B, "ft-log")).expect("a file");
        file.write_all(br#"{"t_ns":5,"source":"ft-log","event":"suspect","rea"#)
            .expect("written");
        file.flush().expect("flushed");
        file.write_all(b"son\":\"heartbeats\"}\n{\"t_ns\":6,\"event\":\"halted\"}\n")
            .expect("written");
        let found = events
            .wait(
                soon(),
                |all| all.iter().find(|e| e.name == "halted").map(|_| all.to_vec()),
                |_| None,
            )
            .expect("both lines");
        assert_eq!(found[0].text("reason"), Some("heartbeats"));
        assert_eq!((found[0].t_ns, found[1].t_ns), (5, 6));
        assert!(found[0].is(HostId::B, "ft-log", "suspect"));
    }

    #[test]
    fn who_waits_in_another_thread_is_let_go_by_the_event_and_by_no_other() {
        let directory = tempfile::tempdir().expect("a directory");
        let events = Events::watch(directory.path()).expect("inotify");
        let wait = events.until(Duration::from_secs(3600), |event| event.name == "done");
        let (over, is_over) = std::sync::mpsc::channel();
        let waiting = thread::spawn(move || {
            wait();
            over.send(()).expect("somebody listens");
        });
        std::fs::write(events.file(HostId::A, "one"), "{\"t_ns\":1,\"event\":\"begun\"}\n").expect("written");
        events
            .wait(soon(), |all| (!all.is_empty()).then_some(()), |_| None)
            .expect("begun");
        assert!(is_over.try_recv().is_err(), "let go by another event");
        std::fs::write(events.file(HostId::A, "two"), "{\"t_ns\":2,\"event\":\"done\"}\n").expect("written");
        is_over.recv_timeout(Duration::from_secs(20)).expect("let go");
        waiting.join().expect("no panic");
    }

    #[test]
    fn console_lines_are_text_whatever_they_look_like() {
        let directory = tempfile::tempdir().expect("a directory");
        let events = Events::watch(directory.path()).expect("inotify");
        std::fs::write(events.file(HostId::A, CONSOLE), "ledger: booting\r\n{}\n").expect("written");
        let lines = events
            .wait(soon(), |all| (all.len() == 2).then(|| all.to_vec()), |_| None)
            .expect("both lines");
        assert_eq!(lines[0].text("text"), Some("ledger: booting"));
        assert_eq!(lines[1].text("text"), Some("{}"));
    }

    #[test]
    fn wait_ends_at_the_deadline_or_when_pointless() {
        let directory = tempfile::tempdir().expect("a directory");
        let events = Events::watch(directory.path()).expect("inotify");
        let late = events.wait(Instant::now(), |_| None::<()>, |_| None);
        assert!(matches!(late, Err(WaitError::Deadline)));
        let pointless = events.wait(soon(), |_| None::<()>, |_| Some("it died".to_owned()));
        assert!(matches!(pointless, Err(WaitError::Aborted(reason)) if reason == "it died"));
    }
}
