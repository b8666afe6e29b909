//! The io_uring shell: every operation owns its memory and its descriptor until the kernel is done with both.
//!
//! ```text
//!  submit(token, operation) ──► slot {token, memory, descriptor} ──► kernel
//!  next_completion() ◄── Completion {token, result, memory} ◄── slot freed ◄───────┘
//! ```
//! This is the one home of `unsafe` on the I/O path. Nothing outside can touch a buffer while the kernel may: it is *in* the
//! slot, and comes back with the completion.

use std::{
    ffi::CString,
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    rc::Rc,
};

use ft_client::events::monotonic_ns;
use io_uring::{IoUring, opcode, squeue, types};

use crate::sockaddr::RawAddress;

/// Submission queue entries; completions have room for twice as many, and the kernel keeps what does not fit.
const ENTRIES: u32 = 128;

/// Completions of cancellations, which belong to no slot.
const CANCELLATION: u64 = u64::MAX;

/// A send of at most so many bytes is done as soon as it is handed over, unless the other end has long stopped reading.
const PROMPT_BYTES: usize = 16 * 1024;
/// How long a wait lasts that takes a send for prompt which is not.
const PROMPT_WAIT_NS: u64 = 5_000_000;

/// What an operation works on. It belongs to the operation until its completion hands it back.
#[derive(Debug)]
pub enum Memory {
    /// Nothing.
    None,
    /// Bytes to send or to fill.
    Bytes(Vec<u8>),
    /// A datagram, with its source or destination.
    Datagram(Box<Datagram>),
    /// Paths and addresses, which nobody wants back.
    Spent(Spent),
}

impl Memory {
    /// The bytes of a send, receive, read or write.
    ///
    /// # Panics
    /// For an operation of another kind: a bug.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        match self {
            Self::Bytes(bytes) => bytes,
            other => panic!("an operation came back with {other:?} in the place of bytes"),
        }
    }

    /// The datagram of a receive or send.
    ///
    /// # Panics
    /// For an operation of another kind: a bug.
    #[must_use]
    pub fn into_datagram(self) -> Box<Datagram> {
        match self {
            Self::Datagram(datagram) => datagram,
            other => panic!("an operation came back with {other:?} in the place of a datagram"),
        }
    }
}

/// Memory that only the kernel reads.
#[derive(Debug)]
pub enum Spent {
    /// Of openat or unlinkat.
    Path(CString),
    /// Of linkat.
    Paths(CString, CString),
    /// Of connect.
    Address(Box<RawAddress>),
}

/// One datagram and its address, in the form sendmsg(2) and recvmsg(2) want.
#[derive(Debug)]
pub struct Datagram {
    header: libc::msghdr,
    vector: libc::iovec,
    address: RawAddress,
    /// The bytes; after a receive, of the length the completion says.
    pub bytes: Vec<u8>,
}

impl Datagram {
    /// Room to receive `length` bytes.
    #[must_use]
    pub fn to_receive(length: usize) -> Box<Self> {
        Self::new(RawAddress::empty(), vec![0; length])
    }

    /// `bytes` for `to`.
    #[must_use]
    pub fn to_send(to: SocketAddr, bytes: Vec<u8>) -> Box<Self> {
        Self::new(RawAddress::from(to), bytes)
    }

    fn new(address: RawAddress, bytes: Vec<u8>) -> Box<Self> {
        // SAFETY: msghdr is plain data for which all zeros (null pointers, zero lengths) is a valid value.
        let header = unsafe { std::mem::zeroed() };
        let vector = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        Box::new(Self {
            header,
            vector,
            address,
            bytes,
        })
    }

    /// Where a received datagram came from.
    #[must_use]
    pub fn source(&self) -> Option<SocketAddr> {
        self.address.get(self.header.msg_namelen)
    }

    /// Points the header at the box's own parts, which stay where they are while the operation runs.
    fn point(&mut self) -> *mut libc::msghdr {
        self.vector.iov_base = self.bytes.as_mut_ptr().cast();
        self.vector.iov_len = self.bytes.len();
        self.header.msg_name = self.address.as_mut_ptr().cast();
        self.header.msg_namelen = self.address.len();
        self.header.msg_iov = &raw mut self.vector;
        self.header.msg_iovlen = 1;
        &raw mut self.header
    }
}

/// An operation for [`Uring::submit`].
#[derive(Debug)]
pub enum Operation {
    /// accept4(2); the completion's descriptor is the connection.
    Accept(Rc<OwnedFd>),
    /// connect(2).
    Connect(Rc<OwnedFd>, SocketAddr),
    /// recv(2) into `bytes[from..]`.
    Receive(Rc<OwnedFd>, Vec<u8>, usize),
    /// send(2) of `bytes[from..]`.
    Send(Rc<OwnedFd>, Vec<u8>, usize),
    /// recvmsg(2).
    ReceiveDatagram(Rc<OwnedFd>, Box<Datagram>),
    /// sendmsg(2).
    SendDatagram(Rc<OwnedFd>, Box<Datagram>),
    /// shutdown(2).
    Shutdown(Rc<OwnedFd>, i32),
    /// read(2) into all of `bytes`, from the start of a file or from a descriptor without a position.
    Read(Rc<OwnedFd>, Vec<u8>),
    /// pwrite(2) of `bytes[from..]` at a file offset.
    Write(Rc<OwnedFd>, Vec<u8>, usize, u64),
    /// fsync(2).
    Sync(Rc<OwnedFd>),
    /// openat(2), relative to a directory if there is one; the completion's descriptor is the file.
    Open(Option<Rc<OwnedFd>>, CString, i32),
    /// linkat(2), both paths in one directory.
    Link(Rc<OwnedFd>, CString, CString),
    /// unlinkat(2), relative to a directory if there is one.
    Unlink(Option<Rc<OwnedFd>>, CString),
    /// close(2), where it might block.
    Close(OwnedFd),
}

/// A finished operation.
#[derive(Debug)]
pub struct Completion<T> {
    /// The submitter's name for it.
    pub token: T,
    /// What the system call would have returned.
    pub result: io::Result<usize>,
    /// The descriptor that an accept or open made.
    pub descriptor: Option<OwnedFd>,
    /// The memory it worked on.
    pub memory: Memory,
}

#[derive(Debug)]
struct Slot<T> {
    token: T,
    memory: Memory,
    makes_descriptor: bool,
    /// Keeps the descriptor's number from being reused before the kernel has looked it up.
    _descriptor: Option<Rc<OwnedFd>>,
}

/// The ring, and the operations in flight.
pub struct Uring<T> {
    ring: IoUring,
    slots: Vec<Option<Slot<T>>>,
    free: Vec<usize>,
    /// Queued sends that will be done as soon as they are handed over.
    prompt: usize,
}

impl<T> std::fmt::Debug for Uring<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("in_flight", &self.in_flight()).finish()
    }
}

impl<T> Uring<T> {
    /// A new ring; on kernels before 6.1 without the flags that save interrupts.
    ///
    /// # Errors
    /// A kernel without io_uring, or one that forbids it.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(ENTRIES)
            .or_else(|_| IoUring::new(ENTRIES))?;
        Ok(Self {
            ring,
            slots: Vec::new(),
            free: Vec::new(),
            prompt: 0,
        })
    }

    /// Operations that the kernel has not finished.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether an operation with this name is in flight.
    #[must_use]
    pub fn is_in_flight(&self, token: &T) -> bool
    where
        T: PartialEq,
    {
        self.slots.iter().flatten().any(|slot| slot.token == *token)
    }

    /// Whether operations are queued that the kernel has not seen.
    pub fn has_queued(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Whether something finished, or would with the next [`Uring::enter`].
    pub fn has_news(&mut self) -> bool {
        self.ring.submission().taskrun() || !self.ring.completion().is_empty()
    }

    /// Queues an operation; [`Uring::enter`] hands it to the kernel.
    ///
    /// # Errors
    /// As io_uring_enter(2), when a full queue had to be handed over first.
    pub fn submit(&mut self, token: T, operation: Operation) -> io::Result<()> {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let makes_descriptor = matches!(operation, Operation::Accept(_) | Operation::Open(..));
        let is_prompt = match &operation {
            Operation::Send(_, bytes, from) => bytes.len() - from <= PROMPT_BYTES,
            Operation::SendDatagram(..) => true,
            _ => false,
        };
        let (entry, memory, descriptor) = prepare(operation);
        self.slots[index] = Some(Slot {
            token,
            memory,
            makes_descriptor,
            _descriptor: descriptor,
        });
        let entry = entry.user_data(index as u64);
        // SAFETY: everything the entry points to is on the heap and owned by the slot, which lives until the completion (or for
        // ever, see `drop`); the descriptor is kept open by the slot, or given to close(2).
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.enter(None)?;
        }
        self.prompt += usize::from(is_prompt);
        Ok(())
    }

    /// Hands the queued operations to the kernel and, with a timeout, waits that long for a completion. Small sends among them are done
    /// at once: to have them back is nothing to wake up for, their completions come with the next one.
    ///
    /// # Errors
    /// As io_uring_enter(2); running out of time or being interrupted is none.
    pub fn enter(&mut self, timeout_ns: Option<u64>) -> io::Result<()> {
        let prompt = std::mem::take(&mut self.prompt);
        let entered = match timeout_ns {
            None => self.ring.submit(),
            Some(mut timeout) => {
                if prompt > 0 {
                    timeout = timeout.min(PROMPT_WAIT_NS);
                }
                let time = types::Timespec::new()
                    .sec(timeout / 1_000_000_000)
                    .nsec((timeout % 1_000_000_000) as u32);
                let arguments = types::SubmitArgs::new().timespec(&time);
                self.ring.submitter().submit_with_args(1 + prompt, &arguments)
            }
        };
        match entered {
            Err(error)
                if !matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY)
                ) =>
            {
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// Breaks off what is in flight and waits, until `until_ns` of the monotonic clock, for the kernel to be done with it: descriptors and
    /// memory are free then. What it cannot break off in that time keeps them for ever.
    ///
    /// # Errors
    /// As io_uring_enter(2).
    pub fn wind_down(&mut self, until_ns: u64) -> io::Result<()> {
        let busy: Vec<_> = (0..self.slots.len()).filter(|at| self.slots[*at].is_some()).collect();
        for index in busy {
            let entry = opcode::AsyncCancel::new(index as u64).build().user_data(CANCELLATION);
            // SAFETY: the entry points to nothing.
            while unsafe { self.ring.submission().push(&entry) }.is_err() {
                self.enter(None)?;
            }
        }
        loop {
            while self.next_completion().is_some() {}
            let now_ns = monotonic_ns();
            if self.in_flight() == 0 || now_ns >= until_ns {
                return Ok(());
            }
            self.enter(Some(until_ns - now_ns))?;
        }
    }

    /// The next finished operation.
    pub fn next_completion(&mut self) -> Option<Completion<T>> {
        let entry = loop {
            let entry = self.ring.completion().next()?;
            if entry.user_data() != CANCELLATION {
                break entry;
            }
        };
        let index = entry.user_data() as usize;
        let slot = self.slots[index].take().expect("a completion belongs to an operation");
        self.free.push(index);
        let result = entry.result();
        let descriptor = (slot.makes_descriptor && result >= 0).then(|| {
            // SAFETY: the kernel just made this descriptor for this operation; nobody else knows it.
            unsafe { OwnedFd::from_raw_fd(result) }
        });
        Some(Completion {
            token: slot.token,
            result: if result < 0 {
                Err(io::Error::from_raw_os_error(-result))
            } else {
                Ok(result as usize)
            },
            descriptor,
            memory: slot.memory,
        })
    }
}

impl<T> Drop for Uring<T> {
    fn drop(&mut self) {
        // The kernel may still write into the memory of what is in flight: it is never freed.
        std::mem::forget(std::mem::take(&mut self.slots));
    }
}

fn fd(descriptor: &Rc<OwnedFd>) -> types::Fd {
    types::Fd(descriptor.as_raw_fd())
}

/// Start and length of `bytes[from..]`; moving the Vec afterwards does not move its bytes.
fn tail(bytes: &mut [u8], from: usize) -> (*mut u8, u32) {
    let tail = &mut bytes[from..];
    (
        tail.as_mut_ptr(),
        u32::try_from(tail.len()).expect("a buffer of less than 4 GiB"),
    )
}

/// The queue entry of an operation, with what must outlive it.
fn prepare(operation: Operation) -> (squeue::Entry, Memory, Option<Rc<OwnedFd>>) {
    const NO_SIGNAL: i32 = libc::MSG_NOSIGNAL;
    match operation {
        Operation::Accept(socket) => {
            let entry = opcode::Accept::new(fd(&socket), std::ptr::null_mut(), std::ptr::null_mut())
                .flags(libc::SOCK_CLOEXEC)
                .build();
            (entry, Memory::None, Some(socket))
        }
        Operation::Connect(socket, address) => {
            let mut address = Box::new(RawAddress::from(address));
            let entry = opcode::Connect::new(fd(&socket), address.as_mut_ptr(), address.len()).build();
            (entry, Memory::Spent(Spent::Address(address)), Some(socket))
        }
        Operation::Receive(socket, mut bytes, from) => {
            let (start, length) = tail(&mut bytes, from);
            let entry = opcode::Recv::new(fd(&socket), start, length).build();
            (entry, Memory::Bytes(bytes), Some(socket))
        }
        Operation::Send(socket, mut bytes, from) => {
            let (start, length) = tail(&mut bytes, from);
            let entry = opcode::Send::new(fd(&socket), start, length).flags(NO_SIGNAL).build();
            (entry, Memory::Bytes(bytes), Some(socket))
        }
        Operation::ReceiveDatagram(socket, mut datagram) => {
            let entry = opcode::RecvMsg::new(fd(&socket), datagram.point()).build();
            (entry, Memory::Datagram(datagram), Some(socket))
        }
        Operation::SendDatagram(socket, mut datagram) => {
            let entry = opcode::SendMsg::new(fd(&socket), datagram.point())
                .flags((NO_SIGNAL | libc::MSG_DONTWAIT) as u32)
                .build();
            (entry, Memory::Datagram(datagram), Some(socket))
        }
        Operation::Shutdown(socket, how) => {
            let entry = opcode::Shutdown::new(fd(&socket), how).build();
            (entry, Memory::None, Some(socket))
        }
        Operation::Read(file, mut bytes) => {
            let (start, length) = tail(&mut bytes, 0);
            let entry = opcode::Read::new(fd(&file), start, length).build();
            (entry, Memory::Bytes(bytes), Some(file))
        }
        Operation::Write(file, mut bytes, from, offset) => {
            let (start, length) = tail(&mut bytes, from);
            let entry = opcode::Write::new(fd(&file), start, length).offset(offset).build();
            (entry, Memory::Bytes(bytes), Some(file))
        }
        Operation::Sync(file) => (opcode::Fsync::new(fd(&file)).build(), Memory::None, Some(file)),
        Operation::Open(directory, path, flags) => {
            let at: RawFd = directory.as_ref().map_or(libc::AT_FDCWD, |fd| fd.as_raw_fd());
            let entry = opcode::OpenAt::new(types::Fd(at), path.as_ptr())
                .flags(flags | libc::O_CLOEXEC)
                .mode(0o644)
                .build();
            (entry, Memory::Spent(Spent::Path(path)), directory)
        }
        Operation::Link(directory, old, new) => {
            let entry = opcode::LinkAt::new(fd(&directory), old.as_ptr(), fd(&directory), new.as_ptr()).build();
            (entry, Memory::Spent(Spent::Paths(old, new)), Some(directory))
        }
        Operation::Unlink(directory, path) => {
            let at: RawFd = directory.as_ref().map_or(libc::AT_FDCWD, |fd| fd.as_raw_fd());
            let entry = opcode::UnlinkAt::new(types::Fd(at), path.as_ptr()).build();
            (entry, Memory::Spent(Spent::Path(path)), directory)
        }
        Operation::Close(file) => {
            // The kernel closes it: from here on nobody else may.
            let raw = std::os::fd::IntoRawFd::into_raw_fd(file);
            (opcode::Close::new(types::Fd(raw)).build(), Memory::None, None)
        }
    }
}
