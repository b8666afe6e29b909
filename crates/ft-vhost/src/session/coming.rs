//! What comes next on a frontend's connection, looked at before the crate `vhost` receives it, for what that has no ear for.
//!
//! ```text
//!  peek ─► SET_BACKEND_REQ_FD: its descriptor is copied, and the message left to the crate
//!      └─► SEND_RARP, NET_SET_MTU (a network device): taken, performed and answered here
//! ```
//! QEMU enables a card's first queues before it has said which features it takes, and the crate refuses that.

use std::{
    io::{self, IoSliceMut, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Mutex,
};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use vhost::vhost_user::VhostUserBackendReqHandlerMut;

use super::{CommandSender, SharedCommand, handler::Handler};

/// Bytes of a message's header: request, flags, payload size.
const HEADER_BYTES: usize = 12;
const SET_VRING_ENABLE: u32 = 18;
const SEND_RARP: u32 = 19;
const NET_SET_MTU: u32 = 20;
const NUMBER_BYTES: u32 = 8;
/// Flags: version 1, an answer, and an answer is asked for.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// The header of a message that is still there, and copies of its descriptors, or of those of the message behind it.
#[derive(Debug)]
pub(super) struct Coming {
    pub(super) code: u32,
    flags: u32,
    size: u32,
    pub(super) descriptors: Vec<OwnedFd>,
}

impl Coming {
    /// Waits for the next message on `stream`, and leaves it there; `None` at the end, which the crate will find.
    pub(super) fn peek(stream: &UnixStream) -> Option<Self> {
        let mut header = [0; HEADER_BYTES];
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; 32]);
        let mut parts = [IoSliceMut::new(&mut header)];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags).ok()?;
        let whole = received.bytes == HEADER_BYTES;
        let mut descriptors = Vec::new();
        for message in received.cmsgs().ok()? {
            if let ControlMessageOwned::ScmRights(received) = message {
                // SAFETY: the kernel made these descriptors for this call; nobody else knows their numbers.
                descriptors.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        whole.then(|| Self {
            code: word(0),
            flags: word(4),
            size: word(8),
            descriptors,
        })
    }

    /// Takes a message that only a network device understands, has it performed and answers it; `false` if it is none.
    pub(super) fn serve_network(
        &self,
        stream: &mut UnixStream,
        handler: &Mutex<Handler>,
        commands: &CommandSender,
    ) -> io::Result<bool> {
        let known = matches!(self.code, SET_VRING_ENABLE | SEND_RARP | NET_SET_MTU) && self.size == NUMBER_BYTES;
        // Descriptors say nothing: those of the message behind a short one are seen with it.
        if !known {
            return Ok(false);
        }
        let (mut header, mut number) = ([0; HEADER_BYTES], [0; NUMBER_BYTES as usize]);
        stream.read_exact(&mut header)?;
        stream.read_exact(&mut number)?;
        let failed = match self.code {
            SET_VRING_ENABLE => {
                let [index, enable] =
                    [&number[..4], &number[4..]].map(|half| u32::from_ne_bytes(*half.first_chunk().expect("4 bytes")));
                let mut handler = handler.lock().expect("a panic aborts the process");
                enable > 1 || handler.set_vring_enable(index, enable == 1).is_err()
            }
            SEND_RARP => {
                let mac = *number.first_chunk().expect("6 of 8 bytes");
                commands.shared(SharedCommand::Announce(mac)).is_err()
            }
            _ => commands.shared(SharedCommand::Mtu(u64::from_ne_bytes(number))).is_err(),
        };
        if self.flags & NEED_REPLY != 0 {
            let words = [self.code, VERSION | REPLY, NUMBER_BYTES];
            let mut answer: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            answer.extend_from_slice(&u64::from(failed).to_ne_bytes());
            stream.write_all(&answer)?;
        }
        Ok(true)
    }
}
