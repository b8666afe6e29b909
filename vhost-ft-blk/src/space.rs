//! Writes that find no space on the image's file system.

use std::io;

use nix::libc;
use tracing::warn;

/// How often a write that found no space is tried again.
const RETRY_NS: u64 = 1_000_000_000;

/// What happens to a write that finds no space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnEnospc {
    /// The guest gets an error.
    Report,
    /// It waits, and is tried again every second.
    Stop,
}

/// The jobs that wait for space.
#[derive(Debug)]
pub(crate) struct Starving {
    policy: OnEnospc,
    jobs: Vec<u64>,
    retry_at_ns: u64,
}

impl Starving {
    pub(crate) fn new(policy: OnEnospc) -> Self {
        Self {
            policy,
            jobs: Vec::new(),
            retry_at_ns: 0,
        }
    }

    /// Whether a job that failed so is to wait.
    pub(crate) fn is_about(&self, error: &io::Error) -> bool {
        let is_full = matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT));
        is_full && self.policy == OnEnospc::Stop
    }

    /// Has a job wait, which is about `sector`.
    pub(crate) fn wait(&mut self, job: u64, sector: u64, error: &io::Error) {
        if self.jobs.is_empty() {
            warn!(sector, %error, "a write waits: it is tried again every second. Make space for the image");
        }
        self.jobs.push(job);
    }

    /// The jobs that are to be tried again now.
    pub(crate) fn due(&mut self, now_ns: u64) -> Vec<u64> {
        if self.jobs.is_empty() || now_ns >= self.retry_at_ns {
            self.retry_at_ns = now_ns + RETRY_NS;
            return self.take();
        }
        Vec::new()
    }

    /// When to ask for them again.
    pub(crate) fn deadline_ns(&self) -> Option<u64> {
        (!self.jobs.is_empty()).then_some(self.retry_at_ns)
    }

    /// All of them.
    pub(crate) fn take(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.jobs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_tried_again_after_a_second_and_not_before() {
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        assert!(!Starving::new(OnEnospc::Report).is_about(&full));
        let mut starving = Starving::new(OnEnospc::Stop);
        assert!(starving.is_about(&full) && !starving.is_about(&io::Error::from_raw_os_error(libc::EIO)));
        assert_eq!((starving.due(7), starving.deadline_ns()), (vec![], None));
        starving.wait(3, 0, &full);
        assert_eq!(starving.deadline_ns(), Some(7 + RETRY_NS));
        assert!(starving.due(6 + RETRY_NS).is_empty());
        assert_eq!(starving.due(7 + RETRY_NS), [3]);
        assert_eq!(starving.deadline_ns(), None);
    }
}
