//! Time, as loops count it: nanoseconds since the process first asked.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

fn start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

/// At least 1, so that 0 can mean no moment at all.
pub(crate) fn nanos(at: Instant) -> u64 {
    let elapsed = at.saturating_duration_since(start()).as_nanos();
    u64::try_from(elapsed).unwrap_or(u64::MAX).max(1)
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
            Self::Real => nanos(Instant::now()),
            Self::Virtual(now) => now,
        }
    }
}

/// The moment that is `nanos` after the process first asked.
pub(crate) fn instant(nanos: u64) -> Instant {
    start() + Duration::from_nanos(nanos)
}
