//! How long to poll before sleeping.
//!
//! The time adapts to how long the loop really had to wait: a wait that polling could have
//! covered makes it grow, a wait longer than the limit makes it shrink. These are the rules and
//! defaults QEMU users know as `poll-max-ns`, `poll-grow` and `poll-shrink`. Two things more bound
//! it: a share of the CPU, and the end of all polling for a while when the kernel has to take the
//! CPU away for somebody else again and again.

use std::time::Duration;

use crate::thread::switches;

/// The first step of growing from zero.
const FIRST: Duration = Duration::from_micros(4);

/// The CPU share is kept in every window of this length.
const WINDOW_NS: u64 = 10_000_000;

/// Others want the CPU if the kernel has taken it away so often in such a window. A thread that
/// competes is preempted at the end of each slice, some 3 ms; one that is left alone still gives
/// way to the kernel's own threads now and then.
const CONTENTION_WINDOW_NS: u64 = 50_000_000;
const CONTENDED: u64 = 4;

/// How long there is no polling after the CPU was wanted by others; doubled while it still is.
const FIRST_PAUSE_NS: u64 = CONTENTION_WINDOW_NS;
const LONGEST_PAUSE_NS: u64 = 1_000_000_000;

/// `poll = { max, grow, shrink, share }` of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PollPolicy {
    /// Longest time to poll; zero: never.
    pub max: Duration,
    /// Factor of growing.
    pub grow: u32,
    /// Divisor of shrinking; 0 or 1: to nothing at once.
    pub shrink: u32,
    /// The share of a CPU that polling may take, in percent of the time that passes.
    pub share: u32,
}

impl PollPolicy {
    /// Never polls.
    pub const OFF: Self = Self { max: Duration::ZERO, grow: 2, shrink: 0, share: 100 };
}

impl Default for PollPolicy {
    fn default() -> Self {
        Self { max: Duration::from_micros(32), ..Self::OFF }
    }
}

#[derive(Debug)]
pub(crate) struct Polling {
    policy: PollPolicy,
    limit: Duration,
    /// Nanoseconds that may be polled now, of those in one window.
    credit: u64,
    /// Until when they have been counted.
    counted: u64,
    contention: Contention,
}

impl Polling {
    pub(crate) fn new(policy: PollPolicy) -> Self {
        Self::with_limit(policy, Duration::ZERO)
    }

    pub(crate) fn with_limit(policy: PollPolicy, limit: Duration) -> Self {
        Self { policy, limit, credit: 0, counted: 0, contention: Contention::default() }
    }

    /// How long to poll now.
    pub(crate) fn limit(&mut self, now: u64) -> Duration {
        let may = !self.limit.is_zero()
            && self.has_share(now)
            && !self.contention.forbids(now, || switches().involuntary);
        if may { self.limit } else { Duration::ZERO }
    }

    /// Is there enough of the CPU's share left to poll for as long as usual?
    fn has_share(&mut self, now: u64) -> bool {
        let share = u64::from(self.policy.share);
        if share >= 100 {
            return true;
        }
        let passed = now.saturating_sub(self.counted).min(WINDOW_NS);
        self.credit = (self.credit + passed * share / 100).min(WINDOW_NS * share / 100);
        self.counted = now;
        Duration::from_nanos(self.credit) >= self.limit
    }

    /// Pauses that began since the last call.
    pub(crate) fn take_pauses(&mut self) -> u64 {
        std::mem::take(&mut self.contention.pauses)
    }

    /// So long was polled.
    pub(crate) fn polled(&mut self, time: Duration) {
        self.credit = self.credit.saturating_sub(time.as_nanos() as u64);
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

/// Does somebody else want this CPU?
#[derive(Debug, Default)]
struct Contention {
    /// When a window of polling began, and how often the CPU had been taken away until then.
    window: Option<(u64, u64)>,
    pause: u64,
    until: u64,
    /// Not counted elsewhere yet.
    pauses: u64,
}

impl Contention {
    /// `switches`: how often the kernel took the CPU from this thread so far.
    fn forbids(&mut self, now: u64, switches: impl Fn() -> u64) -> bool {
        if now < self.until {
            return true;
        }
        match self.window {
            None => self.window = Some((now, switches())),
            Some((began, _)) if now - began < CONTENTION_WINDOW_NS => {}
            Some((_, before)) => {
                let taken = switches();
                self.window = Some((now, taken));
                if taken - before < CONTENDED {
                    self.pause = 0;
                } else {
                    self.pause = (2 * self.pause).clamp(FIRST_PAUSE_NS, LONGEST_PAUSE_NS);
                    self.until = now + self.pause;
                    self.window = None;
                    self.pauses += 1;
                }
            }
        }
        now < self.until
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
            polling.waited(polling.limit + US);
            limits.push(polling.limit);
        }
        // The fifth wait, 33 us, is longer than polling may ever last.
        assert_eq!(limits, [4 * US, 8 * US, 16 * US, 32 * US, Duration::ZERO]);
    }

    #[test]
    fn a_wait_that_polling_covers_changes_nothing() {
        let mut polling = Polling::new(PollPolicy::default());
        polling.waited(3 * US);
        polling.waited(2 * US);
        assert_eq!(polling.limit, FIRST);
    }

    #[test]
    fn a_divisor_shrinks_step_by_step() {
        let policy = PollPolicy { shrink: 2, ..PollPolicy::default() };
        let mut polling = Polling::with_limit(policy, 32 * US);
        polling.waited(100 * US);
        assert_eq!(polling.limit, 16 * US);
    }

    #[test]
    fn off_never_polls() {
        let mut polling = Polling::new(PollPolicy::OFF);
        polling.waited(US);
        assert!(polling.limit.is_zero());
    }

    #[test]
    fn polling_takes_no_more_than_its_share() {
        let policy = PollPolicy { share: 20, ..PollPolicy::default() };
        let mut polling = Polling::with_limit(policy, 32 * US);
        let (mut now, mut polled) = (1, 0);
        while now < 1_000_000_000 {
            let time = if polling.has_share(now) { polling.limit } else { Duration::ZERO };
            polling.polled(time);
            polled += time.as_nanos() as u64;
            now += time.as_nanos() as u64 + 3_000;
        }
        assert!((150_000_000..202_000_000).contains(&polled), "{polled} ns in a second");
    }

    #[test]
    fn polling_pauses_longer_and_longer_while_others_want_the_cpu_and_then_goes_on() {
        let mut contention = Contention::default();
        let mut now = 1;
        // Of two seconds in which the CPU is taken away so many times in 50 ms.
        let mut polled_ms = |taken: u64, switches: &mut u64| {
            let mut polled = 0;
            for ms in 0..2_000 {
                now += 1_000_000;
                *switches += taken * (ms + 1) / 50 - taken * ms / 50;
                polled += u32::from(!contention.forbids(now, || *switches));
            }
            polled
        };
        let mut switches = 7;
        assert_eq!(polled_ms(0, &mut switches), 2_000);
        assert_eq!(polled_ms(CONTENDED - 1, &mut switches), 2_000, "the kernel's own threads");
        let contended = polled_ms(15, &mut switches);
        assert!(contended < 400, "{contended} of 2000 ms");
        assert!(polled_ms(0, &mut switches) > 900);
    }
}
