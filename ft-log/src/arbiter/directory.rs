//! A directory on shared storage as arbiter.
//!
//! ```text
//!  open DIR ► create temp ► write ► fsync ► link temp to <vm>.g<G> ─┬─ made ───────────► fsync DIR ► Won
//!                                                                   ├─ exists, ours ───► fsync DIR ► Won
//!                                                                   ├─ exists, theirs ──────────────► Lost
//!                                                                   └─ anything else ───────────────► Unreachable
//! ```
//! A link is made or not, on local file systems and over NFS alike, and the file it names is complete before. An answer that
//! got lost on the way is found again by the random identity in the claim, so asking again is harmless.

use std::{ffi::CString, io, os::fd::OwnedFd, os::unix::ffi::OsStrExt, path::PathBuf, rc::Rc};

use ft_client::crash;
use ft_protocol::{Generation, Verdict};

use super::{Answer, claim::Asker};
use crate::{
    token::{Done, Ring, Token},
    uring::Operation,
};

/// Bytes of somebody's claim that are read; ours have less.
const CLAIM_BYTES_MAX: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    OpenDirectory,
    CreateTemp,
    WriteTemp { from: usize },
    SyncTemp,
    Link,
    OpenTarget,
    ReadTarget,
    SyncDirectory,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Self::OpenDirectory => "open the arbiter's directory",
            Self::CreateTemp => "create a claim",
            Self::WriteTemp { .. } => "write a claim",
            Self::SyncTemp => "flush a claim",
            Self::Link => "place a claim",
            Self::OpenTarget => "open the claim that is there",
            Self::ReadTarget => "read the claim that is there",
            Self::SyncDirectory => "flush the arbiter's directory",
        }
    }
}

#[derive(Debug)]
struct Claim {
    generation: Generation,
    asked_at_ns: u64,
    step: Step,
    directory: Option<Rc<OwnedFd>>,
    file: Option<Rc<OwnedFd>>,
    temp: CString,
    temp_exists: bool,
    target: CString,
}

/// What a step leads to.
enum Next {
    Step(Step, Operation),
    Answer(Verdict, String),
}

/// The arbiter's state: at most one claim under way.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    asker: Asker,
    attempts: u64,
    claim: Option<Claim>,
}

impl Directory {
    pub(super) fn new(path: PathBuf, asker: Asker) -> Self {
        Self {
            path,
            asker,
            attempts: 0,
            claim: None,
        }
    }

    pub(super) fn asked_at_ns(&self) -> Option<u64> {
        self.claim.as_ref().map(|claim| claim.asked_at_ns)
    }

    pub(super) fn ask(&mut self, ring: &mut Ring, generation: Generation, now_ns: u64) -> io::Result<()> {
        if self.claim.is_some() {
            return Ok(());
        }
        crash::point("log.arbiter.before");
        self.attempts += 1;
        let target = format!("{}.g{generation}", self.asker.vm);
        let temp = format!(".{target}.{}.{}.tmp", self.asker.identity, self.attempts);
        self.claim = Some(Claim {
            generation,
            asked_at_ns: now_ns,
            step: Step::OpenDirectory,
            directory: None,
            file: None,
            temp: CString::new(temp)?,
            temp_exists: false,
            target: CString::new(target)?,
        });
        let path = CString::new(self.path.as_os_str().as_bytes())?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        ring.submit(Token::Arbiter, Operation::Open(None, path, flags))
    }

    pub(super) fn completed(&mut self, ring: &mut Ring, done: Done) -> io::Result<Option<Answer>> {
        let Some(mut claim) = self.claim.take() else {
            return Ok(None);
        };
        match self.next(&mut claim, ring, done)? {
            Next::Step(step, operation) => {
                claim.step = step;
                self.claim = Some(claim);
                ring.submit(Token::Arbiter, operation)?;
                Ok(None)
            }
            Next::Answer(verdict, detail) => {
                let generation = claim.generation;
                clean_up(claim, ring)?;
                crash::point("log.arbiter.after");
                Ok(Some(Answer {
                    generation,
                    verdict,
                    detail,
                }))
            }
        }
    }

    fn next(&self, claim: &mut Claim, ring: &mut Ring, done: Done) -> io::Result<Next> {
        let result = match done.result {
            Ok(result) => result,
            Err(error) => return Ok(self.refused(claim, &error)),
        };
        Ok(match claim.step {
            Step::OpenDirectory => {
                let directory = Rc::new(done.descriptor.expect("an open that succeeded made a descriptor"));
                claim.directory = Some(Rc::clone(&directory));
                let flags = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY;
                let create = Operation::Open(Some(directory), claim.temp.clone(), flags);
                Next::Step(Step::CreateTemp, create)
            }
            Step::CreateTemp => {
                claim.temp_exists = true;
                claim.file = done.descriptor.map(Rc::new);
                let text = self.asker.claim(claim.generation);
                Next::Step(Step::WriteTemp { from: 0 }, Operation::Write(claim.file(), text, 0, 0))
            }
            Step::WriteTemp { from } => {
                let text = done.memory.into_bytes();
                let from = from + result;
                if result == 0 {
                    self.refused(claim, &io::ErrorKind::WriteZero.into())
                } else if from < text.len() {
                    let write = Operation::Write(claim.file(), text, from, from as u64);
                    Next::Step(Step::WriteTemp { from }, write)
                } else {
                    Next::Step(Step::SyncTemp, Operation::Sync(claim.file()))
                }
            }
            Step::SyncTemp => {
                close(claim.file.take(), ring)?;
                let link = Operation::Link(claim.directory(), claim.temp.clone(), claim.target.clone());
                Next::Step(Step::Link, link)
            }
            Step::Link => Next::Step(Step::SyncDirectory, Operation::Sync(claim.directory())),
            Step::OpenTarget => {
                claim.file = done.descriptor.map(Rc::new);
                let room = vec![0; CLAIM_BYTES_MAX];
                Next::Step(Step::ReadTarget, Operation::Read(claim.file(), room))
            }
            Step::ReadTarget => {
                let text = &done.memory.into_bytes()[..result];
                match self.asker.judge(text) {
                    (Verdict::Won, _) => Next::Step(Step::SyncDirectory, Operation::Sync(claim.directory())),
                    (verdict, detail) => Next::Answer(verdict, detail),
                }
            }
            Step::SyncDirectory => Next::Answer(Verdict::Won, String::new()),
        })
    }

    fn refused(&self, claim: &Claim, error: &io::Error) -> Next {
        match (claim.step, error.raw_os_error()) {
            (Step::Link, Some(libc::EEXIST)) => {
                let open = Operation::Open(Some(claim.directory()), claim.target.clone(), libc::O_RDONLY);
                Next::Step(Step::OpenTarget, open)
            }
            // A file system whose directories cannot be flushed keeps them itself.
            (Step::SyncDirectory, Some(libc::EINVAL)) => Next::Answer(Verdict::Won, String::new()),
            (step, _) => {
                let detail = format!("{}: cannot {}: {error}", self.path.display(), step.name());
                Next::Answer(Verdict::Unreachable, detail)
            }
        }
    }
}

impl Claim {
    fn directory(&self) -> Rc<OwnedFd> {
        Rc::clone(
            self.directory
                .as_ref()
                .expect("the directory is open after the first step"),
        )
    }

    fn file(&self) -> Rc<OwnedFd> {
        Rc::clone(self.file.as_ref().expect("the claim's file is open in this step"))
    }
}

/// Closing may block on shared storage, so the kernel does it.
fn close(file: Option<Rc<OwnedFd>>, ring: &mut Ring) -> io::Result<()> {
    match file.and_then(Rc::into_inner) {
        Some(file) => ring.submit(Token::Cleanup, Operation::Close(file)),
        None => Ok(()),
    }
}

fn clean_up(mut claim: Claim, ring: &mut Ring) -> io::Result<()> {
    close(claim.file.take(), ring)?;
    let Some(directory) = claim.directory.take() else {
        return Ok(());
    };
    if claim.temp_exists {
        // The slot keeps the directory open until the unlink is done.
        return ring.submit(Token::Cleanup, Operation::Unlink(Some(directory), claim.temp));
    }
    close(Some(directory), ring)
}
