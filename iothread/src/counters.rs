//! What a thread has done, written by that thread alone and readable by any.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::activity::Activity;

/// A number that one thread raises and every thread may read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Raises the number. Only the thread that owns the counter may call this: it is a plain
    /// load and store, so a second writer would lose counts (never memory safety).
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// The number as it is now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters of one thread. Times are nanoseconds.
        #[derive(Debug, Default)]
        #[repr(align(128))] // two cache lines, so that no two threads write to one
        pub struct Counters {
            $($(#[$doc])* pub $name: Counter,)*
            /// Who is, and was, at work here.
            pub activity: Activity,
        }

        impl Counters {
            /// Every counter with its name, in a fixed order.
            pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)*]
            }
        }
    };
}

counters! {
    /// Turns of the loop.
    turns,
    /// Times the loop went to sleep in the kernel.
    sleeps,
    /// Polling phases that found work before the time was up.
    poll_hits,
    /// Polling phases that did not.
    poll_misses,
    /// Times polling was given up for a while, because others wanted the CPU.
    poll_pauses,
    /// Ready file descriptors dispatched.
    fd_events,
    /// Timers that expired.
    timers,
    /// How late they fired, all together.
    timer_late_ns,
    /// Bottom halves and messages run.
    bottom_halves,
    /// Events left with another thread that held the strand.
    left,
    /// Strands handed over to their home loop while held.
    handed_over,
    /// `io_uring_enter` calls.
    ring_enters,
    /// io_uring operations submitted.
    ring_submits,
    /// io_uring completions reaped.
    ring_completions,
    /// Callbacks run when there was nothing else to do.
    idle_callbacks,
    /// Time spent on work.
    busy_ns,
    /// Time spent polling.
    poll_ns,
    /// Time spent asleep.
    sleep_ns,
    /// Queue notifications handled here.
    kicks,
    /// Requests taken from available rings here.
    requests,
    /// Requests put on used rings here.
    completions,
    /// Interrupts sent from here.
    interrupts,
    /// Returns of `KVM_RUN` for port I/O.
    pio_exits,
    /// Returns of `KVM_RUN` for memory-mapped I/O.
    mmio_exits,
    /// All other returns of `KVM_RUN`.
    other_exits,
}
