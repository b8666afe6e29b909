//! A daemon process under test.

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, ChildStderr, Command, ExitStatus, Stdio},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// The process; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Daemon {
    pub fn spawn(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self { child, stderr }
    }

    /// Spawns, and waits until it listens.
    pub fn listening(command: &mut Command) -> Self {
        let mut daemon = Self::spawn(command);
        daemon.wait_line("listening");
        daemon
    }

    /// Reads its log up to a line with `text`.
    pub fn wait_line(&mut self, text: &str) -> String {
        let mut line = String::new();
        while self.stderr.read_line(&mut line).unwrap() != 0 {
            eprint!("daemon: {line}");
            if line.contains(text) {
                return line;
            }
            line.clear();
        }
        panic!("the daemon ended without saying '{text}': {:?}", self.child.wait());
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Stops all of it; returns when it stands still. SIGCONT lets it go on.
    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let pid = Pid::from_raw(self.child.id() as i32);
        let status = waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert_eq!(status, WaitStatus::Stopped(pid, Signal::SIGSTOP));
    }

    /// Kills it, at once and for good.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for the end; gives the exit code and the rest of the log.
    pub fn wait(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.stderr.read_to_string(&mut rest).unwrap();
        eprint!("{rest}");
        let status: ExitStatus = self.child.wait().unwrap();
        (status.code(), rest)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a daemon that is expected not to start: exit code and what it said.
pub fn fails(command: &mut Command) -> (Option<i32>, String) {
    Daemon::spawn(command).wait()
}

/// Path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
