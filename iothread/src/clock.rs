//! Time, as loops count it: nanoseconds of CLOCK_MONOTONIC.

#![expect(
    unsafe_code,
    reason = "clock_gettime: reading an Instant as a number takes as long again"
)]

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// One moment by both clocks, which are the same.
fn start() -> (Instant, u64) {
    static START: OnceLock<(Instant, u64)> = OnceLock::new();
    *START.get_or_init(|| (Instant::now(), monotonic()))
}

fn monotonic() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec. It knows this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// At least 1, so that 0 can mean no moment at all.
pub(crate) fn nanos(at: Instant) -> u64 {
    let (start, nanos) = start();
    let later = u64::try_from(at.saturating_duration_since(start).as_nanos()).unwrap_or(u64::MAX);
    let earlier = u64::try_from(start.saturating_duration_since(at).as_nanos()).unwrap_or(u64::MAX);
    nanos.saturating_add(later).saturating_sub(earlier).max(1)
}

/// The same moment.
pub(crate) fn instant(nanos: u64) -> Instant {
    let (start, at_start) = start();
    match nanos.checked_sub(at_start) {
        Some(later) => start + Duration::from_nanos(later),
        None => start - Duration::from_nanos(at_start - nanos),
    }
}

/// The time of one loop.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Clock {
    Real,
    /// Passes only when the loop has nothing to do, and then at once.
    Virtual(u64),
}

impl Clock {
    pub(crate) fn now(self) -> u64 {
        match self {
            Self::Real => monotonic(),
            Self::Virtual(now) => now,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn both_clocks_tell_the_same_time() {
        let before = Instant::now();
        let nanos_now = Clock::Real.now();
        let after = Instant::now();
        // They were read one after the other, once, in `start`.
        let doubt = Duration::from_millis(50);
        assert!(instant(nanos_now) + doubt >= before && instant(nanos_now) <= after + doubt);
        for at in [before, after, before + Duration::from_secs(3600)] {
            assert_eq!(instant(nanos(at)), at);
        }
    }
}
