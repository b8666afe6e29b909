//! What an operator changes while the device runs, over a socket of its own (`--control`).
//!
//! ```text
//!  one line: "resize [BYTES]" ─► the device ─► configuration space ─► the frontend is told ─► one line: "ok: ..." or "error: ..."
//! ```

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::Arc,
    time::Duration,
};

use tracing::{info, warn};

use super::{Answer, CommandSender, ConfigSpace, SharedCommand};

/// Longest line that is read.
const LINE_BYTES_MAX: u64 = 256;
/// How long a client may take for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves operators one after the other, for ever.
pub fn serve(listener: &UnixListener, config: &ConfigSpace, commands: &Arc<CommandSender>) {
    for stream in listener.incoming() {
        let served = stream.and_then(|stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut line = String::new();
            BufReader::new((&stream).take(LINE_BYTES_MAX)).read_line(&mut line)?;
            let answer = match perform(&line, config, commands) {
                Ok(done) => format!("ok: {done}\n"),
                Err(reason) => format!("error: {reason}\n"),
            };
            info!(command = line.trim(), answer = answer.trim(), "an operator's command");
            (&stream).write_all(answer.as_bytes())
        });
        if let Err(error) = served {
            warn!(%error, "an operator's connection failed");
        }
    }
}

fn perform(line: &str, config: &ConfigSpace, commands: &Arc<CommandSender>) -> Result<String, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let bytes = match words[..] {
        ["resize"] => None,
        ["resize", bytes] => Some(bytes.parse().map_err(|_| format!("{bytes} is not a number of bytes"))?),
        _ => return Err("there is one command: resize [BYTES]".into()),
    };
    match commands.shared(SharedCommand::Resize(bytes))? {
        Answer::Config(space) => {
            config.replace(space);
            Ok("the guest is told the new size".into())
        }
        _ => Err("this device has no size".into()),
    }
}

/// Sends one command to the daemon whose `--control` is `socket`.
///
/// # Errors
/// What the operator is to know.
pub fn command(socket: &Path, line: &str) -> Result<String, String> {
    let failed = |error: std::io::Error| format!("cannot reach a daemon at {}: {error}", socket.display());
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    writeln!(stream, "{line}").map_err(failed)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).map_err(failed)?;
    match answer.trim_end().split_once(": ") {
        Some(("ok", done)) => Ok(done.into()),
        Some(("error", reason)) => Err(reason.into()),
        _ => Err("the daemon ended before it answered".into()),
    }
}
