//! Targets without a fuzzer: over their corpus and over random inputs of a fixed seed. Tests of the crates include this file.

use std::{fs, path::Path};

/// What is run on each input.
pub type Target = fn(&[u8]);

const SEED: u64 = 0x5eed;
const RANDOM_INPUTS: usize = 2000;

/// splitmix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(target);
    let mut paths: Vec<_> = fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(paths.len() >= 5, "{}: no corpus", directory.display());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Runs a target over its corpus, over its corpus with a few bytes changed, and over noise.
pub fn run(targets: &[(&str, Target)], name: &str) {
    let (_, target) = targets.iter().find(|(target, _)| *target == name).unwrap();
    let seeds = corpus(name);
    seeds.iter().for_each(|seed| target(seed));
    let mut state = SEED;
    for index in 0..RANDOM_INPUTS {
        let mut input = match index % 3 {
            0 => (0..random(&mut state) % 300)
                .map(|_| random(&mut state) as u8)
                .collect(),
            _ => seeds[random(&mut state) as usize % seeds.len()].clone(),
        };
        for _ in 0..random(&mut state) % 4 {
            if let Some(last) = input.len().checked_sub(1) {
                let at = random(&mut state) as usize % (last + 1);
                input[at] = random(&mut state) as u8;
            }
        }
        // A panic ends the test; the input is what is needed to look at it.
        let guard = Shown(&input);
        target(&input);
        std::mem::forget(guard);
    }
}

/// Shows an input when the stack unwinds over it.
struct Shown<'a>(&'a [u8]);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        eprintln!("seed {SEED:#x}, input {:?}", self.0);
    }
}
