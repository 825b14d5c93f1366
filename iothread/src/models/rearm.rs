//! A queue does not wait for a kick that will not come.
//!
//! The driver is the one of virtio 1.2, 2.7.13.4: publish, full fence, read what the device said
//! about kicks. The device does what `devices::virtio::VirtQueue` does: `begin`, take what is
//! there, and [`announce`], which says in which order it asks for kicks and looks again.

use std::sync::Arc;

use loom::sync::Notify;
use loom::sync::atomic::{AtomicU16, Ordering::*, fence};
use loom::thread;

use super::Fault::Swapped;
use super::check::{fails, holds, left_out};
use crate::announce;

const PREEMPTIONS: usize = 3;

/// Entries the driver offers.
const ENTRIES: u16 = 3;

/// Where the indices begin: they run over in the model.
const FIRST: u16 = u16::MAX - 1;

struct Ring {
    event_idx: bool,
    /// Index of the available ring.
    available: AtomicU16,
    /// Flag of the used ring: no kicks, please.
    no_notify: AtomicU16,
    /// `avail_event`: kick when this entry is made available.
    event: AtomicU16,
    /// The doorbell.
    kick: Notify,
}

impl Ring {
    fn new(event_idx: bool) -> Self {
        Self {
            event_idx,
            available: AtomicU16::new(FIRST),
            no_notify: AtomicU16::new(0),
            event: AtomicU16::new(FIRST),
            kick: Notify::new(),
        }
    }

    fn driver(&self) {
        for n in 0..ENTRIES {
            let old = FIRST.wrapping_add(n);
            let new = old.wrapping_add(1);
            self.available.store(new, Release);
            fence(SeqCst);
            let wanted = if self.event_idx {
                // vring_need_event
                let event = self.event.load(Relaxed);
                new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
            } else {
                self.no_notify.load(Relaxed) == 0
            };
            if wanted {
                self.kick.notify();
            }
        }
    }

    /// One kick: takes all entries; the index it came to.
    fn device(&self, mut next: u16) -> u16 {
        loop {
            if !self.event_idx {
                self.no_notify.store(1, Relaxed);
            }
            while self.available.load(Acquire) != next {
                next = next.wrapping_add(1);
            }
            let enable = || match self.event_idx {
                true => self.event.store(next, Relaxed),
                false => self.no_notify.store(0, Relaxed),
            };
            if !announce(enable, || self.available.load(Relaxed) != next) {
                return next;
            }
        }
    }
}

fn drive(event_idx: bool) {
    let ring = Arc::new(Ring::new(event_idx));
    let driver = {
        let ring = Arc::clone(&ring);
        thread::spawn(move || ring.driver())
    };
    let mut next = ring.device(FIRST);
    while next != FIRST.wrapping_add(ENTRIES) {
        ring.kick.wait();
        next = ring.device(next);
    }
    driver.join().unwrap();
}

fn by_flag() {
    drive(false);
}

fn by_index() {
    drive(true);
}

#[test]
fn no_kick_is_missed() {
    holds(PREEMPTIONS, by_flag);
    holds(PREEMPTIONS, by_index);
}

/// No thread can go on: the device waits for a kick, and the driver has ended.
const NO_KICK: &str = "deadlock";

#[test]
fn without_the_fence_a_kick_is_missed() {
    let fault = left_out("announce", "fence(SeqCst)");
    fails(PREEMPTIONS, by_flag, fault, NO_KICK);
    fails(PREEMPTIONS, by_index, fault, NO_KICK);
}

#[test]
fn a_device_that_looks_before_it_asks_for_kicks_misses_one() {
    let fault = Swapped("look, then announce");
    fails(PREEMPTIONS, by_flag, fault, NO_KICK);
    fails(PREEMPTIONS, by_index, fault, NO_KICK);
}
