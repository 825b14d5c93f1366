//! How long to poll before sleeping.
//!
//! The time adapts to how long the loop really had to wait: a wait that polling could have
//! covered makes it grow, a wait longer than the limit makes it shrink. These are the rules and
//! defaults QEMU users know as `poll-max-ns`, `poll-grow` and `poll-shrink`.

use std::time::Duration;

/// The first step of growing from zero.
const FIRST: Duration = Duration::from_micros(4);

/// `poll = { max, grow, shrink }` of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PollPolicy {
    /// Longest time to poll; zero: never.
    pub max: Duration,
    /// Factor of growing.
    pub grow: u32,
    /// Divisor of shrinking; 0 or 1: to nothing at once.
    pub shrink: u32,
}

impl PollPolicy {
    /// Never polls.
    pub const OFF: Self = Self { max: Duration::ZERO, grow: 2, shrink: 0 };
}

impl Default for PollPolicy {
    fn default() -> Self {
        Self { max: Duration::from_micros(32), grow: 2, shrink: 0 }
    }
}

#[derive(Debug)]
pub(crate) struct Polling {
    policy: PollPolicy,
    limit: Duration,
}

impl Polling {
    pub(crate) fn new(policy: PollPolicy) -> Self {
        Self { policy, limit: Duration::ZERO }
    }

    #[cfg(all(test, not(loom)))]
    pub(crate) fn with_limit(policy: PollPolicy, limit: Duration) -> Self {
        Self { policy, limit }
    }

    /// How long to poll now.
    pub(crate) fn limit(&self) -> Duration {
        self.limit
    }

    /// Learns from a wait that ended in sleep: how long there was nothing to do.
    pub(crate) fn waited(&mut self, wait: Duration) {
        if wait <= self.limit {
            return;
        }
        if wait > self.policy.max {
            self.limit = match self.policy.shrink {
                0 | 1 => Duration::ZERO,
                by => self.limit / by,
            };
        } else {
            let grown = if self.limit.is_zero() { FIRST } else { self.limit * self.policy.grow };
            self.limit = grown.min(self.policy.max);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn short_waits_grow_the_time_to_the_maximum_and_a_long_one_ends_it() {
        let mut polling = Polling::new(PollPolicy::default());
        let mut limits = Vec::new();
        for _ in 0..5 {
            polling.waited(polling.limit() + US);
            limits.push(polling.limit());
        }
        // The fifth wait, 33 us, is longer than polling may ever last.
        assert_eq!(limits, [4 * US, 8 * US, 16 * US, 32 * US, Duration::ZERO]);
    }

    #[test]
    fn a_wait_that_polling_covers_changes_nothing() {
        let mut polling = Polling::new(PollPolicy::default());
        polling.waited(3 * US);
        polling.waited(2 * US);
        assert_eq!(polling.limit(), FIRST);
    }

    #[test]
    fn a_divisor_shrinks_step_by_step() {
        let policy = PollPolicy { shrink: 2, ..PollPolicy::default() };
        let mut polling = Polling { policy, limit: 32 * US };
        polling.waited(100 * US);
        assert_eq!(polling.limit(), 16 * US);
    }

    #[test]
    fn off_never_polls() {
        let mut polling = Polling::new(PollPolicy::OFF);
        polling.waited(US);
        assert!(polling.limit().is_zero());
    }
}
