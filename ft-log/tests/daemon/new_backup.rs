//! A host that has nothing asks to be the backup: this daemon cannot synchronise it, and says so.

use ft_protocol::message::{Hello, Message, Standing};

use crate::{
    hostile::{connect_as_a, hello, receive, send, wait_closed},
    world::{HostId, World},
};

#[test]
fn a_host_that_asks_to_be_synchronised_is_refused_and_the_pair_is_made_all_the_same() {
    let world = World::new();
    let mut b = world.host_with(HostId::B, &[]);
    for primary in [false, true] {
        let mut stream = connect_as_a(&world);
        let asks = Hello {
            primary,
            instance: 9,
            standing: Standing::Nothing,
            ..hello()
        };
        send(&mut stream, &Message::Hello(asks));
        let Message::Refuse { reason } = receive(&mut stream) else {
            panic!("not refused");
        };
        assert!(reason.contains("takes no new backup"), "{reason}");
        wait_closed(&mut stream);
    }
    b.daemon.wait_log("takes no new backup");
    let mut a = world.host_with(HostId::A, &[]);
    a.daemon.wait_event("paired");
    b.daemon.wait_event("paired");
}
