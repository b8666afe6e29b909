//! What the tests of the device daemons share: a guest without a VM, a frontend, an ft-log that obeys the test, a daemon process.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

pub mod daemon;
pub mod driver;
pub mod frontend;
pub mod ft_log;
pub mod stock;
