//! Loops, lots and watchdogs for tests of many threads.
#![allow(dead_code, clippy::allow_attributes, reason = "each test program uses what it needs")]

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::time::{Duration, Instant};

use iothread::{Blocking, LoopHandle, LoopPolicy, PollPolicy, Thread, ThreadSpec};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How the loops of a test work: with `HEDDLE_SHUFFLE=SEED`, in an order drawn by lot.
pub fn policy(poll: PollPolicy) -> LoopPolicy {
    LoopPolicy { poll, shuffle: seed_from_outside() }
}

fn seed_from_outside() -> Option<u64> {
    let seed = std::env::var("HEDDLE_SHUFFLE").ok()?;
    Some(seed.parse().expect("HEDDLE_SHUFFLE is a number"))
}

/// xorshift64*, so that a run can be repeated as far as threads can.
pub struct Lot(u64);

impl Lot {
    pub fn new(seed: u64) -> Self {
        let seed = seed ^ seed_from_outside().unwrap_or(0).rotate_left(32);
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Less than `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % end
    }

    /// Goes on a little later.
    pub fn dawdle(&mut self) {
        match self.below(4) {
            0 => std::thread::yield_now(),
            1 => (0..self.below(500)).for_each(|_| std::hint::spin_loop()),
            _ => {}
        }
    }
}

/// Some loops on threads of their own, which end with this.
pub struct Loops {
    pub handles: Vec<LoopHandle>,
    threads: Vec<Thread>,
}

impl Loops {
    pub fn start(count: usize, poll: PollPolicy) -> Self {
        let mut policy = policy(poll);
        let start = |n| {
            policy.shuffle = policy.shuffle.map(|seed| seed.wrapping_add(1));
            let spec = ThreadSpec::new(format!("loop{n}"));
            iothread::spawn_loop(spec, policy).unwrap()
        };
        let (handles, threads) = (0..count).map(start).unzip();
        Self { handles, threads }
    }

    pub fn index(&self, handle: &LoopHandle) -> usize {
        self.handles.iter().position(|it| it == handle).unwrap()
    }

    /// Waits until all is done that was under way. Nothing moves any more: at the end of the first
    /// round nothing is on its way to a home that it was told of before the last move, the second
    /// sends on to the last home what has arrived at others, and the third finds it there.
    pub fn settle(&self, blocking: &Blocking) {
        for _ in 0..3 {
            let round: Vec<_> = self.handles.iter().map(LoopHandle::barrier).collect();
            for reply in round {
                reply.wait_for(blocking, LIMIT).unwrap().expect("a loop answers");
            }
        }
    }
}

impl Drop for Loops {
    fn drop(&mut self) {
        self.handles.iter().for_each(LoopHandle::stop);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() && !std::thread::panicking() {
                panic!("a loop has panicked");
            }
        }
    }
}

pub const LIMIT: Duration = Duration::from_secs(20);

/// Waits for something that other threads will do; false: it took too long.
pub fn comes(mut done: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    while !done() {
        if began.elapsed() > LIMIT {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

pub fn eventually(what: &str, done: impl FnMut() -> bool) {
    assert!(comes(done), "never: {what}");
}

/// An eventfd: to write to, and to be watched.
pub fn eventfd() -> (EventFd, OwnedFd) {
    let eventfd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
    let writer = eventfd.try_clone().unwrap();
    #[expect(unsafe_code, reason = "an EventFd gives its fd only raw")]
    // SAFETY: into_raw_fd passed the ownership on.
    let owned = unsafe { OwnedFd::from_raw_fd(eventfd.into_raw_fd()) };
    (writer, owned)
}
