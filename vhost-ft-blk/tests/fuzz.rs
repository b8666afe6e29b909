//! The fuzzers' functions, over their corpus and over random inputs of a fixed seed: what was found once stays found, without a fuzzer.

#[allow(unreachable_pub)]
#[path = "../../fuzz/src/seeded.rs"]
mod seeded;
// The file is a crate of its own for the fuzzers.
#[allow(unreachable_pub)]
#[path = "../../fuzz/src/blk.rs"]
mod targets;

fn run(name: &str) {
    seeded::run(&targets::TARGETS, name);
}

#[test]
fn requests() {
    run("blk-request");
}

#[test]
fn rings() {
    run("blk-rings");
}
