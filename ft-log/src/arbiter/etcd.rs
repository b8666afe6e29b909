//! An etcd cluster as arbiter: one transaction per generation, no lease, no lock.
//!
//! ```text
//!  daemon's ring           thread of the arbiter                      cluster
//!    ask ──generation──►   if PREFIX/VM/g<G> was never created: put, else get ──► decided by its majority
//!    ◄─bell─ answer ────   put: Won    got ours: Won    got another's: Lost    no answer in time: Unreachable
//! ```
//! A transaction that timed out may have been performed all the same: asked again, it finds our own claim. Claims are never
//! deleted, so a generation stays decided.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    sync::mpsc,
    time::Duration,
};

use etcd_client::{Client, Compare, CompareOp, ConnectOptions, Txn, TxnOp, TxnOpResponse};
use ft_client::crash;
use ft_protocol::{Generation, Verdict};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Answer, claim::Asker};
use crate::{
    token::{Done, Ring, Token},
    uring::Operation,
};

/// How long a member has to take a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the cluster has for a transaction: an election of its own takes about a second.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of an eventfd's counter.
const BELL_BYTES: usize = 8;

/// The daemon's end: at most one question under way.
#[derive(Debug)]
pub struct Etcd {
    questions: mpsc::Sender<Generation>,
    answers: mpsc::Receiver<Answer>,
    bell: Rc<OwnedFd>,
    asked_at_ns: Option<u64>,
}

impl Etcd {
    /// Starts the thread; nothing is connected before the first question.
    pub(super) fn new(endpoints: &[String], prefix: &str, asker: Asker) -> io::Result<Self> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        let ours = bell.as_fd().try_clone_to_owned()?;
        let (questions, asked) = mpsc::channel();
        let (answered, answers) = mpsc::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut cluster = Cluster {
            members: endpoints.iter().map(|member| format!("http://{member}")).collect(),
            keys: format!("{prefix}/{}", asker.vm),
            asker,
            client: None,
        };
        std::thread::Builder::new().name("arbiter".into()).spawn(move || {
            for generation in asked {
                let answer = runtime.block_on(cluster.decide(generation));
                // The daemon may be gone by now; then there is nobody to tell.
                if answered.send(answer).is_err() || bell.write(1).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self {
            questions,
            answers,
            bell: Rc::new(ours),
            asked_at_ns: None,
        })
    }

    pub(super) fn asked_at_ns(&self) -> Option<u64> {
        self.asked_at_ns
    }

    pub(super) fn ask(&mut self, ring: &mut Ring, generation: Generation, now_ns: u64) -> io::Result<()> {
        if self.asked_at_ns.is_some() {
            return Ok(());
        }
        crash::point("log.arbiter.before");
        let gone = |_| io::Error::other("the arbiter's thread ended");
        self.questions.send(generation).map_err(gone)?;
        self.asked_at_ns = Some(now_ns);
        self.listen(ring)
    }

    fn listen(&self, ring: &mut Ring) -> io::Result<()> {
        let read = Operation::Read(Rc::clone(&self.bell), vec![0; BELL_BYTES]);
        ring.submit(Token::Arbiter, read)
    }

    pub(super) fn completed(&mut self, ring: &mut Ring, done: Done) -> io::Result<Option<Answer>> {
        match (done.result, self.answers.try_recv()) {
            (_, Ok(answer)) => {
                self.asked_at_ns = None;
                crash::point("log.arbiter.after");
                Ok(Some(answer))
            }
            // A signal ended the read; the answer is still to come.
            (_, Err(mpsc::TryRecvError::Empty)) => self.listen(ring).map(|()| None),
            (Err(error), Err(mpsc::TryRecvError::Disconnected)) => Err(error),
            (Ok(_), Err(mpsc::TryRecvError::Disconnected)) => Err(io::Error::other("the arbiter's thread ended")),
        }
    }
}

/// The thread's end.
struct Cluster {
    members: Vec<String>,
    keys: String,
    asker: Asker,
    client: Option<Client>,
}

impl Cluster {
    async fn decide(&mut self, generation: Generation) -> Answer {
        let (verdict, detail) = match tokio::time::timeout(ANSWER_TIMEOUT, self.claim(generation)).await {
            Ok(Ok(decided)) => decided,
            Ok(Err(error)) => self.unreachable(&error.to_string()),
            Err(_) => self.unreachable("no answer in time; has the cluster a majority?"),
        };
        Answer {
            generation,
            verdict,
            detail,
        }
    }

    /// A connection that failed once is made anew: members may have come back elsewhere.
    fn unreachable(&mut self, why: &str) -> (Verdict, String) {
        self.client = None;
        (
            Verdict::Unreachable,
            format!("etcd at {}: {why}", self.members.join(", ")),
        )
    }

    async fn claim(&mut self, generation: Generation) -> Result<(Verdict, String), etcd_client::Error> {
        let client = match &mut self.client {
            Some(client) => client,
            None => {
                let options = ConnectOptions::new().with_connect_timeout(CONNECT_TIMEOUT);
                self.client.insert(Client::connect(&self.members, Some(options)).await?)
            }
        };
        let key = format!("{}/g{generation}", self.keys);
        let never_created = Compare::create_revision(key.as_str(), CompareOp::Equal, 0);
        let transaction = Txn::new()
            .when([never_created])
            .and_then([TxnOp::put(key.as_str(), self.asker.claim(generation), None)])
            .or_else([TxnOp::get(key.as_str(), None)]);
        let response = client.txn(transaction).await?;
        if response.succeeded() {
            return Ok((Verdict::Won, String::new()));
        }
        let found = response.op_responses().into_iter().find_map(|response| match response {
            TxnOpResponse::Get(mut found) => found.take_kvs().pop(),
            _ => None,
        });
        Ok(match found {
            Some(claim) => self.asker.judge(claim.value()),
            // It was created and is not there: somebody deleted it, and whoever it was may be live.
            None => (Verdict::Lost, format!("the claim {key} was deleted")),
        })
    }
}
