//! The loop with a device that does nothing.

use super::*;
use crate::{
    guest_side::{
        GuestSide,
        blk::{BlkGuestSide, Geometry},
    },
    session::channel,
};

/// A device that does nothing.
#[derive(Debug)]
struct Idle(BlkGuestSide);

impl Device for Idle {
    fn guest(&mut self) -> &mut dyn GuestSide {
        &mut self.0
    }

    fn start(&mut self, _life: Life, _io: &mut Uring) -> Result<(), End> {
        Ok(())
    }

    fn perform(&mut self, _marker: Option<Lsn>, _io: &mut Uring) -> Result<(), End> {
        Ok(())
    }

    fn complete(&mut self, _completion: Completion, _io: &mut Uring) -> Result<(), End> {
        Ok(())
    }

    fn take_input(&mut self, _io: &mut Uring) -> Result<Option<Input>, End> {
        Ok(None)
    }

    fn recycle(&mut self, _payload: Vec<u8>) {}

    fn go_live(&mut self, _io: &mut Uring, _events: &mut Events) -> Result<(), End> {
        Ok(())
    }

    fn is_idle(&self) -> bool {
        true
    }
}

fn idle() -> Alone<Idle> {
    let geometry = Geometry {
        capacity_sectors: 8,
        read_only: false,
        queues: 1,
        block_bytes: 512,
        protected: false,
    };
    let event = || EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    Alone::new(
        Idle(BlkGuestSide::new(geometry)),
        channel(1).unwrap().1.remove(0),
        Arc::new(Signals::take().unwrap()),
        event(),
        Events::open("test", None).unwrap(),
        Service::silent(),
    )
    .unwrap()
}

/// Takes completions until the queue was kicked.
fn wait_kick(alone: &mut Alone<Idle>) {
    while !alone.lines[0].kicked {
        alone.io.wait(Some(std::time::Duration::from_secs(20)));
        let completion = alone.io.next_completion().expect("a kick was lost");
        alone.dispatch(completion).unwrap();
    }
}

#[test]
fn kicks_are_heard_after_the_completion_queue_was_full() {
    let mut alone = idle();
    let kick = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    alone.listen(0, Some(kick.try_clone().unwrap()), None, None);
    alone.io.submit();
    // More completions than the ring holds, and nobody takes them while the guest kicks.
    let ready = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    ready.write(1).unwrap();
    for _ in 0..8 {
        for token in 0..128 {
            alone.io.poll(ready.as_raw_fd(), token);
        }
        alone.io.submit();
    }
    for _ in 0..3 {
        alone.lines[0].kicked = false;
        kick.write(1).unwrap();
        alone.io.submit();
        wait_kick(&mut alone);
        // All of what came with it.
        while let Some(completion) = alone.io.next_completion() {
            alone.dispatch(completion).unwrap();
            alone.io.submit();
        }
    }
}
