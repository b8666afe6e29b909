//! From the control thread to the threads of the device, and back.
//!
//! ```text
//!  control thread ─► QueueCommand ─► the one thread that serves the queue ─► answer
//!                 └► SharedCommand ─► all threads ─► the first one's answer, or the first refusal
//! ```

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::mpsc,
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest_side::{QueueSetup, dirty::GuestMemoryMmap, inflight::InflightRegion};

/// What the frontend, or the operator, changes.
#[derive(Debug)]
pub enum Command {
    /// Of one queue.
    Queue(u16, QueueCommand),
    /// Of the device.
    Shared(SharedCommand),
}

/// What changes one queue.
#[derive(Debug)]
pub enum QueueCommand {
    /// It starts.
    Start {
        /// Its layout.
        setup: QueueSetup,
        /// Where the guest notifies.
        kick: Option<EventFd>,
        /// Where to interrupt the guest.
        call: Option<EventFd>,
        /// Where to say that the queue is broken.
        error: Option<EventFd>,
    },
    /// The interrupt of the running queue moves.
    Call(Option<EventFd>),
    /// It stops, once all its requests are complete; the answer is the index of its next available entry.
    Stop,
}

/// What changes the device.
#[derive(Clone, Debug)]
pub enum SharedCommand {
    /// Guest memory.
    Memory(GuestMemoryMmap),
    /// Virtio features the driver took.
    Features(u64),
    /// Where the chains that the device holds are tracked.
    Inflight(InflightRegion),
    /// The driver writes to the configuration space.
    Config {
        /// Where.
        offset: u32,
        /// What.
        bytes: Vec<u8>,
    },
    /// The guest ran before: under an earlier daemon, or elsewhere; the answer is the configuration space.
    Resume,
    /// The operator gave the disk this many bytes, or changed its image (`None`); the answer is the configuration space.
    Resize(Option<u64>),
    /// The network is to learn that this address is here now.
    Announce([u8; 6]),
    /// The guest is told this MTU.
    Mtu(u64),
    /// What was changed elsewhere holds for every write to guest memory after the answer.
    Barrier,
    /// The frontend is gone; answered once nothing is in flight.
    Left,
    /// No other frontend will come.
    Close,
}

/// What a command came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing more to say.
    Done,
    /// Index of the next available entry of a queue that stopped.
    Index(u16),
    /// The configuration space as it is now.
    Config(Vec<u8>),
}

/// Where the answer to a command goes.
#[derive(Debug)]
pub struct Reply(mpsc::SyncSender<Result<Answer, String>>);

impl Reply {
    /// Answers the control thread.
    pub fn answer(self, answer: Result<Answer, String>) {
        // The control thread waits for every answer; if it is gone, so is the frontend.
        let _ = self.0.send(answer);
    }
}

/// A command, and where its answer goes.
pub(super) type Pending = (Command, Reply);

#[derive(Debug)]
struct Thread {
    commands: mpsc::Sender<Pending>,
    bell: EventFd,
}

impl Thread {
    fn send(&self, command: Command) -> Result<mpsc::Receiver<Result<Answer, String>>, String> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.commands.send((command, Reply(reply))).map_err(|_| ended())?;
        // A bell that cannot be rung is full, and thus rung.
        let _ = self.bell.write(1);
        Ok(answer)
    }
}

fn ended() -> String {
    "the device ended".into()
}

/// The control thread's end.
#[derive(Debug)]
pub struct CommandSender {
    threads: Vec<Thread>,
}

impl CommandSender {
    /// Has one queue changed by the thread that serves it.
    pub(super) fn queue(&self, queue: u16, command: QueueCommand) -> Result<Answer, String> {
        let thread = &self.threads[usize::from(queue) % self.threads.len()];
        let answer = thread.send(Command::Queue(queue, command))?;
        answer.recv().map_err(|_| ended())?
    }

    /// Has the device changed by all its threads.
    pub(super) fn shared(&self, command: SharedCommand) -> Result<Answer, String> {
        let send = |thread: &Thread| thread.send(Command::Shared(command.clone()));
        let answers = self.threads.iter().map(send).collect::<Result<Vec<_>, _>>()?;
        let mut first = None;
        for answer in answers {
            let answer = answer.recv().map_err(|_| ended())?;
            match first {
                Some(Ok(_)) if answer.is_ok() => {}
                Some(Err(_)) => {}
                _ => first = Some(answer),
            }
        }
        first.unwrap_or_else(|| Err(ended()))
    }
}

/// A device thread's end.
#[derive(Debug)]
pub struct CommandReceiver {
    commands: mpsc::Receiver<Pending>,
    bell: EventFd,
}

impl CommandReceiver {
    /// Readable when a command waits.
    #[must_use]
    pub fn bell(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    /// The next command, if any.
    pub fn take(&self) -> Option<Pending> {
        if let Ok(pending) = self.commands.try_recv() {
            return Some(pending);
        }
        // Silence the bell first, look again second: a command in between rings it anew.
        let _ = self.bell.read();
        self.commands.try_recv().ok()
    }
}

/// One end for the control thread, and one for each of the device's threads: queue q is served by thread q modulo their number.
///
/// # Errors
/// As eventfd(2).
pub fn channel(threads: usize) -> io::Result<(CommandSender, Vec<CommandReceiver>)> {
    let mut sender = CommandSender { threads: Vec::new() };
    let mut receivers = Vec::new();
    for _ in 0..threads {
        let (commands, receiver) = mpsc::channel();
        let bell = EventFd::new(EFD_NONBLOCK)?;
        receivers.push(CommandReceiver {
            commands: receiver,
            bell: bell.try_clone()?,
        });
        sender.threads.push(Thread { commands, bell });
    }
    Ok((sender, receivers))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device thread that answers everything with `answer`, and says what it got.
    fn thread(receiver: CommandReceiver, answer: Result<Answer, String>) -> std::thread::JoinHandle<String> {
        std::thread::spawn(move || {
            let mut got = String::new();
            while let Ok((command, reply)) = receiver.commands.recv() {
                let name = match command {
                    Command::Queue(queue, _) => format!("queue {queue};"),
                    Command::Shared(_) => "shared;".to_owned(),
                };
                got.push_str(&name);
                reply.answer(answer.clone());
            }
            got
        })
    }

    #[test]
    fn a_queue_has_one_thread_and_the_device_all() {
        let (sender, receivers) = channel(2).unwrap();
        let answers = [Ok(Answer::Index(7)), Ok(Answer::Done)];
        let threads: Vec<_> = receivers
            .into_iter()
            .zip(answers)
            .map(|(end, answer)| thread(end, answer))
            .collect();
        assert_eq!(sender.queue(2, QueueCommand::Stop), Ok(Answer::Index(7)));
        assert_eq!(sender.queue(1, QueueCommand::Stop), Ok(Answer::Done));
        assert_eq!(sender.shared(SharedCommand::Barrier), Ok(Answer::Index(7)));
        drop(sender);
        let got: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(got, ["queue 2;shared;", "queue 1;shared;"]);
    }

    #[test]
    fn one_refusal_is_the_answer() {
        let (sender, receivers) = channel(3).unwrap();
        let answers = [Ok(Answer::Done), Err("no".to_owned()), Ok(Answer::Done)];
        let threads: Vec<_> = receivers
            .into_iter()
            .zip(answers)
            .map(|(end, answer)| thread(end, answer))
            .collect();
        assert_eq!(sender.shared(SharedCommand::Barrier), Err("no".into()));
        drop(sender);
        threads.into_iter().for_each(|thread| drop(thread.join().unwrap()));
    }
}
