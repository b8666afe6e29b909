#![no_main]

#[path = "../src/net.rs"]
mod net;

libfuzzer_sys::fuzz_target!(|data: &[u8]| net::net_header(data));
