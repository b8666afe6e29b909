#![no_main]

#[path = "../src/blk.rs"]
mod blk;

libfuzzer_sys::fuzz_target!(|data: &[u8]| blk::blk_request(data));
