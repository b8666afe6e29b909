//! Crash points: places where a test-only build can die with its whole host.
//!
//! Without the feature `crash-points` a point compiles to nothing.

/// Where the whole replica can be made to die. `FT_CRASH_AT=shim.kick.before:17` dies at the 17th time.
#[inline(always)]
pub fn point(name: &'static str) {
    #[cfg(feature = "crash-points")]
    armed::hit(name);
    #[cfg(not(feature = "crash-points"))]
    let _ = name;
}

#[cfg(feature = "crash-points")]
mod armed {
    use std::sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    };

    use nix::sys::signal::{Signal, killpg};

    static HITS: AtomicU64 = AtomicU64::new(0);
    static ARMED: OnceLock<Option<(String, u64)>> = OnceLock::new();

    pub(super) fn hit(name: &str) {
        let armed = ARMED.get_or_init(|| {
            let (point, nth) = std::env::var("FT_CRASH_AT")
                .ok()?
                .split_once(':')
                .map(|(p, n)| (p.to_owned(), n.to_owned()))?;
            Some((point, nth.parse().expect("FT_CRASH_AT=point:nth")))
        });
        let Some((point, nth)) = armed else { return };
        if point == name && HITS.fetch_add(1, Ordering::Relaxed) + 1 == *nth {
            eprintln!("crash point {name}: killing this host");
            let _ = killpg(nix::unistd::getpgrp(), Signal::SIGKILL);
        }
    }
}
