//! A TCP connection as the sessions want it.

use ledger_core::session::Stream;
use smoltcp::socket::tcp::{Socket, State};

/// A socket with a client.
pub(crate) struct Tcp<'a>(pub(crate) &'a mut Socket<'static>);

impl Stream for Tcp<'_> {
    fn peek(&mut self, buffer: &mut [u8]) -> usize {
        self.0.peek_slice(buffer).unwrap_or(0)
    }

    fn consume(&mut self, bytes: usize) {
        let mut left = bytes;
        while left > 0 {
            // What was peeked is there, though it may lie round the end of the buffer.
            let Ok(taken @ 1..) = self.0.recv(|front| {
                let taken = front.len().min(left);
                (taken, taken)
            }) else {
                return;
            };
            left -= taken;
        }
    }

    fn room(&self) -> usize {
        self.0.send_capacity() - self.0.send_queue()
    }

    fn send(&mut self, bytes: &[u8]) {
        // A connection that is going down takes nothing; then nobody listens.
        let _ = self.0.send_slice(bytes);
    }

    fn is_half_closed(&self) -> bool {
        self.0.state() == State::CloseWait
    }

    fn close(&mut self) {
        if self.0.may_send() {
            self.0.close();
        }
    }
}
